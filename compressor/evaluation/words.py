"""Words of a text in any script, for figures that compare words."""

from __future__ import annotations

import unicodedata

import regex

UNSPACED = "".join(
    rf"\p{{Script={name}}}"
    for name in (
        *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar"),
        *("Javanese", "Balinese", "Tai_Tham", "New_Tai_Lue", "Tai_Le", "Tai_Viet"),
    )
)
"""Scripts that are written without spaces between words."""
_UNSPACED = regex.compile(rf"[{UNSPACED}]")
_WORD = regex.compile(
    rf"(?V1)[{UNSPACED}]\p{{M}}*"  # a character of a script without spaces, with its marks
    rf"|[[\p{{L}}\p{{N}}]--[{UNSPACED}]][[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]*"  # letters and digits of any other
    r"|\p{So}\p{M}*"  # a symbol that says something by itself, emoji above all
)
_PIECE = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|(?:(?![{UNSPACED}]).)+", regex.DOTALL)
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")
_ARTICLES = regex.compile(r"\b(?:a|an|the)\b")


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits, marks included, each emoji or such symbol, and in
    scripts without spaces each character.

    On text of ASCII these are the words of the rouge-score package.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def answer_words(text: str) -> list[str]:
    """The words that answers are compared by: SQuAD's normalisation (arXiv 1606.05250) in any script.

    Lower case, no punctuation, no English articles, split at white space; beyond the official script, punctuation is
    Unicode's, compatible characters (full-width digits, composed letters) are alike, and in scripts without spaces each
    character is a word, as in MLQA's evaluation (arXiv 1910.07475).
    """
    kept = _ARTICLES.sub(" ", _PUNCTUATION.sub("", _alike(text)))
    return [piece for word in kept.split() for piece in _PIECE.findall(word)]


def plain_words(text: str) -> list[str]:
    """Words with their punctuation and articles, for answers of which nothing else is left ("%", "A")."""
    return _alike(text).split()


def unspaced(text: str) -> bool:
    """Whether the text has characters of a script without spaces."""
    return _UNSPACED.search(text) is not None


def _alike(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
