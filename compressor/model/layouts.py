"""Position layouts: where memory tokens sit while encoding, and where the decoder starts.

n is the number of passage tokens (positions 0..n-1 in the encoder), k the number of memory tokens and m the most a
compressor has. Every layout gives the encoder's positions of the memory tokens, the positions their keys have in the
decoder's context, and the position of the decoder's first token.

| layout    | memory tokens                            | decoder starts at |
|-----------|------------------------------------------|-------------------|
| restart   | n, n+1, ... n+k-1                        | k (inside the passage: what the published code does) |
| published | the same, as if n were 500: the published code pads every passage to 500 tokens | k |
| after     | n, n+1, ... n+k-1                        | n+k               |
| front     | 0, 1, ... k-1                            | k (where input embeddings stand in for the passage) |
| spread    | the middles of k equal parts of 0..n-1   | n                 |
| overlay   | the middles of k equal parts of 0..n-1   | 0                 |
| nested    | the middles of m equal parts, in van der Corput order, first k of them | 0 |

Spreading follows EPL (arXiv 2409.14364); `nested` makes the first 1, 2, 4, 8, ... tokens evenly spread too, so that
a memory can be truncated.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compressor.model.config import Layout
from compressor.model.table import LAYOUTS, load

PUBLISHED_LENGTH = 500
"""Tokens that the published code pads every passage to."""


def van_der_corput(count: int) -> list[int]:
    """0..count-1 in bit-reversed order, for a power of two: 8 gives 0, 4, 2, 6, 1, 5, 3, 7."""
    order = [0]
    while len(order) < count:
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    # Doubling lists the reversed bits of 0..count-1 in order.
    return order


class Placing:
    """A layout: where memory tokens and what follows them stand. Subclasses say it."""

    def positions(self, lengths: Tensor, slots: Tensor, tokens: Tensor, most: int) -> Tensor:
        """See `memory_positions`; lengths and tokens are int64 `[batch, 1]`, slots 0, 1, ..., int64 `[1, slots]`."""
        raise NotImplementedError

    def start(self, lengths: Tensor, tokens: Tensor | int) -> Tensor:
        """See `decoder_start`; by default the decoder starts where the passage did."""
        return torch.zeros_like(lengths)

    def before(self, passage_tokens: int, memory_tokens: int) -> int:
        """Where a segment's positions begin after segments of so many tokens: where their passages end."""
        return passage_tokens


class Restart(Placing):
    """After the passage; the decoder starts as if the memory were all it had read."""

    def positions(self, lengths: Tensor, slots: Tensor, tokens: Tensor, most: int) -> Tensor:
        return lengths + slots

    def start(self, lengths: Tensor, tokens: Tensor | int) -> Tensor:
        return torch.zeros_like(lengths) + tokens


class Published(Restart):
    """`Restart` after 500 tokens."""

    def positions(self, lengths: Tensor, slots: Tensor, tokens: Tensor, most: int) -> Tensor:
        return (slots + PUBLISHED_LENGTH).expand(len(lengths), -1)


class After(Restart):
    """After the passage, and the decoder after them."""

    def start(self, lengths: Tensor, tokens: Tensor | int) -> Tensor:
        return lengths + tokens

    def before(self, passage_tokens: int, memory_tokens: int) -> int:
        return passage_tokens + memory_tokens


class Front(Restart):
    """In the passage's place, which then takes no positions of its own."""

    def positions(self, lengths: Tensor, slots: Tensor, tokens: Tensor, most: int) -> Tensor:
        return slots.expand(len(lengths), -1)

    def before(self, passage_tokens: int, memory_tokens: int) -> int:
        return memory_tokens


class Overlay(Placing):
    """In the middles of equal parts of the passage."""

    def positions(self, lengths: Tensor, slots: Tensor, tokens: Tensor, most: int) -> Tensor:
        return ((2 * slots + 1) * lengths // (2 * tokens)).clamp(max=lengths - 1)


class Spread(Overlay):
    """`Overlay`, and the decoder after the passage."""

    def start(self, lengths: Tensor, tokens: Tensor | int) -> Tensor:
        return lengths.clone()


class Nested(Placing):
    """In the middles of as many parts as there can be tokens, the first ones evenly spread too."""

    def positions(self, lengths: Tensor, slots: Tensor, tokens: Tensor, most: int) -> Tensor:
        order = torch.tensor(van_der_corput(most)[: slots.shape[1]], device=lengths.device)[None]
        return (2 * order + 1) * lengths // (2 * most)


@functools.cache
def placing(layout: Layout) -> Placing:
    """The layout of a name in `LAYOUTS`."""
    return load(LAYOUTS[layout].place, __package__ or "")()


def memory_positions(layout: Layout, lengths: Tensor, slots: int, most: int, tokens: Tensor | None = None) -> Tensor:
    """Positions of the memory tokens, in the encoder and in the decoder's context.

    Args:
        layout: name of the layout.
        lengths: passage tokens, int64 `[batch]`.
        slots: columns of the result; a row of fewer memory tokens does not use the last ones.
        most: memory tokens m that the compressor has; only `nested` depends on it.
        tokens: memory tokens k of each row, int64 `[batch]`; by default `slots`.

    Returns:
        int64 `[batch, slots]`.
    """
    tokens = torch.full_like(lengths, slots) if tokens is None else tokens
    columns = torch.arange(slots, device=lengths.device)[None]
    return placing(layout).positions(lengths[:, None], columns, tokens[:, None], most)


def decoder_start(layout: Layout, lengths: Tensor, tokens: Tensor | int) -> Tensor:
    """Position of the decoder's first token, int64 `[batch]`."""
    return placing(layout).start(lengths, tokens)


def tree_stretches(lengths: Tensor, tokens: int, most: int) -> tuple[Tensor, Tensor]:
    """The stretch of the passage that each memory token of the layout `nested` sees with a tree mask.

    Token i of level l (0 for the first, then 1; 2-3; 4-7; ...) stands for n / 2**l tokens from the beginning of its
    part on, the i-th in van der Corput order, so that each token covers half of what one of the level before does, and
    the first everything. n / 16 tokens, at least 2, on either side overlap with its neighbours'. What a token sees does
    not depend on how many there are.

    Args:
        lengths: passage tokens n, int64 `[batch]`.
        tokens: memory tokens k.
        most: memory tokens m that the compressor has.

    Returns:
        First token and the end (one past the last), int64 `[batch, k]` each; not cut to the passage.
    """
    n = lengths[:, None]
    order = torch.tensor(van_der_corput(most)[:tokens], device=lengths.device)[None]
    parts = torch.tensor([1 << i.bit_length() for i in range(tokens)], device=lengths.device)[None]
    overlap = (n // 16).clamp(min=2)
    first = order * n // most
    return first - overlap, first + -(-n // parts) + overlap


def part_stretches(lengths: Tensor, slots: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The stretch of the passage that each memory token of the layouts `overlay` and `spread` sees with `parts`.

    The i-th of k tokens is for the i-th of k equal parts, in whose middle it stands, and sees half as much again, at
    least 2 tokens, on either side. So tokens do the same whatever k is: each writes the n / k tokens around it.

    Args:
        lengths: passage tokens n, int64 `[batch]`.
        slots: columns of the result.
        tokens: memory tokens k of each row, int64 `[batch]`.

    Returns:
        First token and the end (one past the last), int64 `[batch, slots]` each; not cut to the passage.
    """
    n, k, i = lengths[:, None], tokens[:, None], torch.arange(slots, device=lengths.device)[None]
    overlap = (-(-n // (2 * k))).clamp(min=2)
    return i * n // k - overlap, -(-(i + 1) * n // k) + overlap
