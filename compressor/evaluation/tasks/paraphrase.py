"""Task `paraphrase`: whether a second sentence says what the first does, of which the decoder has only the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.data.bad_records import BadRecord
from compressor.data.prompts import QUESTION, question_ids
from compressor.data.records import record_id, text_value
from compressor.data.sources import Row
from compressor.evaluation.metrics import FigureOf, Sums
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
from compressor.evaluation.tasks.records import field_of, task_records
from compressor.methods.interface import Method, Piece

if TYPE_CHECKING:
    from compressor.evaluation.settings import EvaluationConfig

NEEDS = (
    "The task paraphrase reads records with the fields text, text2 and label (paraphrase or not_paraphrase, 1 or 0): "
    "name files, or a hub id, with --data; MRPC is nyu-mll/glue:mrpc"
)
ASKED = "Does this sentence say the same: {sentence}"
YES, NO = "yes", "no"
MEANINGS = {
    **dict.fromkeys(("paraphrase", "equivalent", "1", "true", "yes"), YES),
    **dict.fromkeys(("not_paraphrase", "not_equivalent", "0", "false", "no"), NO),
}
"""What labels say."""


def f1(sums: Sums) -> np.ndarray:
    """F1 (0 to 100) of the paraphrases, as GLUE has it for MRPC (arXiv 1804.07461)."""
    both = 2 * sums["true_positive"] + sums["false_positive"] + sums["false_negative"]
    return 100 * np.divide(2 * sums["true_positive"], both, out=np.zeros_like(both), where=both != 0)


class Paraphrase(Task):
    """Yes or no to "Does this sentence say the same: ...", in the checkpoint's question template, by log-likelihood."""

    default_data = ("nyu-mll/glue:mrpc",)
    figures: Mapping[str, FigureOf] = {
        "accuracy": ACCURACY["accuracy"],
        "f1": FigureOf(("true_positive", "false_positive", "false_negative"), f1),
        **{name: figure for name, figure in ACCURACY.items() if name != "accuracy"},
    }

    def load(self, source: str, config: EvaluationConfig) -> list[dict[str, str]]:
        """`id`, `text`, `text2` and `label` (yes or no) of the first `limit` pairs."""
        return task_records(source, config, NEEDS, lambda row: _pair(row, source), self.left_out)

    def items(self, records: Sequence[dict[str, str]], tokenizer: Any, config: EvaluationConfig) -> list[Item]:
        """One item for each pair: the first sentence is the passage."""
        questions = [ASKED.replace("{sentence}", record["text2"].strip()) for record in records]
        prompts = question_ids(tokenizer, questions, config.question_template or QUESTION)
        labels = [YES, NO]
        asked = {
            "labels": labels,
            "label_ids": label_ids(tokenizer, labels),
            "usual": most_frequent([record["label"] for record in records]),
        }
        return [
            Item(records[place]["id"], ids, asked={**asked, "prompt": prompts[place], "label": records[place]["label"]})
            for place, ids in tokenised([record["text"] for record in records], tokenizer)
            if ids
        ]

    def room(self, item: Item) -> int:
        return choice_room(item)

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        return choose(method, items, contexts)

    def columns(self, result: Result) -> dict[str, float]:
        said, wanted = result["prediction"] == YES, result["label"] == YES
        return {
            **choice_columns(result),
            "true_positive": float(said and wanted),
            "false_positive": float(said and not wanted),
            "false_negative": float(wanted and not said),
        }

    def note(self) -> str:
        return f"{NOTE} F1: of the pairs that are paraphrases (always saying yes already scores well)."


def _pair(row: Row, source: str) -> dict[str, str]:
    name = "id" if "id" in row.values else "idx"
    value = row.values[field_of(row, ("label",), NEEDS)]
    label = MEANINGS.get(str(value).lower())
    if label is None:
        raise BadRecord(f"{row.where}: the label {value!r} is none of {', '.join(MEANINGS)}")
    return {
        "id": record_id(row, name, default=f"{source}:{row.number}"),
        "text": text_value(row, field_of(row, ("text", "sentence1"), NEEDS)),
        "text2": text_value(row, field_of(row, ("text2", "sentence2"), NEEDS)),
        "label": label,
    }
