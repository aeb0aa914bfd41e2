"""`optimise`: gradient descent on the memory of each text, the ceiling of what k slots can hold (arXiv 2502.13063).

Cramming optimises input embeddings; here the keys and values of every layer are, which is what a compressor makes.
Far too slow for anything but a few passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from compressor.base import Base
from compressor.memory import Memory, Prefix, Segment, memory_prefix
from compressor.methods.interface import BF16, Piece, memory_reach, token_prefix
from compressor.methods.registry import MethodSettings
from compressor.refinement import refine

LONGEST = 500


class Optimise:
    """The memory that makes the base most likely to write the passage, refined from a start of random vectors.

    Args:
        base: without adapters.
        steps: gradient steps of `compressor/refinement.py`.
        batch_size: passages optimised together, each on its own.
    """

    name = "optimise"
    sized = True
    most: int | None = None

    def __init__(self, base: Base, steps: int = 200, batch_size: int = 16, seed: int = 0):
        self.base, self.steps, self.batch_size, self.seed = base, steps, batch_size, seed

    @classmethod
    def from_settings(cls, base: Base, settings: MethodSettings) -> Optimise:
        return cls(base, settings.optimise_steps, seed=settings.seed)

    def sizes(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens)

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """See `Method.compress`: passages over 500 tokens are held in segments."""
        sizes = []
        for count in tokens:
            cut = [[ids[start : start + LONGEST] for start in range(0, len(ids), LONGEST)] for ids in passages]
            flat = [segment for segments in cut for segment in segments]
            memories: list[Memory] = []
            for start in range(0, len(flat), self.batch_size):
                memories += self.memories(flat[start : start + self.batch_size], count)
            pieces = iter(
                Piece(ids, memory, count, (memory.keys.numel() + memory.values.numel()) * BF16)
                for ids, memory in zip(flat, memories, strict=True)
            )
            sizes.append([[next(pieces) for _ in segments] for segments in cut])
        return sizes

    def memories(self, passages: Sequence[list[int]], tokens: int) -> list[Memory]:
        """Optimised memories of passages of at most 500 tokens, layout `spread`."""
        base = self.base
        generator = torch.Generator().manual_seed(self.seed)
        # One draw for all: what a passage ends at must not depend on its place in a batch.
        noise = torch.randn((2, base.layers, base.kv_heads, tokens, base.head_size), generator=generator)
        read = token_prefix(base, passages)
        starts = []
        for row, ids in enumerate(passages):
            # As wide as the keys and values of the passage itself are.
            kinds = (
                torch.stack([layer[row, :, : len(ids) + 1] for layer in kind]) for kind in (read.keys, read.values)
            )
            spread = torch.stack([kind.float().flatten(1).std(1) for kind in kinds]).cpu()
            keys, values = (noise * spread[:, :, None, None, None]).to(base.device, base.dtype)
            segment = Segment(tokens, len(ids))
            starts.append(Memory(keys, values, (segment,), "spread", tokens, base.fingerprint))
        return refine(base, starts, passages, self.steps, self.batch_size)

    def prefix(self, rows: Sequence[Sequence[Piece]]) -> Prefix:
        return memory_prefix(self.base, [Memory.concatenate([piece.held for piece in row]) for row in rows])

    def reach(self, pieces: Sequence[Piece]) -> int:
        return memory_reach(pieces)

    def decoding(self) -> AbstractContextManager[None]:
        return nullcontext()
