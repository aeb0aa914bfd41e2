"""Texts that the demo knows by name."""

from __future__ import annotations

from typing import NamedTuple

from compressor.data.records import load_texts
from compressor.errors import CompressorError

EXAMPLE_TOKENS = 96
"""A shipped abstract is cut to this length, the shortest of the published evaluation."""


class Example(NamedTuple):
    """A text, where it is from, a question about it, and the tokens of it that are taken where not all are."""

    text: str
    source: str
    question: str | None = None
    length: int | None = None


PUBLISHED_ID = "2403.01735"
"""arXiv id of the published example, which no corpus of this project takes in."""
PUBLISHED = Example(
    "We show that every reciprocity sheaf gives rise to a cycle (pre)module in the sense of Rost over a perfect field. "
    "Over a perfect field of positive characteristic, we show that the first cohomology group of a logarithmic de "
    "Rham-Witt sheaf has a partial cycle module structure. As a consequence, we show that Kato complexes of "
    "logarithmic de Rham-Witt sheaves satisfy functoriality properties similar to Rost's cycle complexes.",
    f"arXiv {PUBLISHED_ID}, the example of arXiv 2408.03094, unseen in training",
    "Over what type of field do we show that Kato complexes satisfy functoriality properties?",
)

QUESTION = "What classical correspondence is extended?"
"""About the abstract that is shown where none is named."""


def example(name: str) -> Example:
    """The example of a name: `abstract` (an abstract later than all that is trained on), `published`, or the number of
    another such abstract.

    Raises:
        CompressorError: there is none of this name or number.
    """
    if name == "published":
        return PUBLISHED
    number = 0 if name == "abstract" else int(name) if name.isdecimal() else None
    if number is None:
        raise CompressorError(
            f"there is no example {name!r}: give abstract, published, or the number of a shipped test abstract"
        )
    shipped = load_texts("arxiv-test")
    if number >= len(shipped):
        raise CompressorError(f"example = {number} is out of range: there are {len(shipped)} test abstracts")
    record = shipped[number]
    source = f"arXiv {record['id']} ({record['date']}), unseen in training"
    return Example(record["text"], source, QUESTION if name == "abstract" else None, EXAMPLE_TOKENS)
