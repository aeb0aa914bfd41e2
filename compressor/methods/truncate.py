"""`truncate`: the first k tokens of the passage."""

from __future__ import annotations

from compressor.methods.interface import TokenMethod


class Truncate(TokenMethod):
    """The passage's first tokens."""

    name = "truncate"

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        return passage[:tokens]
