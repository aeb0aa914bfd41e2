"""What a trained method of compression is: an `Encoder` from a batch of passages to the slots of a memory.

Whatever a method passes on (keys and values, or input embeddings), the decoder finally sees keys and values of k slots
in every layer of the base. Every encoder returns these, so that memories, files, training, decoding and evaluation are
the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compressor.model.base import Base
from compressor.model.config import CompressorConfig, Layout
from compressor.model.layouts import decoder_start, memory_positions, part_stretches, tree_stretches
from compressor.model.lora import READER, WRITER, adapter
from compressor.model.table import LAYOUTS


class AdaptedBase(Protocol):
    """What an encoder runs: a base with adapters, of which `lora.adapter` runs one."""

    base: Base
    config: CompressorConfig

    has_writer: bool
    """Whether memory tokens have an adapter of their own."""


class Encoder(nn.Module):
    """A trained method. Its parameters are what it trains besides the base's adapters.

    A new method is a subclass in a file of its own and a line in `model/table.py`.
    """

    adapted: ClassVar[bool] = True
    """Whether the base carries LoRA adapters."""
    writes: ClassVar[bool] = False
    """Whether memory tokens can have an adapter of their own (`CompressorConfig.writer_rank`)."""
    reads_hidden_states: ClassVar[bool] = False
    """Whether it reads the base's last hidden states, not its keys and values."""
    makes_memories: ClassVar[bool] = True
    """Whether its slots are a memory of a size that does not depend on the passage."""
    padded_to: ClassVar[int | None] = None
    """Tokens that every passage is extended to with EOS, in training targets too."""

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__()
        self.config = config

    @property
    def truncatable(self) -> bool:
        """Whether the first j of k slots are what encoding to j slots gives."""
        return LAYOUTS[self.config.layout].truncatable

    @property
    def frozen_fingerprint(self) -> str | None:
        """Hash of frozen weights that it reads besides the base's, which a checkpoint does not hold."""
        return None

    def trained_for(self, tokens: int) -> bool:
        """Whether it is meant to compress to so many slots."""
        return tokens <= self.config.memory_tokens

    def values_per_token(self, base: Base) -> int:
        """Numbers that hold one slot: keys and values of every layer, or an input embedding they are computed from."""
        return 2 * base.layers * base.kv_heads * base.head_size

    @property
    def memory_layout(self) -> Layout:
        """Where the slots stand in the decoder's context."""
        return self.config.layout

    def places(self, lengths: Tensor, slots: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the slots that `encode` returned stand in the decoder's context.

        Args:
            lengths: passage tokens, int64 `[batch]`.
            slots: slots of each row.
            tokens: slots that each row may use, int64 `[batch]`.

        Returns:
            Positions, int64 `[batch, slots]`; which may be used, bool `[batch, slots]`; where the decoder starts, int64
            `[batch]`.
        """
        layout = self.memory_layout
        positions = memory_positions(layout, lengths, slots, self.config.memory_tokens, tokens)
        used = torch.arange(slots, device=lengths.device)[None] < tokens[:, None]
        return positions, used, decoder_start(layout, lengths, tokens)

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compress a batch of passages; differentiable.

        Args:
            passages: token ids, int64 `[batch, width]`, padded on the right with any valid id.
            lengths: passage tokens, int64 `[batch]`.
            tokens: slots k of each row, int64 `[batch]`.

        Returns:
            Position-free keys and values, each `[layers, batch, kv_heads, k, head_size]`, of the largest k; what a row
            of fewer has after its own is not used.
        """
        raise NotImplementedError


class EmbeddingEncoder(Encoder):
    """A method whose slots are input embeddings, which the base reads in the passage's place. Subclasses make them."""

    def values_per_token(self, base: Base) -> int:
        return base.hidden

    @property
    def memory_layout(self) -> Layout:
        return "front"

    def embedded(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """Input embeddings `[batch, k, hidden]`; arguments as for `encode`."""
        raise NotImplementedError

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Encoder.encode`: keys and values of the embeddings, read without adapters."""
        embedded = self.embedded(model, passages, lengths, tokens)
        batch, slots = embedded.shape[:2]
        positions = memory_positions(self.memory_layout, lengths, slots, self.config.memory_tokens, tokens)
        causal = torch.ones(slots, slots, dtype=torch.bool, device=embedded.device).tril().expand(batch, -1, -1)
        keys, values = model.base.keys_and_values(embedded.to(model.base.dtype), positions, causal)
        return model.base.rotate(keys, positions, inverse=True), values


class Reading(NamedTuple):
    """What the memory tokens' pass of the encoder takes; the arguments of `Base.keys_and_values`."""

    embedded: Tensor
    """`[batch, width, hidden]`; the memory tokens are the last."""
    positions: Tensor
    """int64 `[batch, width]`"""
    allowed: Tensor
    """bool `[batch, width, cached + width]`"""
    cache: DynamicCache | None
    """The passage, where it has been read already."""


@contextmanager
def memory_pass(
    model: AdaptedBase, memory: Tensor, passages: Tensor, lengths: Tensor, tokens: Tensor
) -> Iterator[Reading]:
    """The inputs of memory tokens that read a passage, with the adapter on under which they do.

    With a writer there are two passes: the passage under the reader's adapter into a cache, then the memory tokens
    under the writer's on that cache. This is exact, since no passage token sees a memory token. Without, both are read
    in one pass, under the one adapter there is.

    Args:
        memory: embeddings of memory tokens, `[m, hidden]`.
        passages: token ids, int64 `[batch, width]`.
        lengths: passage tokens, int64 `[batch]`.
        tokens: memory tokens k of each row, int64 `[batch]`.
    """
    batch, width = passages.shape
    config, slots, most = model.config, int(tokens.max()), len(memory)
    embedded = model.base.embeddings(passages)
    chosen = torch.arange(slots, device=passages.device).expand(batch, -1)
    columns = torch.arange(width, device=passages.device).expand(batch, -1)
    placed = memory_positions(config.layout, lengths, slots, most, tokens)
    allowed = encoder_attention(lengths, width, slots, config.passage_attention == "bidirectional")
    stretches = None
    if config.memory_attention == "parts":
        # The i-th of k tokens is the one that stands there among all m.
        chosen = (chosen * most // tokens[:, None]).clamp(max=most - 1)
        stretches = part_stretches(lengths, slots, tokens)
    elif config.memory_attention == "tree" and config.layout == "nested":
        stretches = tree_stretches(lengths, slots, most)
    # The base may be in bfloat16 while memory tokens train in float32; `cat` would promote.
    appended = memory.to(embedded.dtype)[chosen]
    if stretches is not None:
        first, end = stretches
        allowed[:, width:, :width] &= (columns[:, None] >= first[..., None]) & (columns[:, None] < end[..., None])
    if model.has_writer:
        with adapter(READER):
            cache = model.base.read(embedded, columns, allowed[:, :width, :width])
        with adapter(WRITER):
            yield Reading(appended, placed, allowed[:, width:], cache)
    else:
        whole = torch.cat([embedded, appended], dim=1), torch.cat([columns, placed], dim=1)
        with adapter(READER):
            yield Reading(*whole, allowed, None)


def encoder_attention(lengths: Tensor, width: int, tokens: int, bidirectional: bool) -> Tensor:
    """Who may attend to whom in `passage ; memory tokens`.

    Passage tokens see the passage (causally or both ways); memory tokens see the passage and, causally, each other, so
    that the first j of k do not depend on the rest. Padding sees only itself, to keep its softmax finite.

    Returns:
        bool `[batch, width + tokens, width + tokens]`.
    """
    total = width + tokens
    index = torch.arange(total, device=lengths.device)
    real = (index[None] < lengths[:, None]) | (index[None] >= width)
    allowed = index[:, None] >= index[None, :]
    if bidirectional:
        allowed = allowed | ((index[:, None] < width) & (index[None, :] < width))
    return (allowed[None] & real[:, None, :]) | torch.eye(total, dtype=torch.bool, device=lengths.device)[None]


def initial_memory(base: Base, config: CompressorConfig) -> Tensor:
    """Initial memory tokens, float32 `[memory_tokens, hidden]`."""
    noise = torch.randn(config.memory_tokens, base.hidden)
    if config.initialisation == "normal":
        return noise
    table = base.embeddings.weight.detach()
    sample = table[:: max(1, len(table) // 4096)].float().cpu()
    return sample.mean(0) + noise * sample.std(0)
