"""Asking an instruct model for questions about an abstract: what it is told, what it must answer, what is accepted.

The model runs behind an OpenAI-compatible endpoint (`endpoint.py`); `read_pairs` reads a reply and `check_pair` decides
on each pair.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

SYSTEM = (
    "You write reading-comprehension questions about abstracts of scientific papers. Every answer must be copied word "
    "for word from the abstract: a short span of 1 to 10 words, such as a name, a number with its unit or a short "
    "phrase. A question must have exactly one right answer, must be understood without seeing the abstract, must not "
    "contain its answer and must not be answerable with yes or no."
)
REQUEST = (
    "Abstract:\n{abstract}\n\nWrite {count} different questions about this abstract with their answers. Reply with "
    'JSON only, in this form: {{"pairs": [{{"question": "...", "answer": "..."}}]}}'
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}
"""JSON schema of a reply."""

LONGEST_ANSWER = 20


class Pair(NamedTuple):
    """A question and its answer, as a model wrote them or as they were accepted."""

    question: str
    answer: str


def messages(abstract: str, count: int) -> list[dict[str, str]]:
    """The conversation that asks for `count` questions about an abstract."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": REQUEST.format(abstract=abstract, count=count)},
    ]


def read_pairs(reply: str) -> list[Pair] | None:
    """The pairs of a reply, also where it stands in other text; None if it does not keep to `SCHEMA`."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        value = json.loads(reply[start : end + 1])
        pairs = value["pairs"]
        if not isinstance(pairs, list):
            return None
        found = [Pair(pair["question"], pair["answer"]) for pair in pairs]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if all(isinstance(text, str) for pair in found for text in pair) else None


def check_pair(abstract: str, pair: Pair) -> Pair | str:
    """The pair as it is accepted, its answer written as in the abstract; or the reason why it is rejected.

    Reasons: `question_blank`, `answer_blank`, `answer_too_long` (more than `LONGEST_ANSWER` words), `not_a_span`,
    `answer_in_question`, `not_storable` (half a surrogate pair).
    """
    question = " ".join(pair.question.split())
    answer = " ".join(pair.answer.split())
    if not question:
        return "question_blank"
    if not answer.strip(" .,;:\"'"):
        return "answer_blank"
    if len(answer.split()) > LONGEST_ANSWER:
        return "answer_too_long"
    try:
        (question + answer).encode()
    except UnicodeEncodeError:
        return "not_storable"
    span = _span(abstract, answer) or _span(abstract, answer.strip(" .,;:\"'"))
    if span is None:
        return "not_a_span"
    return "answer_in_question" if _span(question, span) else Pair(question, span)


def _span(text: str, answer: str) -> str | None:
    """Whole words of `text` that are `answer`, as they are written there; the same case is preferred."""
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
    match = re.search(pattern, text) or re.search(pattern, text, re.IGNORECASE)
    return match.group() if match else None
