"""`full-tuned` and `none-tuned`: what a base that is trained for the task does with the whole passage, or without it.

A base that was not trained to answer chats, so that the whole passage in front of it is no fair upper bound. Here a
prefix of keys and values (`model/cartridge.py`, as PEFT has it) is trained for the same objective, on the same
data and for as many steps as a compressor, and the base reads it before the passage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from peft import CartridgeConfig, CartridgeEncoder
from torch import Tensor

from compressor.data.batches import pad
from compressor.methods.interface import BF16, MemoryMethod, Piece
from compressor.model.base import Base
from compressor.model.cartridge import position_free, read_after
from compressor.model.config import CompressorConfig
from compressor.model.decoder import Prefix
from compressor.model.encoder import AdaptedBase, Encoder

START = "Read the passage and answer the question about it with a few words of it. "
"""What a cartridge starts as: keys and values of this text, as often as it takes."""


class TunedEncoder(Encoder):
    """`BOS cartridge passage`, read by the base without adapters: every token is a slot. The cartridge alone trains."""

    adapted = False
    makes_memories = False
    reads: ClassVar[bool]
    """Whether the passage is read."""

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        self.cartridge = CartridgeEncoder(
            CartridgeConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=config.memory_tokens,
                num_layers=base.layers,
                token_dim=base.kv_heads * base.head_size,
                num_attention_heads=base.kv_heads,
                num_frozen_tokens=0,
            )
        )
        (text,) = base.tokenise([START])
        ids = torch.tensor([[base.bos, *(text * config.memory_tokens)[: config.memory_tokens]]], device=base.device)
        with torch.no_grad():
            kept = torch.stack([part[:, 0, :, 1:] for part in position_free(base, ids)])
        # PEFT's order: [tokens, (layer, key or value, head, channel)].
        self.cartridge.load_prompt_embeddings(kept.permute(3, 1, 0, 2, 4).flatten(1).float())

    @property
    def truncatable(self) -> bool:
        return False

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Encoder.encode`; the slots are BOS, the cartridge's and, where it is read, the passage's."""
        shown = passages if self.reads else passages[:, :0]
        return read_after(model.base, self.cartridge.weight, shown, lengths)

    def places(self, lengths: Tensor, slots: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Encoder.places`: slots stand where they were read, whatever number of tokens is asked for."""
        columns = torch.arange(slots, device=lengths.device).expand(len(lengths), -1)
        start = 1 + self.config.memory_tokens + (lengths if self.reads else torch.zeros_like(lengths))
        return columns, columns < start[:, None], start


class FullTunedEncoder(TunedEncoder):
    """The passage after a trained prefix."""

    reads = True


class NoneTunedEncoder(TunedEncoder):
    """A trained prefix alone."""

    reads = False


class Tuned(MemoryMethod):
    """The whole passage, or none, after a trained prefix."""

    sized = False

    def sizes(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens[:1])

    def compress(self, passages: Sequence[list[int]], tokens: Sequence[int]) -> list[list[list[Piece]]]:
        """See `Method.compress`: every passage is one piece."""
        return [[[self._piece(passage)] for passage in passages] for _ in tokens]

    def _piece(self, passage: list[int]) -> Piece:
        encoder = self.compressor.encoder
        assert isinstance(encoder, TunedEncoder)
        taken = self.compressor.config.memory_tokens + (len(passage) if encoder.reads else 0)
        return Piece(passage, passage, taken, BF16 * taken * encoder.values_per_token(self.base))

    @torch.no_grad()
    def prefix(self, rows: Sequence[Sequence[Piece]]) -> Prefix:
        ids, lengths = pad([[token for piece in row for token in piece.held] for row in rows], self.base.device)
        keys, values = self.compressor.encode(ids, lengths, self.compressor.config.memory_tokens)
        return self.compressor.prefix(keys, values, lengths)

    def reach(self, pieces: Sequence[Piece]) -> int:
        most = self.compressor.config.memory_tokens
        return 1 + most + sum(piece.tokens - most for piece in pieces)
