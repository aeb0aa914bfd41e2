"""How a passage becomes what a decoder starts from: the side of an evaluation that compression methods differ in.

Tasks see `Method` alone, so that every method is measured by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from compressor.base import Base
from compressor.errors import CompressorError
from compressor.layouts import TRUNCATABLE
from compressor.memory import Memory, Prefix, memory_prefix
from compressor.model import Compressor

BF16 = 2
"""Bytes of one bfloat16 value."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a passage, and what a method made of it."""

    ids: list[int]
    """Tokens of the stretch."""
    held: Any
    """What `Method.prefix` reads."""
    tokens: int
    """Positions of the decoder's context it takes."""
    nbytes: int
    """Bytes to hold it; keys and values count as bfloat16 whatever type they are computed in."""


class Method(Protocol):
    """A way of giving a decoder a passage."""

    name: str
    base: Base
    most: int | None
    """Most memory tokens, None where there is no limit."""

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """The passages at every size: pieces in reading order for each of `tokens` and each passage."""

    def prefix(self, pieces: Sequence[Piece]) -> Prefix:
        """A batch of decoder contexts, one row a piece."""

    def decoding(self) -> AbstractContextManager[None]:
        """The state the base must be in while it decodes after `prefix`."""


class MemoryMethod:
    """The compressor's own: a passage becomes the keys and values of memory tokens.

    Args:
        compressor: in evaluation mode.
        batch_size: segments encoded together.
    """

    name = "memory"

    def __init__(self, compressor: Compressor, batch_size: int = 16):
        self.compressor, self.batch_size = compressor, batch_size
        self.base = compressor.base
        self.most: int | None = compressor.config.memory_tokens

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """Each passage is encoded once and cut to the smaller sizes, if the layout allows it."""
        if self.compressor.config.layout in TRUNCATABLE:
            largest = self.compressor.compress_ids(passages, max(tokens), self.batch_size)
            sizes = [[memory.truncate(count) for memory in largest] for count in tokens]
        else:
            sizes = [self.compressor.compress_ids(passages, count, self.batch_size) for count in tokens]
        return [
            [self._pieces(ids, memory) for ids, memory in zip(passages, memories, strict=True)] for memories in sizes
        ]

    def _pieces(self, ids: list[int], memory: Memory) -> list[Piece]:
        pieces, start = [], 0
        for part in memory.split():
            nbytes = (part.keys.numel() + part.values.numel()) * BF16
            pieces.append(Piece(ids[start : start + part.passage_tokens], part, part.tokens, nbytes))
            start += part.passage_tokens
        return pieces

    def prefix(self, pieces: Sequence[Piece]) -> Prefix:
        return memory_prefix(self.base, [piece.held for piece in pieces])

    def decoding(self) -> AbstractContextManager[None]:
        return self.compressor.adapters(on=False)


def check_tokens(tokens: Sequence[int], most: int | None, checkpoint: str) -> None:
    """Raise a `CompressorError` if a method does not have so many memory tokens."""
    if most is not None and max(tokens) > most:
        raise CompressorError(
            f"tokens = {max(tokens)} is more than the {most} memory tokens of {checkpoint}: "
            f"ask for 1 to {most}, or train a compressor with more"
        )
