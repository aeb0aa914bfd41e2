"""`optimise`: gradient descent on the memory of each text, the ceiling of what k slots can hold (arXiv 2502.13063).

Cramming optimises input embeddings; here the keys and values of every layer are, which is what a compressor makes.
Far too slow for anything but a few passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from compressor.base import Base
from compressor.data.collate import IGNORED, regeneration_pair, stack_pairs
from compressor.generation import decode
from compressor.layouts import decoder_start, memory_positions
from compressor.memory import Memory, Prefix, Segment, memory_prefix
from compressor.methods.interface import BF16, Piece
from compressor.methods.registry import MethodSettings

LEARNING_RATE = 0.05
LONGEST = 500


class Optimise:
    """The memory that makes the base most likely to write the passage, by AdamW from a start of random vectors.

    Args:
        base: without adapters.
        steps: gradient steps; the rate falls from `LEARNING_RATE` to 0 along a cosine.
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

    @torch.enable_grad()
    def memories(self, passages: Sequence[list[int]], tokens: int) -> list[Memory]:
        """Optimised memories of passages of at most 500 tokens, layout `spread`."""
        base, batch = self.base, len(passages)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, base.layers, 1, base.kv_heads, tokens, base.head_size)
        # One start for all: what a passage ends at must not depend on its place in a batch.
        start = (torch.randn(shape, generator=generator) * 0.1).expand(-1, -1, batch, -1, -1, -1).to(base.device)
        keys, values = (nn.Parameter(one.clone()) for one in start)
        lengths = torch.tensor([len(ids) for ids in passages], device=base.device)
        stacked = stack_pairs([regeneration_pair(base.bos, base.eos, ids) for ids in passages])
        inputs, labels = stacked["inputs"].to(base.device), stacked["labels"].to(base.device)
        optimizer = torch.optim.AdamW([keys, values], lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            prefix = self._placed(keys, values, lengths)
            logits = decode(base, prefix, inputs).float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
            )
            # A mean over each passage, summed over passages: none depends on the others.
            loss = (losses.view(labels.shape).sum(1) / (lengths + 1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return [
            Memory(
                keys[:, row].detach().clone(),
                values[:, row].detach().clone(),
                (Segment(tokens, len(ids)),),
                "spread",
                tokens,
                base.fingerprint,
            )
            for row, ids in enumerate(passages)
        ]

    def _placed(self, keys: Tensor, values: Tensor, lengths: Tensor) -> Prefix:
        slots = keys.shape[3]
        positions = memory_positions("spread", lengths, slots, slots)
        mask = torch.ones(len(lengths), slots, dtype=torch.bool, device=keys.device)
        placed = self.base.rotate(keys.to(self.base.dtype), positions)
        return Prefix(list(placed), list(values.to(self.base.dtype)), mask, decoder_start("spread", lengths, slots))

    def prefix(self, rows: Sequence[Sequence[Piece]]) -> Prefix:
        return memory_prefix(self.base, [Memory.concatenate([piece.held for piece in row]) for row in rows])

    def decoding(self) -> AbstractContextManager[None]:
        return nullcontext()
