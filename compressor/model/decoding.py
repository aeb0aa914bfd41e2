"""Rows that are decoded together: their caches, with room for what will be written, and contexts that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compressor.model.kernels import GROUPED, Context, Sharing

if TYPE_CHECKING:
    from compressor.model.base import Base
    from compressor.model.prefix import Prefix

BLOCK = 32
"""Columns by which what a step attends to grows: kernels are built for each width."""
STATIC_BLOCK = 128
"""The same for compiled steps, which attend to all columns that there will be."""


def up(width: int, block: int) -> int:
    """The width in whole blocks."""
    return -(-width // block) * block


class _Layer(DynamicLayer):
    """Keys and values of one layer, written where there is room; only what is needed is attended to.

    transformers' own grows by copying all that is there for every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int, room: int, sharing: Sharing | None):
        super().__init__()
        self.context = None if sharing is None else Context(keys, values, sharing)
        self.used = keys.shape[2] if sharing is None else 0
        self.room = up(self.used + room, BLOCK)
        self.keys, self.values = (one.new_zeros(rows, one.shape[1], self.room, one.shape[3]) for one in (keys, values))
        if sharing is None:
            self.keys[:, :, : self.used], self.values[:, :, : self.used] = keys, values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write them; keys and values so far, filled up to whole blocks. `key.context` is what comes before them."""
        assert self.keys is not None
        assert self.values is not None
        start, self.used = self.used, self.used + key_states.shape[2]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, start : self.used] = new
        end = up(self.used, BLOCK)
        keys = self.keys[:, :, :end]
        keys.context = self.context  # type: ignore[attr-defined]
        return keys, self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.used + (0 if self.context is None else self.context.keys.shape[2])

    def keep(self, rows: Tensor, sharing: Sharing | None) -> None:
        """Go on with these rows alone."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]
        if sharing is not None and self.context is not None:
            self.context = Context(self.context.keys, self.context.values, sharing)


class _StaticLayer(DynamicLayer):
    """The same, all of whose room is attended to: nothing but the contents of tensors changes from step to step."""

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


def shares(base: Base, prefix: Prefix) -> bool:
    """Whether rows read their contexts from one copy: where there are fewer of these, and the attention is ours."""
    return prefix.owners is not None and base.model.config._attn_implementation == GROUPED


def roomy_cache(base: Base, prefix: Prefix, room: int) -> tuple[DynamicCache, int]:
    """A cache of a prefix with room for so many tokens in each row, and the columns that a mask of it has.

    The columns are the prefix's, then those of what is written, filled up to whole blocks.
    """
    owners, cache = prefix.owners, DynamicCache()
    sharing = Sharing.of(owners, len(prefix.keys[0])) if owners is not None and shares(base, prefix) else None
    held = prefix.whole() if sharing is None else prefix
    pairs = zip(held.keys, held.values, strict=True)
    layers = [_Layer(keys, values, len(prefix.mask), room, sharing) for keys, values in pairs]
    cache.layers = list(layers)
    return cache, prefix.slots - layers[0].used + layers[0].room


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
            assert isinstance(layer, _Layer)
            layer.keep(rows, sharing)
