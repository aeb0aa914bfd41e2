"""Positions of memory tokens and of the decoder's start, layout by layout."""

from __future__ import annotations

import pytest
import torch

from compressor.model.config import Layout
from compressor.model.layouts import decoder_start, memory_positions, part_stretches, tree_stretches, van_der_corput
from compressor.model.table import LAYOUTS

N, K, M = 32, 4, 8
EXPECTED = {
    "restart": ([32, 33, 34, 35], 4),
    "published": ([500, 501, 502, 503], 4),
    "after": ([32, 33, 34, 35], 36),
    "front": ([0, 1, 2, 3], 4),
    "spread": ([4, 12, 20, 28], 32),
    "overlay": ([4, 12, 20, 28], 0),
    "nested": ([2, 18, 10, 26], 0),  # middles of 8 parts are 2, 6, ... 30, taken in the order 0, 4, 2, 6
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_as_documented(layout: Layout) -> None:
    positions, start = EXPECTED[layout]
    lengths = torch.tensor([N])
    assert memory_positions(layout, lengths, K, M).tolist() == [positions]
    assert decoder_start(layout, lengths, K).tolist() == [start]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_batch_are_independent_and_whole_numbers(layout: Layout) -> None:
    lengths = torch.tensor([1, 2, 7, 100, 500])
    together = memory_positions(layout, lengths, 8, 16)
    assert together.dtype == torch.int64
    for row, n in enumerate(lengths):
        assert torch.equal(together[row], memory_positions(layout, n[None], 8, 16)[0])
    each = torch.tensor([1, 2, 3, 5, 8])
    mixed = memory_positions(layout, lengths, 8, 8, each)
    for row, (n, k) in enumerate(zip(lengths, each.tolist(), strict=True)):
        assert torch.equal(mixed[row, :k], memory_positions(layout, n[None], k, 8)[0])
    assert decoder_start(layout, lengths, 8).shape == (5,)
    per_row = decoder_start(layout, lengths, torch.tensor([1, 2, 3, 4, 5]))
    for row, k in enumerate([1, 2, 3, 4, 5]):
        assert per_row[row] == decoder_start(layout, lengths[row : row + 1], k)[0]


@pytest.mark.parametrize("layout", ["spread", "overlay", "nested"])
def test_spread_layouts_stay_inside_the_passage(layout: Layout) -> None:
    for n in (1, 2, 3, 15, 16, 17, 500):
        positions = memory_positions(layout, torch.tensor([n]), 16, 16)
        assert 0 <= int(positions.min()) <= int(positions.max()) < n


def test_van_der_corput_reverses_bits() -> None:
    assert van_der_corput(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    for count in (1, 2, 4, 16, 64):
        bits = count.bit_length() - 1
        assert van_der_corput(count) == [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(count)]


@pytest.mark.parametrize("first", [1, 2, 4, 8, 16])
def test_the_first_tokens_of_nested_are_evenly_spread(first: int) -> None:
    places = sorted(memory_positions("nested", torch.tensor([320]), 16, 16)[0, :first].tolist())
    gaps = {b - a for a, b in zip(places, [*places[1:], places[0] + 320], strict=True)}
    assert gaps == {320 // first}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_truncatable_layouts_keep_positions_when_tokens_are_left_out(layout: Layout) -> None:
    lengths = torch.tensor([37, 200])
    kept = torch.equal(memory_positions(layout, lengths, 8, 8)[:, :2], memory_positions(layout, lengths, 2, 8))
    assert kept == LAYOUTS[layout].truncatable


def test_a_tree_mask_halves_what_each_level_sees_and_leaves_nothing_out() -> None:
    lengths = torch.tensor([500, 96, 17, 1])
    first, end = tree_stretches(lengths, 16, 16)
    for row, n in enumerate(lengths.tolist()):
        overlap = max(2, n // 16)
        sizes = (end - first)[row].tolist()
        assert sizes == [-(-n // (1 << i.bit_length())) + 2 * overlap for i in range(16)]
        # The tokens of each level that is whole, and those before it, cover the passage.
        for whole in (1, 2, 4, 8, 16):
            seen = {
                x
                for a, b in zip(first[row, :whole].tolist(), end[row, :whole].tolist(), strict=True)
                for x in range(a, b)
            }
            assert set(range(n)) <= seen
    # What a token sees does not depend on how many there are: truncation stays exact.
    for tokens in (1, 4, 7):
        fewer = tree_stretches(lengths, tokens, 16)
        assert torch.equal(fewer[0], first[:, :tokens])
        assert torch.equal(fewer[1], end[:, :tokens])


def test_parts_are_around_their_tokens_and_leave_nothing_out() -> None:
    lengths, tokens = torch.tensor([500, 96, 17, 1, 48]), torch.tensor([16, 4, 3, 8, 16])
    first, end = part_stretches(lengths, 16, tokens)
    places = memory_positions("overlay", lengths, 16, 16, tokens)
    for row, (n, k) in enumerate(zip(lengths.tolist(), tokens.tolist(), strict=True)):
        beside = max(2, -(-n // (2 * k)))
        for i in range(k):
            part = range(i * n // k, -(-(i + 1) * n // k))
            assert (first[row, i], end[row, i]) == (part.start - beside, part.stop + beside)
            assert places[row, i] in part
        seen = {x for a, b in zip(first[row, :k].tolist(), end[row, :k].tolist(), strict=True) for x in range(a, b)}
        assert set(range(n)) <= seen
        # As alone, whatever other rows have.
        alone = part_stretches(lengths[row : row + 1], k, tokens[row : row + 1])
        assert torch.equal(alone[0][0], first[row, :k])
        assert torch.equal(alone[1][0], end[row, :k])
