"""`none`: no passage at all, the lower bound: what the base knows or guesses without it."""

from __future__ import annotations

from compressor.methods.interface import TokenMethod


class Nothing(TokenMethod):
    """An empty context."""

    name = "none"
    sized = False

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        return []
