"""The text formats that the base, the training stages and the decoder share."""

from __future__ import annotations

QUESTION = "\nQuestion: {question} Answer:"
"""Follows a passage (or its memory). The answer comes after it, with a leading space, then EOS."""


def answer_text(answer: str) -> str:
    """The answer as the model is trained to write it after `QUESTION`."""
    return " " + answer.strip()


# Regeneration needs no words: after a passage or its memory, BOS (without an EOS before it) means "the passage
# again". It is the trigger of the published method, and the base learns it from its repeated passages.
