"""Micro-batches 0, 1, 2, ... as a pure function of data, settings and seed, so that a resumed run repeats them."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import numpy as np

ROUND = 2048
"""Items drawn and sorted by length at a time."""


class Sized(Protocol):
    """What is put into micro-batches."""

    @property
    def length(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Rounds(Generic[T]):
    """Draws a round of items, sorts it by length and cuts it into micro-batches, which are shuffled.

    Args:
        batch_tokens: most padded passage tokens of a micro-batch (one item may have more).
        batch_passages: most items of a micro-batch.
    """

    def __init__(self, batch_tokens: int, batch_passages: int, seed: int):
        self.batch_tokens, self.batch_passages, self.seed = batch_tokens, batch_passages, seed
        self._ends: list[int] = []  # micro-batches up to and including each round
        self._cached: tuple[int, list[list[T]]] = (-1, [])

    def draw_round(self, rng: np.random.Generator, number: int) -> list[T]:
        """The items of round `number`."""
        raise NotImplementedError

    def _round(self, number: int) -> list[list[T]]:
        rng = np.random.default_rng([self.seed, number])
        batches: list[list[T]] = [[]]
        for item in sorted(self.draw_round(rng, number), key=lambda item: item.length):
            batch = batches[-1]
            if batch and (len(batch) == self.batch_passages or (len(batch) + 1) * item.length > self.batch_tokens):
                batch = []
                batches.append(batch)
            batch.append(item)
        rng.shuffle(batches)
        return batches

    def batch(self, index: int) -> list[T]:
        """Items of micro-batch `index`."""
        while not self._ends or self._ends[-1] <= index:
            batches = self._round(len(self._ends))
            self._cached = (len(self._ends), batches)
            self._ends.append((self._ends[-1] if self._ends else 0) + len(batches))
        number = int(np.searchsorted(self._ends, index, side="right"))
        if self._cached[0] != number:
            self._cached = (number, self._round(number))
        return self._cached[1][index - (self._ends[number - 1] if number else 0)]
