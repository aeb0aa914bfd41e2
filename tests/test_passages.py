"""Tokenised passages, and which piece of which goes into which micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.data.batches import BatchPlan, Piece
from compressor.data.config import DataConfig, LengthRange
from compressor.data.records import load_passages
from compressor.errors import CompressorError

RECORDS = np.array([5, 40, 200, 17, 90, 300, 64, 0, 33, 120])


def plan(
    records: np.ndarray = RECORDS, tokens: int = 512, passages: int = 16, seed: int = 0, **settings: Any
) -> BatchPlan:
    settings = {"lengths": [LengthRange(4, 120)]} | settings
    return BatchPlan(records, DataConfig(**settings), tokens, passages, seed)


def many(source: BatchPlan, count: int = 400) -> list[list[Piece]]:
    return [source.batch(index) for index in range(count)]


def test_pieces_lie_inside_their_records_and_lengths_in_the_mixture() -> None:
    for batch in many(plan(random_start=0.5)):
        for piece in batch:
            assert piece.start >= 0
            assert piece.start + piece.length <= RECORDS[piece.record]
            assert 4 <= piece.length <= 120


def test_batches_keep_both_limits_and_waste_little_on_padding() -> None:
    batches = many(plan())
    for batch in batches:
        assert len(batch) <= 16
        assert len(batch) * max(piece.length for piece in batch) <= 512
    padded = sum(len(batch) * max(piece.length for piece in batch) for batch in batches)
    assert sum(piece.length for batch in batches for piece in batch) > 0.9 * padded


def test_a_piece_longer_than_the_limit_is_a_batch_of_its_own() -> None:
    for batch in many(plan(np.array([64, 80]), tokens=20), 50):
        assert len(batch) == 1 or max(piece.length for piece in batch) * len(batch) <= 20


def test_batches_are_a_function_of_index_and_seed_alone() -> None:
    forward = many(plan())
    source = plan()
    backward = [source.batch(index) for index in reversed(range(400))][::-1]
    assert forward == backward
    assert plan().batch(399) == forward[399]  # as a resumed run asks for it
    assert many(plan(seed=1), 5) != forward[:5]


def test_a_mixture_of_lengths_is_kept_whatever_the_corpus() -> None:
    shares = [LengthRange(8, 8, 3.0), LengthRange(100, 100, 1.0)]
    # Nine short records in ten: the long share must still come from the long ones.
    records = np.array([10] * 90 + [150] * 10)
    lengths = [piece.length for batch in many(plan(records, lengths=shares), 600) for piece in batch]
    assert set(lengths) == {8, 100}
    assert 0.7 < lengths.count(8) / len(lengths) < 0.8


def test_longer_lengths_than_any_record_are_cut_to_the_longest() -> None:
    pieces = [piece for batch in many(plan(np.array([20, 30])), 30) for piece in batch]
    assert max(piece.length for piece in pieces) == 30


def test_random_starts_are_the_share_that_was_asked_for() -> None:
    records = np.array([10_000] * 5)
    for share in (0.0, 0.25, 1.0):
        pieces = [piece for batch in many(plan(records, random_start=share), 300) for piece in batch]
        moved = sum(piece.start > 0 for piece in pieces) / len(pieces)
        assert moved == pytest.approx(share, abs=0.04)


def test_nothing_to_train_on_is_refused() -> None:
    for lengths in (np.array([], dtype=np.int64), np.array([0, 0])):
        with pytest.raises(CompressorError, match="no passage with at least one token"):
            plan(lengths)


def test_lengths_that_no_passage_has_are_refused() -> None:
    """They were clamped to the longest passage, under a line that said that the passages are not used."""
    ranges = [LengthRange(16, 32), LengthRange(64, 96)]
    with pytest.raises(CompressorError, match=r"none of the 2 .* of data\.train .* has 9 tokens, .* begins at 16"):
        plan(np.array([3, 9]), lengths=ranges)
    assert all(piece.length == 16 for batch in many(plan(np.array([3, 16]), lengths=ranges), 9) for piece in batch)


def test_passages_are_tokenised_without_special_tokens(tiny_base: Any, tmp_path: Path) -> None:
    texts = ["One passage.", "Digits 1234 and ünïcode ∑.", "third"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    passages = load_passages([str(path)], tiny_base.tokenizer)
    assert list(passages["id"]) == ["r0", "r1", "r2"]
    assert [tiny_base.tokenizer.decode(ids) for ids in passages["input_ids"]] == texts
    assert list(passages["tokens"]) == [len(ids) for ids in passages["input_ids"]]
    assert len(load_passages([str(path)], tiny_base.tokenizer, limit=2)) == 2
    both = load_passages([str(path), str(path)], tiny_base.tokenizer)
    assert len(both) == 6
