"""Builds a corpus of abstracts: `compressor corpus`.

The source is arXiv's metadata snapshot, local files or a hub data set. The result is a folder with a Parquet file for
each split and a manifest. Records pass through as a stream; what stays in memory is two 64-bit hashes for each record
kept. Questions about abstracts (`arxivqa.py`) read and split them in the same way.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from compressor.data.builders.abstracts import base_id, comparable, read_abstract
from compressor.data.builders.choice import CorpusConfig
from compressor.data.records import rows_of
from compressor.data.rows import BadRecords, LeftOut, Row
from compressor.data.sources import MANIFEST, SPLITS, Hub, resolve, split_of
from compressor.errors import CompressorError
from compressor.files import FolderKind, atomic_folder, check_folder, owned, sha256, write_json
from compressor.progress import Progress
from compressor.provenance import VERSION

CORPUS = FolderKind("a corpus", (MANIFEST, *(f"{split}-*-of-*.parquet" for split in SPLITS)))
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "abstract", "categories", "date")])
_ROWS_AT_ONCE = 10_000


def build_corpus(config: CorpusConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Build a corpus folder and return its manifest.

    Args:
        config: sources, cut dates, filters, sample.
        overwrite: replace `config.output` if it is a corpus built earlier.

    Returns:
        The manifest, also written as manifest.json: what `gather` says, and for each split its Parquet file (records,
        bytes, sha256), number of words and first and last date.

    Raises:
        CompressorError: a broken record (file and line), a source that is not there, an output that exists. Nothing is
            left behind.
    """
    with owned(config.output):
        check_output(config, CORPUS, overwrite)
        with atomic_folder(config.output, CORPUS) as folder:
            writers = {
                split: SplitWriter(folder / f"{split}-00000-of-00001.parquet", SCHEMA, "abstract") for split in SPLITS
            }
            manifest = gather(config, lambda split, record: writers[split].add(record))
            manifest["fields"] = SCHEMA.names
            manifest["splits"] = {split: writer.close() for split, writer in writers.items() if writer.records}
            write_json(folder / MANIFEST, manifest)
    return manifest


def check_output(config: CorpusConfig, kind: FolderKind, overwrite: bool) -> None:
    """Raise a `CompressorError` if the output cannot be written, or a source is not there or within it."""
    check_folder(config.output, kind, overwrite)
    places = resolve(config.source, every_split=True)
    check_folder(config.output, kind, overwrite, [place for place in places if isinstance(place, Path)])


class Selection:
    """Decides which split a record belongs to, or why it is dropped, and counts.

    Of several equal records the first is kept, in whatever split it is, so that no text is in two.
    """

    def __init__(self, rules: CorpusConfig, cuts: tuple[str, str, str]) -> None:
        """`cuts` are the first days after train, validation and test (yyyy-mm-dd)."""
        self.rules, self.cuts = rules, cuts
        self.kept: Counter[str] = Counter()
        self.month_dates: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._ids: set[int] = set()
        self._texts: set[int] = set()

    def split_of(self, found: dict[str, str] | str, source_split: str | None, where: str) -> str | None:
        """The split of a record; None if it is dropped. `found` is the record, or the reason to drop it."""
        verdict = found if isinstance(found, str) else self._verdict(found, source_split, where)
        if verdict in SPLITS and isinstance(found, dict):
            self.kept[verdict] += 1
            if len(found["date"]) == len("yyyy-mm"):
                # The schema has days; that the day is unknown is counted for the manifest.
                self.month_dates[verdict] += 1
                found["date"] += "-01"
            return verdict
        self.dropped[verdict] += 1
        return None

    def _verdict(self, record: dict[str, str], source_split: str | None, where: str) -> str:
        rules = self.rules
        words = record["abstract"].count(" ") + 1
        if words < rules.min_words:
            return "too_short"
        if rules.max_words is not None and words > rules.max_words:
            return "too_long"
        split = self._split_of_date(record, where)
        if split not in SPLITS:
            return split
        if rules.keep_source_splits and source_split not in (None, split):
            return "date_of_other_split"
        # Keys are kept only for records that are: a dropped one must not make its twin a duplicate.
        id_key, text_key = _hash(base_id(record["id"])), _hash(comparable(record["abstract"]))
        if id_key in self._ids:
            return "duplicate_id"
        if text_key in self._texts:
            return "duplicate_text"
        self._ids.add(id_key)
        self._texts.add(text_key)
        return split

    def _split_of_date(self, record: dict[str, str], where: str) -> str:
        if record["date"]:
            date = record["date"]
            first, last = (f"{date}-01", f"{date}-31") if len(date) == len("yyyy-mm") else (date, date)
            if self._split_of_day(first) != self._split_of_day(last):
                # A cut lies within the month: the record could be on either side of it.
                return "month_holds_a_cut"
            return self._split_of_day(first)
        if self.rules.undated == "error":
            raise CompressorError(
                f"{where} has no date and its id {record['id']!r} states none: name the field (date_field), "
                "or the split of records without a date (undated)"
            )
        return self.rules.undated

    def _split_of_day(self, day: str) -> str:
        pairs = zip(SPLITS, self.cuts, strict=True)
        return next((name for name, cut in pairs if day < cut), "after_test")


def _hash(text: str) -> int:
    """64 bits: among 2.7 million texts two different ones collide with a chance of 2 in 10 million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def gather(config: CorpusConfig, put: Callable[[str, dict[str, str]], None]) -> dict[str, Any]:
    """Read all sources and hand each record that is kept to `put`, with its split; a sample in random order.

    Returns:
        For the manifest: settings, sources (without folders, which are the builder's own business), licence, how many
        records were read, kept (`month_dates`: of these, how many whose source states only the month; they get its
        first day) and dropped for which reason.
    """
    sizes, balance, seed = config.sample.sizes(), config.sample.balance, config.sample.seed
    samples = {name: Sample(size, seed, balance=name in balance) for name, size in sizes.items()}
    selection, left_out = Selection(config, config.cuts()), LeftOut()
    bad = BadRecords(config.skip_bad_records, left_out)
    sources = _sources(config)
    with Progress("reading", unit="records") as progress:
        for name, place, stated in sources:
            first: dict[str, Any] = {}

            def read(row: Row, first: dict[str, Any] = first, name: str = name) -> tuple[str, dict[str, str] | str]:
                first.update(row.values if not first else {})
                return row.where, read_abstract(row, config, first, default_id=f"{name}:{row.number}")

            for where, found in bad.usable(rows_of(place, config.hub_split, bad), read):
                progress.add()
                split = selection.split_of(found, stated, where)
                if split in samples and isinstance(found, dict):
                    samples[split].add(found)
                elif split is not None and not samples and isinstance(found, dict):
                    put(split, found)
    bad.finish(", ".join(name for name, *_ in sources))
    dropped = dict(sorted(selection.dropped.items()))
    if not selection.kept:
        reasons = ", ".join(f"{name} {count}" for name, count in dropped.items())
        raise CompressorError(
            f"no record was kept of {progress.done} (dropped: {reasons or 'none'}): --min-words, --max-words and the "
            "dates of the splits say which are"
        )
    for name, sample in samples.items():
        if sample.seen < sample.size:
            raise CompressorError(f"sample.{name} = {sample.size} but the split has only {sample.seen} records")
        for record in sample.records():
            put(name, record)
    return {
        "format": 1,
        "name": config.name,
        "licence": config.licence,
        "built_with": f"kv-compressor {VERSION}",
        "sources": [
            {"name": name, **({"bytes": place.stat().st_size} if isinstance(place, Path) else {})}
            for name, place, _ in sources
        ],
        "cuts": {name: f"before {cut}" for name, cut in zip(SPLITS, config.cuts(), strict=True)},
        "words": {"min": config.min_words, "max": config.max_words},
        "sample": {**sizes, "balance": balance, "seed": seed} if sizes else None,
        "read": progress.done + bad.bad,
        "left_out": left_out.record(),
        "kept": {name: selection.kept[name] for name in SPLITS},
        "month_dates": {name: selection.month_dates[name] for name in SPLITS},
        "dropped": dropped,
    }


def _sources(config: CorpusConfig) -> list[tuple[str, Path | Hub, str | None]]:
    """Name of each place to read, the place, and the split that its name states."""
    places = resolve(config.source, every_split=True)
    files = [place.resolve() for place in places if isinstance(place, Path)]
    unique = len({path.name for path in files}) == len(files)
    top = None if unique else os.path.commonpath([path.parent for path in files])
    sources: list[tuple[str, Path | Hub, str | None]] = []
    for place in places:
        if isinstance(place, Hub):
            sources.append((place.name, place, config.hub_split))
        else:
            # Records without ids are named after their file: two files must not have one name.
            name = place.name if top is None else os.path.relpath(place.resolve(), top)
            sources.append((name, place, split_of(place)))
    if config.keep_source_splits:
        # Of two equal texts the one that is meant for testing stays.
        sources.sort(key=lambda source: {"test": 0, "validation": 1}.get(source[2] or "", 2))
    return sources


class SplitWriter:
    """Writes the records of one split as a Parquet file, keeping at most a row group in memory.

    Args:
        text: field whose words are counted.
    """

    def __init__(self, path: Path, schema: Any, text: str) -> None:
        self.path, self.schema, self.text = path, schema, text
        self.records = self.words = 0
        self._dates: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def add(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self._rows.append(record)
        self.records += 1
        self.words += record[self.text].count(" ") + 1
        if date := record["date"]:
            self._dates = {min(self._dates | {date}), max(self._dates | {date})}
        if len(self._rows) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, self.schema, compression="zstd")
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
            self._rows.clear()

    def close(self) -> dict[str, Any]:
        """Finish the file and describe the split for the manifest."""
        self._flush()
        self._writer.close()
        dates = {"first": min(self._dates), "last": max(self._dates)} if self._dates else None
        shard = {"file": self.path.name, "records": self.records, "bytes": self.path.stat().st_size}
        shard["sha256"] = sha256(self.path)
        return {"records": self.records, "words": self.words, "dates": dates, "shards": [shard]}


class Sample:
    """A random sample of a stream whose size need not be known.

    Each record gets a priority from a hash of seed and id, and the lowest `size` are kept: which records
    are drawn depends neither on their order nor on how the source was cut into files.
    With `balance`, records are drawn evenly from arXiv's archives, as far as each has enough.
    """

    def __init__(self, size: int, seed: int, *, balance: bool = False) -> None:
        self.size, self.seed, self.balance = size, seed, balance
        self.seen = 0
        self._heaps: dict[str, list[tuple[int, str, dict[str, str]]]] = {}

    def add(self, record: dict[str, str]) -> None:
        """Offer a record to the sample."""
        self.seen += 1
        digest = hashlib.blake2b(f"{self.seed}:{record['id']}".encode(), digest_size=8).digest()
        # heapq keeps the smallest in front; the largest priority must leave first, hence the minus.
        entry = (-int.from_bytes(digest, "big"), record["id"], record)
        heap = self._heaps.setdefault(archive(record["categories"]) if self.balance else "", [])
        if len(heap) < self.size:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def records(self) -> Iterator[dict[str, str]]:
        """The sample in random order, so that its first n records are a sample too."""
        heaps = {name: sorted(heap, reverse=True) for name, heap in self._heaps.items()}
        shares = even_shares({name: len(heap) for name, heap in heaps.items()}, self.size)
        drawn = (entry for name, heap in heaps.items() for entry in heap[: shares[name]])
        return (record for _, _, record in sorted(drawn, key=lambda entry: entry[:2], reverse=True))


def archive(categories: str) -> str:
    """arXiv's archive of the primary category: "cs" of "cs.CL math.ST"; "" if there is none."""
    return next(iter(categories.split()), "").partition(".")[0]


def even_shares(available: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` evenly; what a small group cannot give is shared among the others."""
    shares: dict[str, int] = {}
    left = total
    for place, (name, count) in enumerate(sorted(available.items(), key=lambda item: (item[1], item[0]))):
        groups = len(available) - place
        # Rounded up towards the largest groups, which come last.
        shares[name] = min(count, left // groups)
        left -= shares[name]
    return shares
