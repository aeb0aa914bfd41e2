"""`full` and `none`: the whole passage, and none, between which every memory stands; `truncate`: its beginning."""

from __future__ import annotations

from compressor.methods.interface import TokenMethod


class Full(TokenMethod):
    """The passage itself in the prompt: the upper bound of what a memory can keep."""

    name = "full"
    sized = False

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        return passage


class Nothing(TokenMethod):
    """An empty context, the lower bound: what the base knows or guesses."""

    name = "none"
    sized = False

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        return []


class Truncate(TokenMethod):
    """The passage's first tokens."""

    name = "truncate"

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        return passage[:tokens]
