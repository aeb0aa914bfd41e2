"""Task `qa`: answer questions about a passage from its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressor.data.prompts import QUESTION, answer_ids, place_questions, question_ids
from compressor.data.questions import Question, load_questions
from compressor.evaluation.items import Item, Result, Task
from compressor.evaluation.metrics import FigureOf, answer_scores, answer_words, difference, ratio, retained
from compressor.methods.interface import Method, Piece
from compressor.model.decoder import score, shared
from compressor.model.generation import ANSWER_TOKENS, after, generate

KINDS = ("answerable", "unanswerable")
"""Kinds of questions, whose F1 is reported apart where some are unanswerable."""
ANSWERABLE_F1 = ratio("answerable_f1", "answerable_questions", 100)


class QuestionAnswering(Task):
    """Answer greedily after the passage's memory and a prompt; exact match and F1 as SQuAD's official script.

    Every question is one item. A passage over the compressor's limit is compressed in segments, whose memories the
    decoder sees one after the other.
    """

    default_data: Sequence[str] = ("squad-dev", "arxivqa-test")
    new_tokens = ANSWER_TOKENS
    """Most tokens of a written answer."""
    figures: Mapping[str, FigureOf] = {
        "em": ratio("em", "questions", 100),
        "f1": ratio("f1", "questions", 100),
        "f1_difference": difference("f1", "full_f1", "questions", 100),
        "retention_em": ratio("em", "full_em"),
        "retention_f1": ratio("f1", "full_f1"),
        "normalised_em": retained("em", "none_em", "full_em"),
        "normalised_f1": retained("f1", "none_f1", "full_f1"),
        "retention_em_tuned": ratio("em", "full_tuned_em"),
        "retention_f1_tuned": ratio("f1", "full_tuned_f1"),
        "normalised_em_tuned": retained("em", "none_tuned_em", "full_tuned_em"),
        "normalised_f1_tuned": retained("f1", "none_tuned_f1", "full_tuned_f1"),
        "answer_nats": ratio("answer_nats", "questions"),
        "normalised_nats": retained("answer_nats", "none_answer_nats", "full_answer_nats", -1),
        "normalised_nats_tuned": retained("answer_nats", "none_tuned_answer_nats", "full_tuned_answer_nats", -1),
        "token_ratio": ratio("passage_tokens", "memory_tokens"),
        "answerable_f1": FigureOf(
            ("answerable_f1", "answerable_questions", "unanswerable_questions"),
            # Without unanswerable questions it is F1.
            lambda sums: np.where(sums["unanswerable_questions"] > 0, ANSWERABLE_F1(sums), np.nan),
        ),
        "unanswerable_f1": ratio("unanswerable_f1", "unanswerable_questions", 100),
    }

    def load(self, source: str, config: Any) -> list[Question]:
        """The first `limit` questions of a data set."""
        return load_questions(
            source,
            split=config.split,
            limit=config.limit,
            columns=config.question_columns or None,
            keep_unanswerable=config.keep_unanswerable,
            skip_bad_records=config.skip_bad_records,
            left_out=self.left_out,
        )

    def items(self, records: Sequence[Question], tokenizer: Any, config: Any) -> list[Item]:
        """One item for each question; questions about one passage share its token ids.

        With `question_tokens` a question is about the stretch of its context that holds the answer.
        """
        placed = list(place_questions(records, tokenizer, config.question_tokens, self.left_out))
        asked = [one.question for one in placed]
        prompts = question_ids(tokenizer, [one.question for one in asked], config.question_template or QUESTION)
        return [
            Item(
                one.question.id,
                one.ids,
                asked={"question": one.question.question, "answers": list(one.question.answers), "prompt": prompt},
            )
            for one, prompt in zip(placed, prompts, strict=True)
        ]

    def room(self, item: Item) -> int:
        return 1 + len(item.asked["prompt"]) + self.new_tokens

    def beyond(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[bool]:
        """See `Task.beyond`; a right answer, which is scored, may be longer than what is written."""
        most, answers = (
            method.base.positions,
            answer_ids(method.base.tokenizer, [one.asked["answers"] for one in items]),
        )
        written = super().beyond(method, items, contexts)
        return [
            over or (most is not None and method.reach(pieces) + 1 + len(item.asked["prompt"]) + len(answer) > most)
            for over, item, pieces, answer in zip(written, items, contexts, answers, strict=True)
        ]

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        answers = answer_ids(base.tokenizer, [item.asked["answers"] for item in items])
        prefix = shared(contexts, method.prefix)
        prompts = after(base, prefix, [item.asked["prompt"] for item in items])
        written = generate(base, prefix, prompts, [self.new_tokens] * len(items))
        scored = score(base, prefix, prompts, [[*answer, base.eos] for answer in answers])
        results = []
        for row, item in enumerate(items):
            prediction = base.tokenizer.decode(written[row].ids, skip_special_tokens=True).strip()
            results.append(
                {
                    "question": item.asked["question"],
                    "answers": item.asked["answers"],
                    "prediction": prediction,
                    **self.judged(method, item, prediction),
                    "answer_nats": -float(scored[row][:, 0].double().sum()),
                    "answer_tokens": len(scored[row]),
                    "prediction_logprob": sum(written[row].logprobs),
                    "passage_tokens": len(item.passage),
                    "memory_tokens": sum(piece.tokens for piece in contexts[row]),
                }
            )
        return results

    def judged(self, method: Method, item: Item, written: str) -> dict[str, Any]:
        """What is said of a written answer."""
        return dict(zip(("em", "f1"), answer_scores(written, item.asked["answers"]), strict=True))

    def columns(self, result: Result) -> dict[str, float]:
        names = ("em", "f1", "answer_nats", "passage_tokens", "memory_tokens")
        kind = "answerable" if result["answers"] else "unanswerable"
        apart = dict.fromkeys((f"{one}_{name}" for one in KINDS for name in ("questions", "f1")), 0.0)
        apart |= {f"{kind}_questions": 1.0, f"{kind}_f1": float(result["f1"])}
        return {"questions": 1.0, **apart, **{name: float(result[name]) for name in names}}

    def cautions(self, results: Sequence[Result]) -> dict[str, int]:
        longer = sum(result["answer_tokens"] - 1 > ANSWER_TOKENS for result in results)
        bare = sum(not answer_words(one) for result in results for one in result["answers"][:1])
        return {
            f"have a first right answer of more than {ANSWER_TOKENS} tokens, where written ones are cut": longer,
            "have a first right answer of punctuation or articles alone, which is compared as it stands": bare,
        }

    def note(self) -> str:
        return (
            "EM, F1: SQuAD's official normalisation, best of the right answers; scripts without spaces by characters; "
            "where there is no right answer, saying nothing is right. "
            "F1 - full: paired difference to the full passage. EM / full, F1 / full: retention as published. "
            "(tuned): against full and none after a trained prefix. "
            "nats/answer: negative log-likelihood of the first right answer, EOS included. token ratio: "
            "passage tokens / memory tokens."
        )
