"""Training targets and losses: what the decoder must write, and that batches add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compressor.api import Compressor
from compressor.data.batches import CUED, IGNORED, continuation_pair, cued_pair, pad, regeneration_pair, stack_pairs
from compressor.model.decoder import score
from compressor.model.memory import memory_prefix

PASSAGES = [[(7 * i + j) % 400 + 5 for i in range(n)] for j, n in enumerate((30, 9, 17))]
FOLLOWING = [[31, 32, 33], [34], [35, 36]]


def batch_of(
    model: Compressor, passages: list[list[int]], tokens: list[int], following: list[list[int]] | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> dict[str, Any]:  # fmt: skip
    ids, lengths = pad(passages)
    batch: dict[str, Any] = {"input_ids": ids, "lengths": lengths, "memory_tokens": torch.tensor(tokens)}
    pairs = {"regeneration": [regeneration_pair(model.base.bos, model.base.eos, one) for one in passages]}
    if following is not None:
        pairs["continuation"] = [
            continuation_pair(one[-1], rest) for one, rest in zip(passages, following, strict=True)
        ]
    for (name, rows), weight in zip(pairs.items(), weights, strict=False):
        stacked = stack_pairs(rows)
        batch |= {f"{name}_inputs": stacked["inputs"], f"{name}_labels": stacked["labels"], f"{name}_weight": weight}
    return batch


def test_pairs_are_what_the_decoder_reads_and_must_write() -> None:
    assert regeneration_pair(1, 2, [7, 8, 9]) == ([1, 7, 8, 9], [7, 8, 9, 2])
    assert continuation_pair(9, [20, 21]) == ([9, 20], [20, 21])
    assert continuation_pair(9, [20]) == ([9], [20])


def test_a_cue_goes_on_as_the_passage_does() -> None:
    rng, ends = np.random.default_rng(5), 0
    for length in (1, 2, 5, 30, 200):
        passage = list(range(100, 100 + length))
        for _ in range(40):
            inputs, labels = cued_pair(rng, 2, passage)
            place = inputs[0] - 100
            cue = labels.count(IGNORED) + 1
            assert inputs == passage[place : place + len(inputs)]
            assert len(inputs) == len(labels) <= 8 + CUED
            assert labels[cue - 1 :] == [*passage, 2][place + cue : place + len(inputs) + 1]
            assert cue <= max(1, length // 2)
            assert length < 16 or cue >= 4
            ends += labels[-1] == 2
    assert ends > 40


def test_stacked_pairs_count_their_targets_and_ignore_padding() -> None:
    stacked = stack_pairs([regeneration_pair(1, 2, [7, 8, 9]), regeneration_pair(1, 2, [5])])
    assert stacked["inputs"].tolist() == [[1, 7, 8, 9, 0, 0, 0, 0], [1, 5, 0, 0, 0, 0, 0, 0]]
    assert stacked["labels"].tolist() == [[7, 8, 9, 2, *[IGNORED] * 4], [5, 2, *[IGNORED] * 6]]
    assert stacked["targets"] == 6


@pytest.mark.parametrize("layout", ["nested", "after", "spread"])
def test_the_loss_is_the_cost_of_the_passage_under_its_stored_memory(
    make_tiny_compressor: Callable[..., Compressor], layout: str
) -> None:
    # What training minimises is what a decoder later pays, through the stored and replaced memory.
    model = make_tiny_compressor(layout=layout)
    counts = [8, 8, 8] if layout == "spread" else [8, 2, 1]
    with torch.no_grad():
        trained = float(model(batch_of(model, PASSAGES, counts)))
    cost = 0.0
    for passage, count in zip(PASSAGES, counts, strict=True):
        memory = model.compress_ids([passage], count)[0]
        scores = score(
            model.base, memory_prefix(model.base, [memory]), [[model.base.bos]], [[*passage, model.base.eos]]
        )
        cost -= float(scores[0][:, 0].sum())
    assert trained == pytest.approx(cost, rel=1e-4)


def test_a_batch_is_the_sum_of_its_passages_and_of_its_weighted_objectives(tiny_compressor: Compressor) -> None:
    model = tiny_compressor
    counts = [8, 4, 1]

    def value(*arguments: Any, **options: Any) -> float:
        with torch.no_grad():
            return float(model(batch_of(model, *arguments, **options)))

    both = value(PASSAGES, counts, FOLLOWING, weights=(1.0, 1.0))
    alone = sum(value([p], [k], [f], weights=(1.0, 1.0)) for p, k, f in zip(PASSAGES, counts, FOLLOWING, strict=True))
    assert both == pytest.approx(alone, rel=1e-4)
    regeneration = value(PASSAGES, counts)
    assert value(PASSAGES, counts, FOLLOWING, weights=(1.0, 0.0)) == pytest.approx(regeneration, rel=1e-4)
    assert value(PASSAGES, counts, FOLLOWING, weights=(0.5, 2.0)) == pytest.approx(
        0.5 * regeneration + 2.0 * (both - regeneration), rel=1e-4
    )


def test_a_rows_memory_does_not_leak_into_another_row(tiny_compressor: Compressor) -> None:
    model = tiny_compressor
    batch = batch_of(model, PASSAGES, [8, 8, 8])
    labels = batch["regeneration_labels"].clone()
    batch["regeneration_labels"] = torch.full_like(labels, IGNORED)
    batch["regeneration_labels"][1] = labels[1]
    with torch.no_grad():
        one = float(model(batch))
        batch["input_ids"][0] = 3
        batch["regeneration_inputs"][2] = 4
        assert float(model(batch)) == pytest.approx(one, rel=1e-5)
        batch["input_ids"][1, 4] = 3
        assert abs(float(model(batch)) - one) > 1e-4


def test_fewer_tokens_leave_the_rest_of_the_memory_without_gradient(tiny_compressor: Compressor) -> None:
    tiny_compressor(batch_of(tiny_compressor, PASSAGES, [2, 2, 1])).backward()
    gradient = tiny_compressor.encoder.memory_embeddings.grad
    assert gradient is not None
    assert bool((gradient[:2].abs().sum(1) > 0).all())
    assert bool((gradient[2:] == 0).all())
