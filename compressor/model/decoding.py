"""Rows that are decoded together: their caches, with room for what will be written, and contexts that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compressor.model.kernels import GROUPED

if TYPE_CHECKING:
    from compressor.model.base import Base
    from compressor.model.memory import Prefix

BLOCK = 32
"""Columns by which what a step attends to grows: kernels are built for each width."""
STATIC_BLOCK = 128
"""The same for compiled steps, which attend to all columns that there will be."""


@dataclass(frozen=True)
class Sharing:
    """Which rows read which context."""

    place: Tensor
    """Rows of each context, int64 `[contexts, most]`, filled up with any."""
    back: Tensor
    """Where each row is in `place`, flattened, int64 `[rows]`."""

    @staticmethod
    def of(owners: Tensor, contexts: int) -> Sharing:
        """Of the contexts of rows, int64 `[rows]`."""
        counts = torch.bincount(owners, minlength=contexts)
        order = owners.argsort(stable=True)
        rank = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners[order]]
        most = int(counts.max())
        flat = torch.zeros(contexts * most, dtype=torch.int64, device=owners.device)
        where = owners[order] * most + rank
        flat[where] = order
        back = torch.empty_like(owners)
        back[order] = where
        return Sharing(flat.view(contexts, most), back)


@dataclass(frozen=True)
class Context:
    """One layer's keys and values `[contexts, kv_heads, slots, head_size]`, each read by several rows."""

    keys: Tensor
    values: Tensor
    sharing: Sharing

    def scores(self, queries: Tensor) -> Tensor:
        """Products of queries `[rows, kv_heads, n, head_size]` with keys, `[rows, kv_heads, n, slots]`."""
        return self._each(queries, self.keys.transpose(2, 3))

    def read(self, weights: Tensor) -> Tensor:
        """Values by their weights `[rows, kv_heads, n, slots]`: `[rows, kv_heads, n, head_size]`."""
        return self._each(weights, self.values)

    def _each(self, of_rows: Tensor, of_contexts: Tensor) -> Tensor:
        """The product of each row's matrices with its context's, without a copy of these."""
        place, back = self.sharing.place, self.sharing.back
        count, most = place.shape
        _, heads, width, size = of_rows.shape
        apart = of_rows[place].transpose(1, 2).reshape(count, heads, most * width, size)
        found = (apart @ of_contexts).view(count, heads, most, width, -1)
        return found.transpose(1, 2).flatten(0, 1)[back]


class _Layer(DynamicLayer):
    """Keys and values of one layer, written where there is room; only what is needed is attended to.

    transformers' own grows by copying all that is there for every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int, room: int, sharing: Sharing | None):
        super().__init__()
        self.context = None if sharing is None else Context(keys, values, sharing)
        self.used = keys.shape[2] if sharing is None else 0
        room = -(-(self.used + room) // BLOCK) * BLOCK
        self.keys, self.values = (one.new_zeros(rows, one.shape[1], room, one.shape[3]) for one in (keys, values))
        for buffer, one in ((self.keys, keys), (self.values, values)):
            buffer[:, :, : self.used] = one[:, :, : self.used]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write them; keys and values so far, filled up to whole blocks. `key.context` is what comes before them."""
        assert self.keys is not None
        assert self.values is not None
        start, self.used = self.used, self.used + key_states.shape[2]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, start : self.used] = new
        end = -(-self.used // BLOCK) * BLOCK
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
        pad = (0, 0, 0, -(-(keys.shape[2] + room) // STATIC_BLOCK) * STATIC_BLOCK - keys.shape[2])
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

    def __init__(
        self, base: Base, prefix: Prefix, prompts: Sequence[Sequence[int]], room: int, compiled: bool = False
    ):
        self.base, self.compiled, device = base, compiled, base.device
        shares = prefix.owners is not None and not compiled and base.model.config._attn_implementation == GROUPED
        self.owners = prefix.owners if shares else None
        prefix = prefix if shares else prefix.whole()
        widest, count = max(map(len, prompts)), len(prompts)
        self.ids = torch.full((count, widest), base.eos, device=device)
        real = torch.zeros(count, widest, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.ids[row, widest - len(prompt) :] = torch.tensor(list(prompt), device=device)
            real[row, widest - len(prompt) :] = True
        self.positions = (prefix.start[:, None] + real.cumsum(1) - 1).clamp(min=0)
        self.contexts = len(prefix.keys[0])
        sharing = self._sharing()
        self.cache, room = DynamicCache(), widest + room
        self.cache.layers = [
            _StaticLayer(keys, values, room) if compiled else _Layer(keys, values, count, room, sharing)
            for keys, values in zip(prefix.keys, prefix.values, strict=True)
        ]
        first = self.cache.layers[0].keys
        assert first is not None
        self.slots = prefix.slots if shares else 0
        self.read = prefix.slots
        """Columns before the newest tokens."""
        self.allowed = torch.zeros(count, self.slots + first.shape[2], dtype=torch.bool, device=device)
        self.allowed[:, : self.read] = prefix.mask
        self.allowed[:, self.read : self.read + widest] = real

    def _sharing(self) -> Sharing | None:
        return None if self.owners is None else Sharing.of(self.owners, self.contexts)

    def logits(self) -> Tensor:
        """What the base makes of the newest tokens: float32 `[rows, vocabulary]`."""
        width, device = self.ids.shape[1], self.ids.device
        end = self.read + width
        columns = self.allowed.shape[1]
        if not self.compiled:
            columns = self.slots + -(-(end - self.slots) // BLOCK) * BLOCK
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
        self.owners = None if self.owners is None else self.owners[rows]
        sharing = self._sharing()
        for layer in self.cache.layers:
            assert isinstance(layer, _Layer)
            layer.keep(rows, sharing)
