"""Tokenised passages, and the plan of which passage goes into which micro-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from compressor.data.batches import ROUND, Rounds
from compressor.data.config import DataConfig
from compressor.data.left_out import LeftOut
from compressor.data.prompts import tokenise
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.processes import bars_on_terminals

DIGESTED = 20_000
"""Records whose tokens a digest reads at least, where there are so many."""


class Piece(NamedTuple):
    """A stretch of a record: tokens `start .. start + length - 1`."""

    record: int
    start: int
    length: int


def load_passages(
    sources: Sequence[str],
    tokenizer: Any,
    split: str | None = None,
    field: str | None = None,
    limit: int | None = None,
    workers: int = 1,
    skip_bad_records: bool = False,
    left_out: LeftOut | None = None,
) -> Dataset:
    """Tokenise passages, in parallel and cached by `datasets` on disk, from where they are memory-mapped.

    Args:
        sources: corpus folders, files or hub ids (`load_texts`).
        split: the split of those that have several.
        skip_bad_records, left_out: see `load_texts`.

    Returns:
        A data set with `id`, `input_ids` (no special tokens) and `tokens` (their number).
    """
    texts = load_texts(
        sources, split=split, field=field, limit=limit, skip_bad_records=skip_bad_records, left_out=left_out
    ).select_columns(["id", "text"])

    def tokenised(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenise(tokenizer, batch["text"])
        return {"id": batch["id"], "input_ids": ids, "tokens": [len(one) for one in ids]}

    with bars_on_terminals():
        return texts.map(
            tokenised,
            batched=True,
            num_proc=workers if workers > 1 else None,
            remove_columns=texts.column_names,
            desc="tokenising",
        )


def passages_digest(passages: Dataset) -> str:
    """Number of records, and a hash over their token counts and the tokens of evenly spaced ones (at least 20,000)."""
    found = hashlib.sha256(np.asarray(passages["tokens"], dtype=np.int64).tobytes())
    chosen = passages.select(range(0, len(passages), max(1, len(passages) // DIGESTED)))
    for batch in chosen.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
        found.update(batch["input_ids"].combine_chunks().flatten().to_numpy().astype(np.int64).tobytes())
    return f"{len(passages):,} records {found.hexdigest()[:16]}"


class BatchPlan(Rounds[Piece]):
    """Which pieces make up micro-batch 0, 1, 2, ...: a pure function of data, configuration and seed.

    A length is drawn from the configured mixture, then a record among those that are long enough, so that the mixture
    of lengths is what the configuration says whatever the corpus. Micro-batches are made by `Rounds`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        data: DataConfig,
        batch_tokens: int,
        batch_passages: int,
        seed: int,
        source: str = "data.train",
    ):
        """`lengths` is the number of tokens of each record, int `[records]`; `source` names them in messages."""
        if not len(lengths) or int(lengths.max()) < 1:
            raise CompressorError("there is no passage with at least one token to train on")
        longest, least = int(lengths.max()), min(share.low for share in data.lengths)
        if longest < least:
            raise CompressorError(
                f"none of the {len(lengths):,} passages of {source} is as long as data.lengths asks for: the longest "
                f"has {longest} tokens, the shortest range begins at {least}. Give longer passages or shorter ranges"
            )
        self.order = np.argsort(lengths, kind="stable")
        self.sorted = lengths[self.order]
        super().__init__(batch_tokens, batch_passages, seed)
        self.data = data

    def draw(self, rng: np.random.Generator, count: int) -> list[Piece]:
        """`count` pieces at random."""
        weights = np.array([share.weight for share in self.data.lengths])
        kind = rng.choice(len(weights), size=count, p=weights / weights.sum())
        low = np.array([share.low for share in self.data.lengths])[kind]
        high = np.array([share.high for share in self.data.lengths])[kind]
        wanted = np.minimum(rng.integers(low, high + 1), self.sorted[-1])
        first = np.searchsorted(self.sorted, wanted)
        place = first + (rng.random(count) * (len(self.sorted) - first)).astype(np.int64)
        spare = self.sorted[place] - wanted
        start = np.where(
            rng.random(count) < self.data.random_start, (rng.random(count) * (spare + 1)).astype(np.int64), 0
        )
        columns = (self.order[place].tolist(), start.tolist(), wanted.tolist())
        return [Piece(*row) for row in zip(*columns, strict=True)]

    def draw_round(self, rng: np.random.Generator, number: int) -> list[Piece]:
        return self.draw(rng, ROUND)
