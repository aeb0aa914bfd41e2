"""`keywords`: the passage's keywords by YAKE (Campos et al. 2020, doi 10.1016/j.ins.2019.09.013)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from compressor.errors import CompressorError, lacking
from compressor.methods.interface import MethodSettings, TextMethod
from compressor.model.base import Base

CANDIDATES = 4
"""Keywords asked for with every token of the prompt: many repeat words of earlier ones."""


class Keywords(TextMethod):
    """Keywords in the order of their importance, with commas between them, cut to k tokens.

    A keyword all of whose words stand in earlier ones is left out. A passage without keywords (a formula, say) stands
    for itself, as in `truncate`.

    Args:
        language: ISO 639-1 code of the stop words.

    Raises:
        CompressorError: yake is not installed, or has no stop words of the language.
    """

    name = "keywords"

    def __init__(self, base: Base, language: str = "en"):
        super().__init__(base)
        spec = find_spec("yake")
        if spec is None or spec.origin is None:
            raise lacking("the method keywords", "yake", "keywords")
        # yake takes stop words of no language for one that it does not know, without a word.
        lists = Path(spec.origin).parent / "core" / "StopwordsList"
        known = sorted(path.stem.removeprefix("stopwords_") for path in lists.glob("stopwords_??.txt"))
        if known and language not in known:
            raise CompressorError(
                f"keyword_language = {language!r} is not known to yake: give one of {', '.join(known)}"
            )
        self.language = language

    @classmethod
    def from_settings(cls, base: Base, settings: MethodSettings) -> Keywords:
        return cls(base, settings.keyword_language)

    def stand_ins(self, texts: Sequence[str], tokens: int) -> list[str]:
        """See `TextMethod.stand_ins`."""
        from yake import KeywordExtractor

        extractor = KeywordExtractor(lan=self.language, top=CANDIDATES * tokens)
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
