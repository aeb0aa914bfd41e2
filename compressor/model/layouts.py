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

import torch
from torch import Tensor

from compressor.model.config import Layout

PUBLISHED_LENGTH = 500
"""Tokens that the published code pads every passage to."""
TRUNCATABLE: tuple[Layout, ...] = ("restart", "published", "after", "front", "nested")
"""Layouts in which a memory token's position does not depend on how many follow it."""


def van_der_corput(count: int) -> list[int]:
    """0..count-1 in bit-reversed order, for a power of two: 8 gives 0, 4, 2, 6, 1, 5, 3, 7."""
    order = [0]
    while len(order) < count:
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    # Doubling lists the reversed bits of 0..count-1 in order.
    return order


def memory_positions(layout: Layout, lengths: Tensor, tokens: int, most: int) -> Tensor:
    """Positions of the memory tokens, in the encoder and in the decoder's context.

    Args:
        layout: name of the layout.
        lengths: passage tokens, int64 `[batch]`.
        tokens: memory tokens k.
        most: memory tokens m that the compressor has; only `nested` depends on it.

    Returns:
        int64 `[batch, k]`.
    """
    n = lengths[:, None]
    slots = torch.arange(tokens, device=lengths.device)[None]
    if layout in ("restart", "after"):
        return n + slots
    if layout in ("front", "published"):
        first = PUBLISHED_LENGTH if layout == "published" else 0
        return (slots + first).expand(len(lengths), -1)
    if layout in ("spread", "overlay"):
        return (2 * slots + 1) * n // (2 * tokens)
    order = torch.tensor(van_der_corput(most)[:tokens], device=lengths.device)[None]
    return (2 * order + 1) * n // (2 * most)


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


def decoder_start(layout: Layout, lengths: Tensor, tokens: Tensor | int) -> Tensor:
    """Position of the decoder's first token, int64 `[batch]`."""
    if layout in ("restart", "published", "front"):
        return torch.zeros_like(lengths) + tokens
    if layout == "after":
        return lengths + tokens
    if layout == "spread":
        return lengths.clone()
    return torch.zeros_like(lengths)
