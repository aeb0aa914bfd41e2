"""Task `classify`: which label a text has, asked about its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.data.bad_records import BadRecord
from compressor.data.prompts import QUESTION, question_ids
from compressor.data.records import record_id, string_value, text_value
from compressor.data.sources import Row
from compressor.errors import CompressorError
from compressor.evaluation.metrics import FigureOf
from compressor.evaluation.tasks.choices import (
    ACCURACY,
    NOTE,
    choice_columns,
    choice_room,
    choose,
    label_ids,
    most_frequent,
)
from compressor.evaluation.tasks.interface import Item, Result, Task, tokenised
from compressor.evaluation.tasks.records import field_of, task_records, texts_of
from compressor.methods.interface import Method, Piece

if TYPE_CHECKING:
    from compressor.evaluation.settings import EvaluationConfig

NEEDS = (
    "The task classify reads records with the fields text and label, or sentences and labels (lists): name files, or "
    "a hub id and --split, with --data; CSAbstruct is allenai/csabstruct, SST-2 stanfordnlp/sst2"
)
QUESTIONS = {
    frozenset({"positive", "negative"}): "Is this review positive or negative?",
    frozenset({"background", "objective", "method", "result", "other"}): (
        "What does this sentence of an abstract state: background, objective, method, result or other?"
    ),
}
"""Questions for known sets of labels (SST-2, CSAbstruct)."""


class Classify(Task):
    """The label of a text (sentiment of a review, role of a sentence in an abstract) by label log-likelihood.

    Only the memory knows the text: the question names the labels. Of a record of sentences each one is an item, without
    those around it. The labels are those that occur in the data set, each scored as the answer to `QUESTIONS`, or to
    "Which of these is it: A, B or C?", in the checkpoint's question template.
    """

    default_data = ("allenai/csabstruct", "stanfordnlp/sst2")
    figures: Mapping[str, FigureOf] = ACCURACY

    def load(self, source: str, config: EvaluationConfig) -> list[dict[str, str]]:
        """`id`, `text` and `label` of the first `limit` texts."""
        found = task_records(source, config, NEEDS, lambda row: _labelled(row, source), self.left_out)
        return [text for texts in found for text in texts][: config.limit]

    def items(self, records: Sequence[dict[str, str]], tokenizer: Any, config: EvaluationConfig) -> list[Item]:
        """One item for each text, in the order of the data."""
        labels = sorted({record["label"] for record in records})
        if len(labels) < 2:
            raise CompressorError(
                f"all {len(records)} texts have the label {labels[0]!r}: there is nothing to tell apart; give more or "
                "other data"
            )
        named = [label.replace("_", " ") for label in labels]
        default = f"Which of these is it: {', '.join(named[:-1])} or {named[-1]}?"
        question = QUESTIONS.get(frozenset(labels), default)
        asked = {
            "prompt": question_ids(tokenizer, [question], config.question_template or QUESTION)[0],
            "labels": labels,
            "label_ids": label_ids(tokenizer, labels),
            "usual": most_frequent([record["label"] for record in records]),
        }
        return [
            Item(records[place]["id"], ids, asked={**asked, "label": records[place]["label"]})
            for place, ids in tokenised([record["text"] for record in records], tokenizer)
            if ids
        ]

    def room(self, item: Item) -> int:
        return choice_room(item)

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        return choose(method, items, contexts)

    def columns(self, result: Result) -> dict[str, float]:
        return choice_columns(result)

    def note(self) -> str:
        return NOTE


def _labelled(row: Row, source: str) -> list[dict[str, str]]:
    """Texts with their labels: one of a row, or one for each of its sentences."""
    field = next((name for name in ("id", "abstract_id", "idx") if name in row.values), "id")
    name = record_id(row, field, default=f"{source}:{row.number}")
    if "sentences" in row.values:
        sentences = texts_of(row, "sentences")
        labels = texts_of(row, field_of(row, ("labels",), NEEDS))
        if len(sentences) != len(labels):
            raise BadRecord(f"{row.where}: {len(sentences)} sentences have {len(labels)} labels")
        pairs = zip(sentences, labels, strict=True)
        return [
            {"id": f"{name}:{i}", "text": text, "label": label.lower()}
            for i, (text, label) in enumerate(pairs, start=1)
        ]
    text = text_value(row, field_of(row, ("text", "sentence"), NEEDS))
    return [{"id": name, "text": text, "label": _label(row)}]


def _label(row: Row) -> str:
    """A label in lower case; a number stands for itself."""
    name = field_of(row, ("label",), NEEDS)
    value = row.values[name]
    if isinstance(value, int):
        return str(value).lower()
    return string_value(row, name, blank=False).lower()
