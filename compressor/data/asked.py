"""Passages with the questions asked about them, tokenised, and the plan of which go into which micro-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.data.batches import ROUND, Rounds, equal_segments
from compressor.data.prompts import answer_ids, place_questions, question_ids
from compressor.data.questions import Question
from compressor.data.rows import LeftOut
from compressor.errors import CompressorError

QUESTIONS_TOGETHER = 4
"""Most questions asked of one encoding of a passage in a micro-batch."""


@dataclass(frozen=True)
class Asked:
    """A passage and the questions it answers; one about which instructions are given may be over the limit."""

    id: str
    ids: list[int]
    """Tokens of the passage."""
    prompts: list[list[int]]
    """Tokens of the question prompts."""
    answers: list[list[int]]
    """Tokens of the first right answers; none for a question that the passage does not answer."""
    context: int
    """Number of the context that it is a stretch of."""

    @property
    def length(self) -> int:
        return len(self.ids)

    def segments(self, most: int) -> list[list[int]]:
        """See `equal_segments`."""
        return equal_segments(self.ids, most)


def questions_digest(asked: Sequence[Asked]) -> str:
    """Number of passages with questions, and a hash over the tokens of passages, questions and answers."""
    found = hashlib.sha256()
    for one in asked:
        for ids in (one.ids, *one.prompts, *one.answers):
            found.update(len(ids).to_bytes(4, "little") + np.array(ids, dtype=np.int64).tobytes())
    return f"{len(asked):,} passages with questions {found.hexdigest()[:16]}"


def ask(
    questions: Sequence[Question],
    tokenizer: Any,
    template: str,
    most: int,
    left_out: LeftOut | None = None,
    longest: int | None = None,
) -> list[Asked]:
    """Group questions by passage and tokenise them.

    A context over `most` tokens is cut; a question then goes to the window that holds its answer (`place_questions`).
    Where none holds it, and where it is an instruction, it is about the whole context, in segments. The answer to an
    unanswerable question is no token but EOS.

    Args:
        template: see `question_ids`.
        most: most tokens of a window.
        left_out: counts the questions that are left out.
        longest: leave questions about longer passages out.

    Raises:
        CompressorError: there is no question left.
    """
    left_out = LeftOut() if left_out is None else left_out
    placed = []
    for one in place_questions(questions, tokenizer, most, left_out, whole=True):
        if longest is None or len(one.ids) <= longest:
            placed.append(one)
        else:
            left_out.add("beyond_positions", one.question.id)
    if not placed:
        raise CompressorError(
            f"there is no question to train on: {left_out.line('questions', 0) or 'the data holds none'}"
        )
    prompts = question_ids(tokenizer, [one.question.question for one in placed], template)
    answers = answer_ids(tokenizer, [one.question.answers for one in placed])
    grouped: dict[int, Asked] = {}
    for one, prompt, answer in zip(placed, prompts, answers, strict=True):
        asked = grouped.setdefault(id(one.ids), Asked(one.question.id, one.ids, [], [], one.context))
        asked.prompts.append(prompt)
        asked.answers.append(answer)
    return list(grouped.values())


@dataclass(frozen=True)
class Draw:
    """A passage and those of its questions that a micro-batch asks."""

    passage: int
    """Place in the list of `Asked`."""
    questions: tuple[int, ...]
    length: int


class QuestionPlan(Rounds[Draw]):
    """Micro-batches of passages in random order, each with up to `QUESTIONS_TOGETHER` of its questions.

    Args:
        shares: how many passages each data set has, in their order, and which share of those drawn are its.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        batch_tokens: int,
        batch_passages: int,
        seed: int,
        shares: Sequence[tuple[int, float]],
    ):
        super().__init__(batch_tokens, batch_passages, seed)
        self.asked = asked
        self.sizes, self.shares = (np.array(one) for one in zip(*shares, strict=True))

    def draw_round(self, rng: np.random.Generator, number: int) -> list[Draw]:
        drawn = []
        if len(self.sizes) == 1:
            places = rng.integers(len(self.asked), size=ROUND)
        else:
            sets = rng.choice(len(self.sizes), size=ROUND, p=self.shares / self.shares.sum())
            places = (np.cumsum(self.sizes) - self.sizes)[sets] + rng.integers(self.sizes[sets])
        for place in places.tolist():
            count = len(self.asked[place].prompts)
            questions = rng.permutation(count)[:QUESTIONS_TOGETHER].tolist()
            drawn.append(Draw(place, tuple(questions), self.asked[place].length))
        return drawn
