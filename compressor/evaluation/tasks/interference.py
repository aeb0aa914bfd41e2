"""Task `interference`: what a memory in the context does to questions that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from compressor.data.questions import Question
from compressor.errors import CompressorError
from compressor.evaluation.items import Item, Result
from compressor.evaluation.metrics import FigureOf, answer_scores, difference, ratio
from compressor.evaluation.tasks.qa import QuestionAnswering
from compressor.methods.interface import Method, Piece
from compressor.model.decoder import empty_prefix
from compressor.model.generation import after, generate


class Interference(QuestionAnswering):
    """`qa` with another context's passage in each question's place: what is read is of no use to the answer.

    Agreement is the F1 of the answer and the one that the base gives without any context: 100 where a memory changes
    nothing. (Learned memories do change answers: Cartridges, arXiv 2506.06266, and what followed.)
    """

    new_tokens = 24
    bounds = ("none",)
    figures: Mapping[str, FigureOf] = {
        "answer_nats": ratio("answer_nats", "questions"),
        "nats_added": difference("answer_nats", "none_answer_nats", "questions"),
        "f1": ratio("f1", "questions", 100),
        "f1_lost": difference("none_f1", "f1", "questions", 100),
        "agreement": ratio("agreement", "questions", 100),
    }

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._alone: dict[tuple[int, ...], str] = {}

    def items(self, records: Sequence[Question], tokenizer: Any, config: Any) -> list[Item]:
        """Each question with the passage of one that is about another context, half the data away."""
        items = super().items(records, tokenizer, config)
        # Not by the id alone: those of several files, read together, may begin anew in each.
        of_record = {(record.id, record.question): record.context for record in records}
        contexts = [of_record[item.id, item.asked["question"]] for item in items]
        swapped = []
        for place, item in enumerate(items):
            others = ((place + len(items) // 2 + step) % len(items) for step in range(len(items)))
            other = next((one for one in others if contexts[one] != contexts[place]), None)
            if other is None:
                raise CompressorError("all questions are about one context: give data with several, or a higher limit")
            swapped.append(replace(item, passage=items[other].passage))
        return swapped

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        results = super().run(method, items, contexts)
        base = method.base
        prompts = {tuple(item.asked["prompt"]) for item in items} - self._alone.keys()
        if asked := sorted(prompts):
            nothing = empty_prefix(base, len(asked))
            written = generate(base, nothing, after(base, nothing, asked), [self.new_tokens] * len(asked))
            texts = [base.tokenizer.decode(one.ids, skip_special_tokens=True).strip() for one in written]
            self._alone |= dict(zip(asked, texts, strict=True))
        for item, result in zip(items, results, strict=True):
            alone = self._alone[tuple(item.asked["prompt"])]
            result["alone"], result["agreement"] = alone, answer_scores(result["prediction"], [alone])[1]
        return results

    def columns(self, result: Result) -> dict[str, float]:
        return super().columns(result) | {"agreement": float(result["agreement"])}

    def note(self) -> str:
        return (
            "The passage is of another context than the question: a memory that keeps to itself changes nothing. "
            "nats/answer: negative log-likelihood of the first right answer; + nats, F1 lost: paired differences to no "
            "passage. agreement: F1 of the answer and the one given without any passage."
        )
