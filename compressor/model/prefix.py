"""What a decoder starts from: contexts of keys and values, placed, which rows may share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from compressor.model.base import Base


@dataclass
class Prefix:
    """A batch of decoder contexts: rotated keys and values, left-aligned and padded.

    Attributes:
        keys, values: one `[contexts, kv_heads, slots, head_size]` tensor a layer.
        mask: bool `[batch, slots]`, False for padding.
        start: int64 `[batch]`, position of the decoder's next token.
        owners: context of each row, int64 `[batch]`; None where each has its own.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    start: Tensor
    owners: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.mask.shape[1]

    def to_cache(self) -> DynamicCache:
        """A new cache that holds the prefix. The decoder appends to it, so every use needs its own."""
        cache, whole = DynamicCache(), self.whole()
        for layer, (keys, values) in enumerate(zip(whole.keys, whole.values, strict=True)):
            cache.update(keys, values, layer)
        return cache

    def select(self, rows: Tensor) -> Prefix:
        """The prefix of some rows, int64 or bool index `[rows]`."""
        if self.owners is not None:
            return replace(self, mask=self.mask[rows], start=self.start[rows], owners=self.owners[rows])
        return Prefix(
            [keys[rows] for keys in self.keys],
            [values[rows] for values in self.values],
            self.mask[rows],
            self.start[rows],
        )

    def share(self, owners: Tensor) -> Prefix:
        """A prefix whose rows read these contexts, int64 `[rows]`: `select` without copies of keys and values."""
        assert self.owners is None
        return replace(self, mask=self.mask[owners], start=self.start[owners], owners=owners)

    def whole(self) -> Prefix:
        """The same with keys and values for each row."""
        if self.owners is None:
            return self
        keys, values = ([one[self.owners] for one in kind] for kind in (self.keys, self.values))
        return Prefix(keys, values, self.mask, self.start)


T = TypeVar("T")


def shared(things: Sequence[T], make: Callable[[list[T]], Prefix]) -> Prefix:
    """The prefix that `make` builds of these, one row each; things that occur several times are built once, and shared.

    So many questions may be asked about one memory, or one passage, without a copy for each.
    """
    apart = {id(one): one for one in things}
    prefix = make(list(apart.values()))
    if len(apart) == len(things):
        return prefix
    places = {key: place for place, key in enumerate(apart)}
    return prefix.share(torch.tensor([places[id(one)] for one in things], device=prefix.mask.device))


def empty_prefix(base: Base, batch: int) -> Prefix:
    """No context at all: what the decoder knows of the passage is nothing."""
    shape = (batch, base.kv_heads, 0, base.head_size)
    nothing = [torch.zeros(shape, device=base.device, dtype=base.dtype) for _ in range(base.layers)]
    return Prefix(
        nothing,
        list(nothing),
        torch.zeros(batch, 0, dtype=torch.bool, device=base.device),
        torch.zeros(batch, dtype=torch.int64, device=base.device),
    )
