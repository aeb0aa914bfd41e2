"""Rows that are decoded together, each with its context and its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compressor.model.base import Base
from compressor.model.decoder import BLOCK, Prefix, RoomyLayer, roomy_cache, shares, up
from compressor.model.kernels import Sharing

STATIC_BLOCK = 128
"""Columns by which the caches of compiled steps grow, which attend to all columns that there will be."""


class _StaticLayer(DynamicLayer):
    """A layer all of whose room is attended to: nothing but the contents of tensors changes from step to step."""

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        self.at = torch.tensor([keys.shape[2]], device=keys.device)
        self.room = up(keys.shape[2] + room, STATIC_BLOCK)
        pad = (0, 0, 0, self.room - keys.shape[2])
        self.keys, self.values = (torch.nn.functional.pad(one, pad) for one in (keys, values))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write them; all keys and values."""
        assert self.keys is not None
        assert self.values is not None
        where = self.at + torch.arange(key_states.shape[2], device=self.at.device)
        self.keys.index_copy_(2, where, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, where, value_states.to(self.values.dtype))
        self.at.add_(key_states.shape[2])
        return self.keys, self.values


class Rows:
    """Rows of a batch, each with its context and its prompt; a step reads their newest tokens.

    Args:
        prefix: contexts; those that rows share are held once if the base's attention is ours.
        prompts: token ids for each row, at least one each; lengths may differ.
        room: most tokens that are read after a prompt.
        compiled: compile the step of a token (`torch.compile`), with caches of a fixed width.
    """

    def __init__(self, base: Base, prefix: Prefix, prompts: Sequence[Sequence[int]], room: int, compiled: bool = False):
        self.base, self.compiled, device = base, compiled, base.device
        prefix = prefix.whole() if compiled or not shares(base, prefix) else prefix
        self.owners = prefix.owners
        widest, count = max(map(len, prompts)), len(prompts)
        self.ids = torch.full((count, widest), base.eos, device=device)
        real = torch.zeros(count, widest, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.ids[row, widest - len(prompt) :] = torch.tensor(list(prompt), device=device)
            real[row, widest - len(prompt) :] = True
        self.positions = (prefix.start[:, None] + real.cumsum(1) - 1).clamp(min=0)
        self.contexts = len(prefix.keys[0])
        if compiled:
            pairs = zip(prefix.keys, prefix.values, strict=True)
            layers = [_StaticLayer(keys, values, widest + room) for keys, values in pairs]
            self.cache, columns = DynamicCache(), layers[0].room
            self.cache.layers = list(layers)
        else:
            self.cache, columns = roomy_cache(base, prefix, widest + room)
        self.apart = 0 if self.owners is None else prefix.slots
        """Columns of contexts that are shared."""
        self.read = prefix.slots
        """Columns before the newest tokens."""
        self.allowed = torch.zeros(count, columns, dtype=torch.bool, device=device)
        self.allowed[:, : self.read] = prefix.mask
        self.allowed[:, self.read : self.read + widest] = real

    def logits(self) -> Tensor:
        """What the base makes of the newest tokens: float32 `[rows, vocabulary]`."""
        width, device = self.ids.shape[1], self.ids.device
        end = self.read + width
        columns = self.allowed.shape[1]
        if not self.compiled:
            columns = self.apart + up(end - self.apart, BLOCK)
        allowed = self.allowed[:, None, :columns].expand(-1, width, -1).clone()
        # Causal among the newest; padding before a prompt sees itself, to keep its softmax finite.
        newest = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        allowed[:, :, self.read : end] &= newest
        allowed[:, :, self.read : end] |= torch.eye(width, dtype=torch.bool, device=device)
        inputs = {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "attention_mask": self.base.additive_mask(allowed),
            "past_key_values": self.cache,
        }
        self.read = end
        model = self.base.compiled_model() if self.compiled and width == 1 else self.base.model
        return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def add(self, chosen: Tensor) -> None:
        """Take the rows' next tokens, int64 `[rows]`."""
        self.ids, self.positions = chosen[:, None], self.positions[:, -1:] + 1
        self.allowed[:, self.read] = True

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, int64 `[rows]`; of compiled steps all stay."""
        self.ids, self.positions, self.allowed = self.ids[rows], self.positions[rows], self.allowed[rows]
        sharing = None
        if self.owners is not None:
            self.owners = self.owners[rows]
            sharing = Sharing.of(self.owners, self.contexts)
        for layer in self.cache.layers:
            assert isinstance(layer, RoomyLayer)
            layer.keep(rows, sharing)
