"""Builds extractive questions about abstracts, as ArxivQA of 500xCompressor has them: `compressor questions`.

Abstracts are read and split by date as for a corpus, a generator writes questions, and every answer must be a span of
its abstract. The generator is an instruct model behind an endpoint or rules (`cloze.py`); records of
the latter carry another data set's name, so that they are never reported together.
"""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from compressor.data.bad_records import BadRecords
from compressor.data.builders import generators
from compressor.data.builders.abstracts import Fields, read_abstract
from compressor.data.builders.cloze import cloze_questions
from compressor.data.builders.corpora import CorpusConfig, SampleConfig
from compressor.data.builders.endpoint import EndpointConfig, replies
from compressor.data.builders.generators import Pair
from compressor.data.builders.selection import Choice, Selection
from compressor.data.builders.shards import Sample
from compressor.data.left_out import LeftOut
from compressor.data.records import load_hub
from compressor.data.sources import MANIFEST, SPLITS, Hub, Row, read_rows, resolve, split_of
from compressor.errors import CompressorError, require
from compressor.files import FolderKind, atomic_folder, check_folder, owned, sha256, write_json
from compressor.progress import Progress, counted
from compressor.provenance import VERSION

QUESTIONS = FolderKind(
    "questions that this command built",
    (MANIFEST, *(f"{split}.{kind}" for split in SPLITS for kind in ("parquet", "jsonl.gz"))),
)
FIELDS = ("id", "dataset", "title", "context", "question", "answers", "generator", "kind", "date")
"""Fields of a record; all text except `answers`, a list. `kind` is the rule that made it, or blank."""


@dataclass
class ArxivQAConfig(Choice):
    """Which abstracts to ask about, and who asks."""

    source: str | list[str] = ""
    """Abstracts: corpus folders, files (JSONL, JSON, CSV, Parquet; .gz), shipped names, a hub id."""
    output: str = ""
    """Folder to write."""
    name: str = "arxivqa"
    """Name of the set, for its manifest."""
    licence: str = "unknown"
    """Licence of the source, for the manifest."""
    generator: Literal["rules", "endpoint"] = "rules"
    questions: int = 2
    """Questions about each abstract, at most."""
    format: Literal["parquet", "jsonl.gz"] = "parquet"
    hub_split: str | None = None
    """Split of a hub data set to read, where it has several."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Abstracts of each split to ask about."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        require(1 <= self.questions <= 50, "questions", self.questions, "1 to 50")
        self.corpus()

    def corpus(self) -> CorpusConfig:
        """The same choice of abstracts as the settings of a corpus, which checks them."""
        shared = ("source", "output", "train_before", "validation_before", "test_until", "undated")
        return CorpusConfig(
            **{name: getattr(self, name) for name in shared}, min_words=self.min_words, max_words=self.max_words
        )

    @property
    def model(self) -> str | None:
        """The model that writes the questions; None for rules."""
        return self.endpoint.model if self.generator == "endpoint" else None


def build_questions(config: ArxivQAConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Build a folder of questions (train, validation and test file) and return its manifest.

    Args:
        config: abstracts, cut dates, generator.
        overwrite: replace `config.output` if it was built earlier.

    Returns:
        The manifest, also written as manifest.json: sources, licence, generator and model, how many abstracts were
        read, dropped (by reason), asked about and left without a reply, how many pairs were accepted and rejected
        (by reason), and for each split its file (records, bytes, sha256) and first and last date.

    Raises:
        CompressorError: a broken record (file and line), a source that is not there, an output that exists, a model
            that cannot be asked.
    """
    with owned(config.output):
        return _built(config, Path(config.output), overwrite)


def _built(config: ArxivQAConfig, output: Path, overwrite: bool) -> dict[str, Any]:
    places = resolve(config.source, every_split=True)
    check_folder(output, QUESTIONS, overwrite, [place for place in places if isinstance(place, Path)])
    chosen, manifest = _abstracts(config)
    flat = [(split, abstract) for split in SPLITS for abstract in chosen[split]]
    rejected: Counter[str] = Counter()
    with atomic_folder(output, QUESTIONS) as folder:
        files = {split: _Writer(folder, split, config.format) for split in SPLITS}
        answered = 0
        for (split, abstract), pairs in zip(flat, _pairs(config, [item for _, item in flat], rejected), strict=True):
            answered += pairs is not None
            for number, (pair, kind) in enumerate(pairs or [], start=1):
                files[split].add(_record(config, abstract, pair, kind, number))
        manifest["abstracts"] = {"asked": len(flat), "no_reply": len(flat) - answered}
        accepted = sum(file.records for file in files.values())
        if not accepted:
            reasons = ", ".join(f"{name} {count}" for name, count in rejected.items()) or "none was written"
            raise CompressorError(f"no question about {len(flat):,} abstracts was accepted ({reasons})")
        manifest["pairs"] = {"accepted": accepted, "rejected": dict(sorted(rejected.items()))}
        manifest["splits"] = {split: file.close() for split, file in files.items() if file.records}
        write_json(folder / MANIFEST, manifest)
    return manifest


def _abstracts(config: ArxivQAConfig) -> tuple[dict[str, list[dict[str, str]]], dict[str, Any]]:
    """The abstracts of each split, and the manifest so far."""
    cuts, sizes = config.corpus().cuts(), config.sample.sizes()
    selection = Selection(config.corpus(), cuts)
    samples = {
        split: Sample(size, config.sample.seed, balance=split in config.sample.balance) for split, size in sizes.items()
    }
    chosen: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    progress = Progress("reading", unit="abstracts")
    places = resolve(config.source, every_split=True)
    left_out = LeftOut()
    bad = BadRecords(config.skip_bad_records, left_out)
    for place in places:
        first: dict[str, Any] = {}
        stated = split_of(place) if isinstance(place, Path) else config.hub_split

        def read(row: Row, first: dict[str, Any] = first, name: str = place.name) -> tuple[str, dict[str, str] | str]:
            first.update(row.values if not first else {})
            return row.where, read_abstract(row, Fields(), first, default_id=f"{name}:{row.number}")

        for where, found in bad.usable(_rows(place, config.hub_split, bad), read):
            progress.add()
            split = selection.split_of(found, stated, where)
            if split in samples and isinstance(found, dict):
                samples[split].add(found)
            elif split is not None and not samples and isinstance(found, dict):
                chosen[split].append(found)
    progress.close()
    bad.finish(", ".join(place.name for place in places))
    for split, sample in samples.items():
        if sample.seen < sample.size:
            raise CompressorError(f"sample.{split} = {sample.size} but the split has only {sample.seen} abstracts")
        chosen[split] = list(sample.records())
    return chosen, {
        "format": 1,
        "name": config.name,
        "licence": config.licence,
        "built_with": f"kv-compressor {VERSION}",
        "generator": config.generator,
        "model": config.model,
        "questions": config.questions,
        "sources": [place.name for place in places],
        "cuts": {name: f"before {cut}" for name, cut in zip(SPLITS, cuts, strict=True)},
        "words": {"min": config.min_words, "max": config.max_words},
        "sample": {**sizes, "balance": config.sample.balance, "seed": config.sample.seed} if sizes else None,
        "fields": list(FIELDS),
        "read": progress.done + bad.bad,
        "left_out": left_out.record(),
        "dropped": dict(sorted(selection.dropped.items())),
    }


def _rows(place: Path | Hub, hub_split: str | None, bad: BadRecords) -> Iterator[Row]:
    if isinstance(place, Path):
        yield from read_rows(place, bad=bad)
        return
    for number, values in enumerate(load_hub(place, hub_split, streaming=True), start=1):
        yield Row(number, f"{place.name} row {number}", values)


def _pairs(
    config: ArxivQAConfig, abstracts: list[dict[str, str]], rejected: Counter[str]
) -> Iterator[list[tuple[Pair, str]] | None]:
    """For each abstract in order its accepted pairs with their kinds; None if the model did not reply."""
    if config.generator == "rules":
        progress = Progress("asking", len(abstracts), "abstracts")
        for abstract in abstracts:
            progress.add()
            text = abstract["abstract"]
            found = cloze_questions(text, config.questions, abstract["id"])
            checked = [(generators.check_pair(text, Pair(item.question, item.answer)), item.kind) for item in found]
            rejected.update(pair for pair, _ in checked if isinstance(pair, str))
            yield [(pair, kind) for pair, kind in checked if not isinstance(pair, str)]
        progress.close()
        return
    asked = replies(config.endpoint, [abstract["abstract"] for abstract in abstracts], config.questions)
    for abstract, reply in zip(abstracts, counted(asked, "asking", len(abstracts), "abstracts"), strict=True):
        if reply is None:
            yield None
        else:
            yield [(pair, "") for pair in _accepted(abstract["abstract"], reply, config.questions, rejected)]


def _accepted(abstract: str, reply: str, count: int, rejected: Counter[str]) -> list[Pair]:
    """The pairs of a reply that are accepted, at most `count`; the others are counted by reason."""
    pairs = generators.read_pairs(reply)
    if not pairs:
        rejected["no_pairs" if pairs == [] else "broken_json"] += 1
        return []
    accepted: list[Pair] = []
    for pair in pairs:
        found = generators.check_pair(abstract, pair)
        if isinstance(found, str):
            rejected[found] += 1
        elif any(found.question.casefold() == other.question.casefold() for other in accepted):
            rejected["duplicate"] += 1
        elif len(accepted) == count:
            rejected["more_than_asked"] += 1
        else:
            accepted.append(found)
    return accepted


def _record(config: ArxivQAConfig, abstract: dict[str, str], pair: Pair, kind: str, number: int) -> dict[str, Any]:
    return {
        "id": f"{abstract['id']}#{number}",
        "dataset": "arxivqa-cloze" if config.generator == "rules" else "arxivqa",
        "title": abstract["title"],
        "context": abstract["abstract"],
        "question": pair.question,
        "answers": [pair.answer],
        "generator": config.model or config.generator,
        "kind": kind,
        "date": abstract["date"],
    }


class _Writer:
    """Writes the questions of one split to one file; the same questions give the same bytes."""

    _AT_ONCE = 10_000

    def __init__(self, folder: Path, split: str, kind: str) -> None:
        self.path = folder / f"{split}.{kind}"
        self.records = 0
        self._dates: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._file: Any = None

    def add(self, record: dict[str, Any]) -> None:
        self.records += 1
        if record["date"]:
            self._dates = {min(self._dates | {record["date"]}), max(self._dates | {record["date"]})}
        self._rows.append(record)
        if len(self._rows) == self._AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self.path.suffix == ".parquet":
            types = {"answers": pa.list_(pa.string())}
            schema = pa.schema([(name, types.get(name, pa.string())) for name in FIELDS])
            if self._file is None:
                self._file = pq.ParquetWriter(self.path, schema, compression="zstd")
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=schema))
        else:
            if self._file is None:
                # Neither the time nor the name: they would differ from run to run.
                raw = gzip.GzipFile(filename="", fileobj=open(self.path, "wb"), mode="wb", mtime=0)  # noqa: SIM115
                self._file = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
        self._rows.clear()

    def close(self) -> dict[str, Any]:
        """Finish the file and describe it for the manifest, in the form of a corpus's."""
        self._flush()
        self._file.close()
        shard = {"file": self.path.name, "records": self.records, "bytes": self.path.stat().st_size}
        dates = {"first": min(self._dates), "last": max(self._dates)} if self._dates else None
        return {"records": self.records, "dates": dates, "shards": [{**shard, "sha256": sha256(self.path)}]}
