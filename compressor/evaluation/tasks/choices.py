"""Choosing among labels by their likelihood, as tasks with a closed set of answers do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressor.data.prompts import answer_text
from compressor.evaluation.metrics import FigureOf, difference, ratio
from compressor.evaluation.tasks.interface import Item, Result
from compressor.methods.interface import Method, Piece
from compressor.model.generation import after, score

ACCURACY: Mapping[str, FigureOf] = {
    "accuracy": ratio("right", "items", 100),
    "majority": ratio("usual", "items", 100),
    "accuracy_difference": difference("right", "full_right", "items", 100),
    "retention_accuracy": ratio("right", "full_right"),
    "token_ratio": ratio("passage_tokens", "memory_tokens"),
}
"""Figures of a choice among labels."""
NOTE = (
    "Accuracy (%): the label of the highest log-likelihood a token (length-normalised, no EOS) after memory and "
    "question. majority: accuracy of always giving the most frequent label. accuracy - full: paired difference to the "
    "full passage."
)


def label_ids(tokenizer: Any, labels: Sequence[str]) -> list[list[int]]:
    """Token ids of labels as answers."""
    texts = [answer_text(label.replace("_", " ")) for label in labels]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def most_frequent(labels: Sequence[str]) -> str:
    """The most frequent label; of several the first in the alphabet."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def choose(method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
    """The label that each item's memory makes most likely.

    `Item.asked` holds `prompt` (token ids), `labels`, `label_ids` (token ids of each), `label` (the right one) and
    `usual` (the most frequent one of the data set).
    """
    base = method.base
    prefix = method.prefix(contexts)
    prompts = after(base, prefix, [item.asked["prompt"] for item in items])
    found: list[list[float]] = [[] for _ in items]
    for place in range(max(len(item.asked["labels"]) for item in items)):
        rows = [row for row, item in enumerate(items) if place < len(item.asked["labels"])]
        scored = score(
            base,
            prefix.select(torch.tensor(rows, device=base.device)),
            [prompts[row] for row in rows],
            [items[row].asked["label_ids"][place] for row in rows],
        )
        for row, one in zip(rows, scored, strict=True):
            found[row].append(float(one[:, 0].double().mean()))
    results: list[Result] = []
    for item, pieces, logprobs in zip(items, contexts, found, strict=True):
        labels = item.asked["labels"]
        prediction = labels[max(range(len(labels)), key=lambda i: logprobs[i])]
        results.append(
            {
                "label": item.asked["label"],
                "prediction": prediction,
                "right": prediction == item.asked["label"],
                "usual": item.asked["usual"] == item.asked["label"],
                "label_logprobs": dict(zip(labels, logprobs, strict=True)),
                "passage_tokens": len(item.passage),
                "memory_tokens": sum(piece.tokens for piece in pieces),
            }
        )
    return results


def choice_room(item: Item) -> int:
    """`Task.room` of a choice."""
    return 1 + len(item.asked["prompt"]) + max(map(len, item.asked["label_ids"]))


def choice_columns(result: Result) -> dict[str, float]:
    """Columns of `ACCURACY`."""
    return {
        "items": 1.0,
        **{name: float(result[name]) for name in ("right", "usual", "passage_tokens", "memory_tokens")},
    }
