"""The text codecs by name: a new one is a class or function in a file here, and a line in this table."""

from __future__ import annotations

from typing import NamedTuple


class TextCodec(NamedTuple):
    """How files know a text codec, and where it is."""

    number: int
    """In files; never reused."""
    place: str
    """Of a function that makes it from `text_codecs.Options`."""


TEXT_CODECS = {
    "keywords": TextCodec(1, "text_codecs:keywords"),
    "summary": TextCodec(2, "text_codecs:summary"),
    "sentence-embedding": TextCodec(4, "text_codecs:sentence_embedding"),
}
