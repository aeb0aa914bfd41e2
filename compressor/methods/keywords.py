"""`keywords`: the passage's keywords by YAKE (Campos et al. 2020, doi 10.1016/j.ins.2019.09.013)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from compressor.errors import lacking
from compressor.methods.interface import TextMethod
from compressor.model.base import Base

CANDIDATES = 4
"""Keywords asked for with every token of the prompt: many repeat words of earlier ones."""


class Keywords(TextMethod):
    """English keywords in the order of their importance, with commas between them, cut to k tokens.

    A keyword all of whose words stand in earlier ones is left out. A passage without keywords (a formula, say) stands
    for itself, as in `truncate`.

    Raises:
        CompressorError: yake is not installed.
    """

    name = "keywords"

    def __init__(self, base: Base):
        super().__init__(base)
        if find_spec("yake") is None:
            raise lacking("the method keywords", "yake", "keywords")

    def stand_ins(self, texts: Sequence[str], tokens: int) -> list[str]:
        from yake import KeywordExtractor

        extractor = KeywordExtractor(top=CANDIDATES * tokens)
        found = [[keyword for keyword, _ in extractor.extract_keywords(text)] for text in texts]
        return [", ".join(with_new_words(keywords)) for keywords in found]


def with_new_words(keywords: Iterable[str]) -> list[str]:
    """Those keywords that have a word which none before them has."""
    kept, seen = [], set[str]()
    for keyword in keywords:
        words = set(keyword.lower().split())
        if words - seen:
            kept.append(keyword)
            seen |= words
    return kept
