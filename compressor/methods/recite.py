"""`recite`: the passage is written back from its memory first, and the decoder reads that text instead of the memory.

Reciting what is known before answering from it, as in Recitation-Augmented Language Models (arXiv 2210.01296). What is
kept and sent is the memory; what the decoder holds while it answers is as long as the passage, and writing it takes a
step a token. Segments are written back apart, so long passages read as well as short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressor.errors import CompressorError
from compressor.methods.interface import MemoryMethod, Piece, ReadsTokens
from compressor.model.base import Base
from compressor.model.cartridge import cartridge_of, text_prefix
from compressor.model.decoder import Prefix
from compressor.model.generation import regenerate
from compressor.model.memory import Memory


class Recite(ReadsTokens, MemoryMethod):
    """A trained method whose memories are read as the texts that they regenerate."""

    name = "recite"

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """See `Method.compress`: pieces hold what was written back, and count the memories' bytes."""
        sizes = super().compress(passages, tokens)
        return [self._recited(rows) for rows in sizes]

    def _recited(self, rows: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
        written = iter(recite(self.base, [piece.held for row in rows for piece in row], self.batch_size))
        return [[Piece(piece.ids, ids := next(written), len(ids), piece.nbytes) for piece in row] for row in rows]


class ReciteTuned(Recite):
    """The same texts after the base's cartridge, as `full-tuned` reads the passage: fair where the base chats."""

    name = "recite-tuned"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cartridge = cartridge_of(self.base)
        if cartridge is None:
            raise CompressorError(
                f"recite-tuned reads texts after a trained prefix, and none ships for {self.base.name}: leave it "
                "out, or train full-tuned on this base and evaluate that (configs/smollm2-135m/tuned.yaml)"
            )
        self.before = len(cartridge)

    def prefix(self, rows: Sequence[Sequence[Piece]]) -> Prefix:
        return text_prefix(self.base, [[token for piece in row for token in piece.held] for row in rows])

    def reach(self, pieces: Sequence[Piece]) -> int:
        return self.before + super().reach(pieces)


def recite(base: Base, memories: Sequence[Memory], batch_size: int = 16) -> list[list[int]]:
    """Token ids of the texts that memories regenerate, greedily."""
    return base.tokenise(regenerate(base, memories, batch_size=batch_size))


def recited_prefix(base: Base, memories: Sequence[Memory]) -> Prefix:
    """What the decoder reads instead of the memories: each memory's text, as `text_prefix` has it."""
    return text_prefix(base, recite(base, memories))
