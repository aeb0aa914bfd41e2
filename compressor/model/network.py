"""The network: LoRA on a frozen base, and an encoder that makes memories with it.

Encoder: the base with its adapters on reads the passage (and, in most methods, learned memory tokens after it), and the
encoder takes keys and values of k slots from it. Decoder: the same base with its adapters off, which they are outside
the encoder, reads these instead of the passage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import Self

from compressor.data.batches import by_length, equal_segments, pad
from compressor.errors import CompressorError, require, require_whole
from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.decoder import Prefix
from compressor.model.encoder import Encoder
from compressor.model.lora import add_adapters
from compressor.model.memory import Memory, Segment, memory_prefix
from compressor.model.refinement import refine
from compressor.progress import Progress


class Network(nn.Module):
    """A frozen base and an encoder of passages over it.

    Args:
        base: the frozen base; its linear layers get LoRA wrappers in place.
        config: sizes, layout, LoRA settings.
        encoder: the method (`methods.table.encoder_class`).
        seed: of the initial adapters and memory tokens.
    """

    def __init__(self, base: Base, config: CompressorConfig, encoder: type[Encoder], seed: int = 0):
        super().__init__()
        if any(isinstance(module, BaseTunerLayer) for module in base.model.modules()):
            raise CompressorError(f"the base {base.name} already carries a compressor's adapters: load it again")
        self.base, self.config = base, config
        self.has_writer = encoder.writes and config.writer_rank > 0
        self.peft: PeftModel | None = None
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            if encoder.adapted:
                self.peft = add_adapters(base, config, encoder.reads_hidden_states, self.has_writer)
            self.encoder = encoder(base, config)
        self._lora_layers = [module for module in base.model.modules() if isinstance(module, BaseTunerLayer)]
        self.to(base.device)

    def train(self, mode: bool = True) -> Self:
        """Training mode for the adapters only: the frozen base keeps its own dropout off."""
        super().train(mode)
        self.base.model.eval()
        for layer in self._lora_layers:
            layer.train(mode)
        return self

    def encode(self, passages: Tensor, lengths: Tensor, tokens: int | Tensor) -> tuple[Tensor, Tensor]:
        """Compress a batch of passages; differentiable.

        Args:
            passages: token ids, int64 `[batch, width]`, padded on the right with any valid id.
            lengths: passage tokens, int64 `[batch]`.
            tokens: memory tokens k, of all rows or of each, int64 `[batch]`.

        Returns:
            Position-free keys and values, each `[layers, batch, kv_heads, k, head_size]`, of the largest k.
        """
        each = tokens if isinstance(tokens, Tensor) else torch.full_like(lengths, tokens)
        return self.encoder.encode(self, passages, lengths, each)

    def prefix(self, keys: Tensor, values: Tensor, lengths: Tensor, tokens: Tensor | None = None) -> Prefix:
        """The decoder's context from what `encode` returned; differentiable.

        Args:
            keys, values: `[layers, batch, kv_heads, k, head_size]`.
            lengths: passage tokens, int64 `[batch]`.
            tokens: memory tokens that each row was encoded to, int64 `[batch]`; by default all k. Fewer than it was
                encoded to is what truncating gives, and needs a layout that can be truncated.
        """
        slots = keys.shape[3]
        if tokens is None:
            tokens = torch.full_like(lengths, slots)
        positions, used, start = self.encoder.places(lengths, slots, tokens)
        return Prefix(keys=list(self.base.rotate(keys, positions)), values=list(values), mask=used, start=start)

    def memory(self, keys: Tensor, values: Tensor, passage_tokens: int) -> Memory:
        """The memory of one segment from a row of what `encode` returned, `[layers, kv_heads, k, head_size]` each."""
        layout, most = self.encoder.memory_layout, self.config.memory_tokens
        segment = Segment(keys.shape[2], passage_tokens)
        return Memory(keys, values, (segment,), layout, most, self.base.fingerprint)

    def joined_prefix(
        self, keys: Tensor, values: Tensor, lengths: Tensor, tokens: Tensor, groups: Sequence[Sequence[int]]
    ) -> Prefix:
        """`prefix` of contexts that are several rows one after the other, as of a text's segments; differentiable.

        Args:
            tokens: memory tokens of each row, int64 `[batch]`.
            groups: the rows of each context, in reading order.
        """
        parts = [
            self.memory(keys[:, row, :, :count], values[:, row, :, :count], length)
            for row, (count, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True))
        ]
        return memory_prefix(self.base, [Memory.concatenate([parts[row] for row in group]) for group in groups])

    def so_many(self, tokens: int | None) -> int:
        """Memory tokens, by default all there are; more than that, or none, is a `CompressorError`."""
        most = self.config.memory_tokens
        tokens = most if tokens is None else tokens
        require_whole("tokens", tokens, 0)
        if not 1 <= tokens <= most:
            raise CompressorError(f"cannot compress to {tokens} memory tokens: this compressor has 1 to {most}")
        return int(tokens)

    def longest_segment(self, asked: int | None = None) -> int:
        """Most tokens of a segment where so many are asked for, or none.

        Raises:
            CompressorError: more are asked for than the compressor reads at once.
        """
        config = self.config
        most = f"at most {config.max_passage_tokens}, which is what this compressor reads at once"
        require((asked or 0) <= config.max_passage_tokens, "segment_tokens", asked, most)
        return asked or config.segment_tokens or config.max_passage_tokens

    def segment(self, ids: Sequence[int], most: int | None = None) -> list[list[int]]:
        """Cut token ids into the fewest segments of at most `most` tokens, as equal as can be.

        Args:
            most: at most `max_passage_tokens`; by default `segment_tokens` of the settings.
        """
        if not ids:
            raise CompressorError("cannot compress an empty passage: give at least one token of text")
        if most is not None and most < 1:
            raise CompressorError(f"segments of {most} tokens hold nothing: give segment_tokens of at least 1")
        return equal_segments(ids, self.longest_segment(most))

    @torch.no_grad()
    def compress_ids(
        self,
        passages: Sequence[Sequence[int]],
        tokens: int | None = None,
        batch_size: int = 16,
        segment_tokens: int | None = None,
        refine_steps: int = 0,
    ) -> list[Memory]:
        """Memories of tokenised passages, in their order.

        Args:
            passages: token ids. Those over `segment_tokens` are compressed in segments.
            tokens: memory tokens for each segment; by default all there are.
            batch_size: segments encoded together.
            segment_tokens: most tokens of a segment, by default those of the settings.
            refine_steps: gradient steps on each memory (`refinement.refine`).

        Raises:
            CompressorError: an empty passage, or more memory tokens than there are.
        """
        if not self.encoder.makes_memories:
            raise CompressorError(
                f"the method {self.config.method} is a bound to compare with and makes no memories: evaluate it "
                f"(evaluate.py --methods {self.config.method}=CHECKPOINT), or load another checkpoint"
            )
        passages = token_ids(passages, self.base.embeddings.weight.shape[0])
        tokens = self.so_many(tokens)
        require_whole("batch_size", batch_size)
        require_whole("refine_steps", refine_steps, 0)
        if segment_tokens is not None:
            require_whole("segment_tokens", segment_tokens)
        batch_size, refine_steps = int(batch_size), int(refine_steps)  # numpy's among them
        most = self.longest_segment(segment_tokens)
        owners, segments = [], []
        for owner, ids in enumerate(passages):
            for segment in self.segment(ids, segment_tokens):
                owners.append(owner)
                segments.append(segment)
        parts: list[Memory | None] = [None] * len(segments)
        with Progress("compressing", len(segments), "segments") as progress:
            for chosen in by_length(list(map(len, segments)), batch_size):
                padded, lengths = pad([segments[i] for i in chosen], self.base.device)
                keys, values = self.encode(padded, lengths, tokens)
                for row, i in enumerate(chosen):
                    memory = self.memory(keys[:, row].clone(), values[:, row].clone(), len(segments[i]))
                    parts[i] = replace(memory, made={"tokens": tokens, "segment_tokens": most, "refine_steps": 0})
                progress.add(len(chosen))
        grouped: list[list[Memory]] = [[] for _ in passages]
        for owner, part in zip(owners, parts, strict=True):
            assert part is not None
            grouped[owner].append(part)
        whole = [Memory.concatenate(group) for group in grouped]
        return refine(self.base, whole, passages, refine_steps, batch_size) if refine_steps else whole

    def trainable_state(self) -> dict[str, Tensor]:
        """Adapter weights and memory tokens by parameter name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def token_ids(passages: Any, vocabulary: int) -> list[list[int]]:
    """Tokenised passages as lists of ids; what is none, or not of the vocabulary, is a `CompressorError`."""
    if isinstance(passages, str) or not isinstance(passages, Iterable):
        raise CompressorError(f"passages is {type(passages).__name__}: give lists of token ids")
    found = []
    for number, passage in enumerate(passages):
        if not isinstance(passage, Iterable):
            raise CompressorError(f"passage {number} is {type(passage).__name__}: give a list of token ids")
        ids = passage.tolist() if isinstance(passage, Tensor) else list(passage)
        for one in ids:
            require_whole(f"a token of passage {number}", one, 0, vocabulary - 1)
        found.append(list(map(int, ids)))
    return found
