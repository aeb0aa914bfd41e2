"""Passages with the questions asked about them, tokenised, and the plan of which go into which micro-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.questions import Question
from compressor.data.rounds import ROUND, Rounds
from compressor.errors import CompressorError
from compressor.prompts import answer_text, question_ids

QUESTIONS_TOGETHER = 4
"""Most questions asked of one encoding of a passage in a micro-batch."""


@dataclass(frozen=True)
class Asked:
    """A passage of at most the compressor's limit, and the questions it answers."""

    id: str
    ids: list[int]
    """Tokens of the passage."""
    prompts: list[list[int]]
    """Tokens of the question prompts."""
    answers: list[list[int]]
    """Tokens of the first right answers."""
    context: int
    """Number of the context that it is a segment of."""

    @property
    def length(self) -> int:
        return len(self.ids)


def questions_digest(asked: Sequence[Asked]) -> str:
    """Number of passages with questions, and a hash over the tokens of passages, questions and answers."""
    found = hashlib.sha256()
    for one in asked:
        for ids in (one.ids, *one.prompts, *one.answers):
            found.update(len(ids).to_bytes(4, "little") + np.array(ids, dtype=np.int64).tobytes())
    return f"{len(asked):,} passages with questions {found.hexdigest()[:16]}"


def ask(
    questions: Sequence[Question], tokenizer: Any, template: str, segment: Callable[[Sequence[int]], list[list[int]]]
) -> list[Asked]:
    """Group questions by passage and tokenise them.

    A context over the compressor's limit is segmented; a question then goes to the segment that holds its answer, or
    to the first one where the answer straddles a cut.

    Args:
        template: see `question_ids`.
        segment: cuts token ids into segments (`Compressor.segment`).

    Raises:
        CompressorError: there is no question with a context and an answer.
    """
    usable = [question for question in questions if question.answers and question.context.strip()]
    contexts = list(dict.fromkeys(question.context for question in usable))
    if not contexts:
        raise CompressorError("there is no question with a context and an answer to train on")
    encoded = tokenizer(contexts, add_special_tokens=False, verbose=False)["input_ids"]
    segments = {context: segment(ids) for context, ids in zip(contexts, encoded, strict=True)}
    prompts = question_ids(tokenizer, [question.question for question in usable], template)
    texts = [answer_text(question.answers[0]) for question in usable]
    answers = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    numbers = {context: number for number, context in enumerate(contexts)}
    grouped: dict[tuple[str, int], tuple[list[list[int]], list[list[int]], str]] = {}
    for question, prompt, answer in zip(usable, prompts, answers, strict=True):
        place = answered_by(segments[question.context], tokenizer, question.answers[0])
        rows = grouped.setdefault((question.context, place), ([], [], question.id))
        rows[0].append(prompt)
        rows[1].append(answer)
    return [
        Asked(name, segments[context][place], asked, answered, numbers[context])
        for (context, place), (asked, answered, name) in grouped.items()
    ]


def answered_by(segments: Sequence[Sequence[int]], tokenizer: Any, answer: str) -> int:
    """Which segment of a context holds the answer; the first where none does, because a cut goes through it."""
    if len(segments) == 1:
        return 0
    texts = (tokenizer.decode(segment, skip_special_tokens=True) for segment in segments)
    return next((place for place, text in enumerate(texts) if answer in text), 0)


@dataclass(frozen=True)
class Draw:
    """A passage and those of its questions that a micro-batch asks."""

    passage: int
    """Place in the list of `Asked`."""
    questions: tuple[int, ...]
    length: int


class QuestionPlan(Rounds[Draw]):
    """Micro-batches of passages in random order, each with up to `QUESTIONS_TOGETHER` of its questions."""

    def __init__(self, asked: Sequence[Asked], batch_tokens: int, batch_passages: int, seed: int):
        super().__init__(batch_tokens, batch_passages, seed)
        self.asked = asked

    def draw_round(self, rng: np.random.Generator, number: int) -> list[Draw]:
        """See `Rounds`."""
        drawn = []
        for place in rng.integers(len(self.asked), size=ROUND).tolist():
            count = len(self.asked[place].prompts)
            questions = rng.permutation(count)[:QUESTIONS_TOGETHER].tolist()
            drawn.append(Draw(place, tuple(questions), self.asked[place].length))
        return drawn
