"""Builds extractive questions about abstracts, as ArxivQA of 500xCompressor has them: `compressor questions`.

Abstracts are read and split by date as for a corpus, a generator writes questions, and every answer must be a span of
its abstract. The generator is an instruct model behind an endpoint or rules (`cloze.py`); records of
the latter carry another data set's name, so that they are never reported together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from compressor.data.builders.choice import CorpusConfig
from compressor.data.builders.cloze import cloze_questions
from compressor.data.builders.corpora import SplitWriter, check_output, gather
from compressor.data.builders.endpoint import EndpointConfig, Pair, check_pair, read_pairs, replies
from compressor.data.sources import MANIFEST, SPLITS
from compressor.errors import CompressorError, require
from compressor.files import FolderKind, atomic_folder, owned, write_json
from compressor.progress import counted

QUESTIONS = FolderKind("questions that this command built", (MANIFEST, *(f"{split}.parquet" for split in SPLITS)))
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "dataset", "title", "context", "question")),
        ("answers", pa.list_(pa.string())),
        *((name, pa.string()) for name in ("generator", "kind", "date")),
    ]
)
"""Fields of a record; `kind` is the rule that made it, or blank."""


@dataclass
class ArxivQAConfig(CorpusConfig):
    """Which abstracts to ask about, and who asks."""

    name: str = "arxivqa"
    generator: Literal["rules", "endpoint"] = "rules"
    questions: int = 2
    """Questions about each abstract, at most."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.questions <= 50, "questions", self.questions, "1 to 50")

    @property
    def model(self) -> str | None:
        """The model that writes the questions; None for rules."""
        return self.endpoint.model if self.generator == "endpoint" else None


def build_questions(config: ArxivQAConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Build a folder of questions (a Parquet file for each split) and return its manifest.

    Args:
        config: abstracts, cut dates, generator.
        overwrite: replace `config.output` if it was built earlier.

    Returns:
        The manifest, also written as manifest.json: what `gather` says of the abstracts, generator and model, how many
        abstracts were asked about and left without a reply, how many pairs were accepted and rejected (by reason), and
        for each split its file (records, bytes, sha256) and first and last date.

    Raises:
        CompressorError: a broken record (file and line), a source that is not there, an output that exists, a model
            that cannot be asked.
    """
    with owned(config.output):
        check_output(config, QUESTIONS, overwrite)
        chosen: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        manifest = gather(config, lambda split, record: chosen[split].append(record))
        manifest |= {"generator": config.generator, "model": config.model, "questions": config.questions}
        flat = [(split, abstract) for split in SPLITS for abstract in chosen[split]]
        rejected: Counter[str] = Counter()
        with atomic_folder(config.output, QUESTIONS) as folder:
            files = {split: SplitWriter(folder / f"{split}.parquet", SCHEMA, "question") for split in SPLITS}
            replies = _pairs(config, [abstract for _, abstract in flat], rejected)
            answered = 0
            for (split, abstract), pairs in zip(flat, replies, strict=True):
                answered += pairs is not None
                for number, (pair, kind) in enumerate(pairs or [], start=1):
                    files[split].add(_record(config, abstract, pair, kind, number))
            manifest["abstracts"] = {"asked": len(flat), "no_reply": len(flat) - answered}
            accepted = sum(file.records for file in files.values())
            if not accepted:
                reasons = ", ".join(f"{name} {count}" for name, count in rejected.items()) or "none was written"
                raise CompressorError(f"no question about {len(flat):,} abstracts was accepted ({reasons})")
            manifest["pairs"] = {"accepted": accepted, "rejected": dict(sorted(rejected.items()))}
            manifest["fields"] = SCHEMA.names
            manifest["splits"] = {split: file.close() for split, file in files.items() if file.records}
            write_json(folder / MANIFEST, manifest)
    return manifest


def _pairs(
    config: ArxivQAConfig, abstracts: list[dict[str, str]], rejected: Counter[str]
) -> Iterator[list[tuple[Pair, str]] | None]:
    """For each abstract in order its accepted pairs with their kinds; None if the model did not reply."""
    texts = [abstract["abstract"] for abstract in abstracts]
    if config.generator == "rules":
        for abstract in counted(abstracts, "asking", len(abstracts), "abstracts"):
            written = cloze_questions(abstract["abstract"], config.questions, abstract["id"])
            found = [(Pair(item.question, item.answer), item.kind) for item in written]
            yield _accepted(abstract["abstract"], found, config.questions, rejected)
        return
    asked = replies(config.endpoint, texts, config.questions)
    for text, reply in zip(texts, counted(asked, "asking", len(texts), "abstracts"), strict=True):
        pairs = [] if reply is None else read_pairs(reply)
        if not pairs and reply is not None:
            rejected["no_pairs" if pairs == [] else "broken_json"] += 1
        found = [(pair, "") for pair in pairs or []]
        yield None if reply is None else _accepted(text, found, config.questions, rejected)


def _accepted(
    abstract: str, pairs: list[tuple[Pair, str]], count: int, rejected: Counter[str]
) -> list[tuple[Pair, str]]:
    """The pairs that are accepted, with their kinds, at most `count`; the others are counted by reason."""
    accepted: list[tuple[Pair, str]] = []
    for pair, kind in pairs:
        found = check_pair(abstract, pair)
        if isinstance(found, str):
            rejected[found] += 1
        elif any(found.question.casefold() == other.question.casefold() for other, _ in accepted):
            rejected["duplicate"] += 1
        elif len(accepted) == count:
            rejected["more_than_asked"] += 1
        else:
            accepted.append((found, kind))
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
