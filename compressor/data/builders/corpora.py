"""Builds a corpus of abstracts: `compressor corpus`.

The source is arXiv's metadata snapshot, local files or a hub data set. The result is
a folder of Parquet shards, one group for each split, with a manifest. Records pass through as a stream;
what stays in memory is two 64-bit hashes for each record kept.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compressor.data.bad_records import BadRecords
from compressor.data.builders.abstracts import Fields, read_abstract
from compressor.data.builders.selection import Choice, Selection
from compressor.data.builders.shards import FIELDS, Sample, SplitWriter
from compressor.data.left_out import LeftOut
from compressor.data.records import load_hub
from compressor.data.sources import MANIFEST, SPLITS, Hub, Row, read_rows, resolve, split_of
from compressor.errors import CompressorError, require
from compressor.files import FolderKind, atomic_folder, check_folder, owned, write_json
from compressor.progress import Progress
from compressor.provenance import VERSION

CORPUS = FolderKind("a corpus", (MANIFEST, *(f"{split}-*-of-*.parquet" for split in SPLITS)))


@dataclass
class SampleConfig:
    """Keep only a random sample of each split; a split of size 0 is left out. All 0: keep everything."""

    train: int = 0
    validation: int = 0
    test: int = 0
    balance: list[str] = field(default_factory=list)
    """Splits drawn evenly from arXiv's archives (cs, math, ...) instead of uniformly."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in SPLITS:
            require(getattr(self, name) >= 0, f"sample.{name}", getattr(self, name), "at least 0")
        require(set(self.balance) <= set(SPLITS), "sample.balance", self.balance, f"some of {list(SPLITS)}")

    def sizes(self) -> dict[str, int]:
        """Records wanted by split; empty when everything is kept."""
        return {name: getattr(self, name) for name in SPLITS if getattr(self, name)}


@dataclass
class CorpusConfig(Choice):
    """What to build a corpus from, and how."""

    source: str | list[str] = ""
    """arXiv's snapshot, files (JSONL, JSON, CSV, TSV, Parquet, TXT; .gz), folders, or a hub id."""
    output: str = ""
    """Folder to write."""
    name: str = "arxiv"
    """Name of the corpus, for its manifest."""
    licence: str = "unknown"
    """Licence of the source, for the manifest."""
    hub_split: str | None = None
    """Split of a hub data set to read, where it has several."""
    id_field: str = "id"
    text_field: str | None = None
    """Field that holds the abstract; by default `text` or `abstract`."""
    title_field: str = "title"
    categories_field: str = "categories"
    """Categories as text or a list. Title and categories may be absent from a whole file."""
    date_field: str | None = None
    """Field of the date; by default the first of `versions`, else `date`, `created`, an arXiv id's month."""
    keep_source_splits: bool = False
    """Of files named train*, validation*, test*, drop records whose date belongs to another split."""
    shard_records: int = 100_000
    """Records of one Parquet shard."""
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "a file, a glob, a folder or a hub id")
        require(bool(self.output), "output", self.output, "a folder to write")
        require(self.min_words >= 0, "min_words", self.min_words, "at least 0")
        require(
            self.max_words is None or self.max_words >= max(self.min_words, 1),
            "max_words",
            self.max_words,
            f"at least min_words = {self.min_words}, or null",
        )
        require(1 <= self.shard_records <= 10_000_000, "shard_records", self.shard_records, "1 to 10,000,000")
        first, second, last = self.cuts()
        require(first <= second, "validation_before", self.validation_before, f"{self.train_before} or later")
        require(second <= last, "test_until", self.test_until, f"not before {self.validation_before}")

    def cuts(self) -> tuple[str, str, str]:
        """First days after train, validation and test (yyyy-mm-dd)."""
        return (
            _cut("train_before", self.train_before),
            _cut("validation_before", self.validation_before),
            _cut("test_until", self.test_until, inclusive=True),
        )


def _cut(name: str, value: str, *, inclusive: bool = False) -> str:
    try:
        if not re.fullmatch(r"\d{4}-\d\d(-\d\d)?", value):
            raise ValueError
        day = datetime.date.fromisoformat(value if len(value) == 10 else f"{value}-01")
        if inclusive:
            # The 28th plus four days is always in the next month.
            month = (day.replace(day=28) + datetime.timedelta(days=4)).replace(day=1)
            day = month if len(value) == 7 else day + datetime.timedelta(days=1)
    except (ValueError, TypeError):
        raise CompressorError(f"{name} = {value!r} is not a date: write yyyy-mm or yyyy-mm-dd") from None
    return day.isoformat()


def build_corpus(config: CorpusConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Build a corpus folder and return its manifest.

    Args:
        config: sources, cut dates, filters, sample.
        overwrite: replace `config.output` if it is a corpus built earlier.

    Returns:
        The manifest, also written as manifest.json: settings, sources, licence, how many records were read,
        kept (`month_dates`: of these, how many whose source states only the month; they get its first day)
        and dropped for which reason, and for each split its shards (file, records, bytes, sha256), number
        of words and first and last date.

    Raises:
        CompressorError: a broken record (file and line), a source that is not there, an output that
            exists. Nothing is left behind.
    """
    output = Path(config.output)
    with owned(output):
        return _built(config, output, overwrite)


def _built(config: CorpusConfig, output: Path, overwrite: bool) -> dict[str, Any]:
    check_folder(output, CORPUS, overwrite)
    sources = _sources(config)
    places = [source.place for source in sources if isinstance(source.place, Path)]
    check_folder(output, CORPUS, inputs=places)
    with atomic_folder(output, CORPUS) as folder:
        manifest = _build(config, sources, folder)
        write_json(folder / MANIFEST, manifest)
    return manifest


def _build(config: CorpusConfig, sources: list[_Source], folder: Path) -> dict[str, Any]:
    sizes = config.sample.sizes()
    samples = {
        name: Sample(size, config.sample.seed, balance=name in config.sample.balance) for name, size in sizes.items()
    }
    writers = {name: SplitWriter(folder, name, config.shard_records) for name in (sizes or SPLITS)}
    selection = Selection(config, config.cuts())
    progress = Progress("reading", unit="records")
    left_out = LeftOut()
    bad = BadRecords(config.skip_bad_records, left_out)
    for source in sources:
        for where, found in source.records(config, bad):
            progress.add()
            split = selection.split_of(found, source.split, where)
            if split in samples and isinstance(found, dict):
                samples[split].add(found)
            elif split is not None and not samples and isinstance(found, dict):
                writers[split].add(found)
    progress.close()
    bad.finish(", ".join(source.name for source in sources))
    dropped = dict(sorted(selection.dropped.items()))
    if not selection.kept:
        reasons = ", ".join(f"{name} {count}" for name, count in dropped.items())
        raise CompressorError(f"no record was kept of {progress.done} (dropped: {reasons or 'none'})")
    for name, sample in samples.items():
        if sample.seen < sample.size:
            raise CompressorError(f"sample.{name} = {sample.size} but the split has only {sample.seen} records")
        for record in sample.records():
            writers[name].add(record)
    return {
        "format": 1,
        "name": config.name,
        "licence": config.licence,
        "built_with": f"kv-compressor {VERSION}",
        "sources": [source.description() for source in sources],
        "cuts": {name: f"before {cut}" for name, cut in zip(SPLITS, config.cuts(), strict=True)},
        "words": {"min": config.min_words, "max": config.max_words},
        "sample": {**sizes, "balance": config.sample.balance, "seed": config.sample.seed} if sizes else None,
        "fields": list(FIELDS),
        "read": progress.done + bad.bad,
        "left_out": left_out.record(),
        "kept": {name: selection.kept[name] for name in SPLITS},
        "month_dates": {name: selection.month_dates[name] for name in SPLITS},
        "dropped": dropped,
        "splits": {name: writer.close() for name, writer in writers.items() if writer.records},
    }


class _Source(NamedTuple):
    """One place that records are read from. `split` is the one its name states."""

    name: str
    split: str | None
    place: Path | Hub

    def description(self) -> dict[str, Any]:
        """For the manifest: no folders, which are the builder's own business."""
        size = {"bytes": self.place.stat().st_size} if isinstance(self.place, Path) else {}
        return {"name": self.name, **size}

    def records(self, config: CorpusConfig, bad: BadRecords) -> Iterator[tuple[str, dict[str, str] | str]]:
        """Where each record stands, and the record, or the reason why it is dropped (text)."""
        names = Fields(config.id_field, config.text_field, config.title_field, config.categories_field)
        names = names._replace(date=config.date_field)
        first: dict[str, Any] = {}

        def read(row: Row) -> tuple[str, dict[str, str] | str]:
            first.update(row.values if not first else {})
            return row.where, read_abstract(row, names, first, default_id=f"{self.name}:{row.number}")

        yield from bad.usable(self._rows(config, bad), read)

    def _rows(self, config: CorpusConfig, bad: BadRecords) -> Iterator[Row]:
        if isinstance(self.place, Hub):
            for number, values in enumerate(load_hub(self.place, config.hub_split, streaming=True), start=1):
                yield Row(number, f"{self.name} row {number}", values)
        else:
            yield from read_rows(self.place, bad=bad)


def _sources(config: CorpusConfig) -> list[_Source]:
    places = resolve(config.source, every_split=True)
    files = [place.resolve() for place in places if isinstance(place, Path)]
    unique = len({path.name for path in files}) == len(files)
    top = None if unique else os.path.commonpath([path.parent for path in files])
    sources = []
    for place in places:
        if isinstance(place, Hub):
            sources.append(_Source(place.name, config.hub_split, place))
        else:
            # Records without ids are named after their file: two files must not have one name.
            name = place.name if top is None else os.path.relpath(place.resolve(), top)
            sources.append(_Source(name, split_of(place), place))
    if config.keep_source_splits:
        # Of two equal texts the one that is meant for testing stays.
        sources.sort(key=lambda source: {"test": 0, "validation": 1}.get(source.split or "", 2))
    return sources
