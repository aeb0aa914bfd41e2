"""What every method of compression is to an evaluation, trained or not: `Method`, from passages to decoder prefixes.

Tasks see `Method` alone, so that every method is measured by the same code and decoded by `model/generation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.decoder import Prefix, token_prefix
from compressor.model.memory import Memory, memory_prefix
from compressor.model.network import Network
from compressor.model.refinement import KEEP, random_start, refine

BF16 = 2
"""Bytes of one bfloat16 value."""


@dataclass(frozen=True)
class MethodSettings:
    """What methods without a checkpoint can be told."""

    summariser: str | None = None
    """Folder or hub id of a seq2seq summariser; by default sentences are extracted."""
    llmlingua: str = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
    """Folder or hub id of LLMLingua-2's token classifier."""


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
    """Bytes to hold it: UTF-8 of a text; keys and values, or input embeddings, as bfloat16 whatever they are computed
    in."""


class Method(Protocol):
    """A way of giving a decoder a passage."""

    name: str
    base: Base
    sized: bool
    """Whether it compresses to a number of tokens that the user chooses."""
    most: int | None
    """Most tokens of a piece, None where there is no limit."""

    def sizes(self, tokens: Sequence[int]) -> list[int]:
        """Those of the sizes that it can compress to."""

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """The passages at every size: pieces in reading order for each of `tokens` and each passage.

        A method that is not `sized` is asked for one size, which means nothing to it.
        """

    def prefix(self, rows: Sequence[Sequence[Piece]]) -> Prefix:
        """A batch of decoder contexts; the pieces of a row (of one passage) follow each other."""

    def reach(self, pieces: Sequence[Piece]) -> int:
        """Position of the decoder's first token after a row of `prefix`."""


class MemoryMethod:
    """A trained method: a passage becomes a `Memory`.

    Args:
        compressor: in evaluation mode.
        batch_size: segments encoded together.
        segment_tokens: most tokens of a segment; by default as many as the compressor takes, so that k is of a passage.
        refine_steps: gradient steps on each memory (`compressor/model/refinement.py`).
        refine_from: `random` starts them from random vectors instead of the encoder's memory.
        refine_keep: weight of what the memories answered before, of which random vectors have nothing.
    """

    sized = True

    name = ""

    def __init__(
        self,
        compressor: Network,
        batch_size: int = 16,
        segment_tokens: int | None = None,
        refine_steps: int = 0,
        refine_from: str = "encoder",
        refine_keep: float = KEEP,
    ):
        self.compressor, self.batch_size = compressor, batch_size
        self.segment_tokens = compressor.longest_segment(segment_tokens or compressor.config.max_passage_tokens)
        self.refine_steps, self.refine_from = refine_steps, refine_from
        self.refine_keep = refine_keep if refine_from == "encoder" else 0.0
        self.name = self.name or compressor.config.method
        self.base = compressor.base
        self.most: int | None = compressor.config.memory_tokens

    def sizes(self, tokens: Sequence[int]) -> list[int]:
        return [count for count in tokens if self.compressor.encoder.trained_for(count)]

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """Each passage is encoded once and cut to the smaller sizes, if the method allows it."""
        if self.compressor.encoder.truncatable:
            largest = self._memories(passages, max(tokens))
            sizes = [[memory.truncate(count) for memory in largest] for count in tokens]
        else:
            sizes = [self._memories(passages, count) for count in tokens]
        if self.refine_from == "random":
            sizes = [[random_start(memory) for memory in one] for one in sizes]
        if steps := self.refine_steps:
            sizes = [refine(self.base, one, passages, steps, self.batch_size, keep=self.refine_keep) for one in sizes]
        return [
            [self._pieces(ids, memory) for ids, memory in zip(passages, memories, strict=True)] for memories in sizes
        ]

    def _memories(self, passages: Sequence[list[int]], tokens: int) -> list[Memory]:
        return self.compressor.compress_ids(passages, tokens, self.batch_size, self.segment_tokens)

    def _pieces(self, ids: list[int], memory: Memory) -> list[Piece]:
        pieces = []
        for part, segment in memory.split_with(ids):
            # Refined are keys and values, whatever the method computed them from.
            encoder = self.compressor.encoder
            values = part.keys.numel() + part.values.numel() if self.refine_steps else 0
            nbytes = BF16 * (values or part.tokens * encoder.values_per_token(self.base))
            pieces.append(Piece(list(segment), part, part.tokens, nbytes))
        return pieces

    def prefix(self, rows: Sequence[Sequence[Piece]]) -> Prefix:
        return memory_prefix(self.base, [Memory.concatenate([piece.held for piece in row]) for row in rows])

    @torch.no_grad()
    def reach(self, pieces: Sequence[Piece]) -> int:
        return int(Memory.concatenate([piece.held for piece in pieces]).positions()[1])


class ReadsTokens:
    """What the decoder reads of pieces that hold token ids: these after BOS, as they would be in a prompt."""

    base: Base

    def prefix(self, rows: Sequence[Sequence[Piece]]) -> Prefix:
        return token_prefix(self.base, [[token for piece in row for token in piece.held] for row in rows])

    def reach(self, pieces: Sequence[Piece]) -> int:
        tokens = sum(len(piece.held) for piece in pieces)
        return tokens + 1 if tokens else 0


class TokenMethod(ReadsTokens):
    """A hard prompt: the base itself reads some tokens instead of the passage. Subclasses choose them (`choose`)."""

    name: str
    sized = True
    most: int | None = None

    def __init__(self, base: Base):
        self.base = base

    @classmethod
    def from_settings(cls, base: Base, settings: MethodSettings) -> TokenMethod:
        """The method over `base`, as an evaluation asks for it."""
        return cls(base)

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        """At most `tokens` token ids that stand for the passage."""
        raise NotImplementedError

    def sizes(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens) if self.sized else list(tokens[:1])

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """See `Method.compress`: every passage is one piece."""
        return [[[self._piece(passage, self.choose(passage, count))] for passage in passages] for count in tokens]

    def _piece(self, passage: list[int], chosen: list[int]) -> Piece:
        text = self.base.tokenizer.decode(chosen, skip_special_tokens=True)
        return Piece(passage, chosen, len(chosen), len(text.encode()))


class TextMethod(TokenMethod):
    """A hard prompt cut from the beginning of a text that stands for the passage. Subclasses write it (`stand_ins`)."""

    def stand_ins(self, texts: Sequence[str], tokens: int) -> list[str]:
        """For each text one that stands for it, the most important first, of at least `tokens` tokens if it can.

        Where a stand-in is empty the passage stands for itself.
        """
        raise NotImplementedError

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """See `Method.compress`: each passage is read once and its stand-in cut to every size."""
        tokenizer = self.base.tokenizer
        texts = [tokenizer.decode(passage, skip_special_tokens=True) for passage in passages]
        written = self.stand_ins(texts, max(tokens))
        ids = self.base.tokenise(written)
        whole = [one or passage for one, passage in zip(ids, passages, strict=True)]
        return [
            [[self._piece(passage, one[:count])] for passage, one in zip(passages, whole, strict=True)]
            for count in tokens
        ]


def check_tokens(tokens: Sequence[int], most: int | None, checkpoint: str) -> None:
    """Raise a `CompressorError` if a method does not have so many memory tokens."""
    if most is not None and max(tokens) > most:
        raise CompressorError(
            f"tokens = {max(tokens)} is more than the {most} memory tokens of {checkpoint}: "
            f"ask for 1 to {most}, or train a compressor with more"
        )
