"""`full`: the whole passage in the prompt, the upper bound of what a memory can keep."""

from __future__ import annotations

from compressor.methods.interface import TokenMethod


class Full(TokenMethod):
    """The passage itself."""

    name = "full"
    sized = False

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        return passage
