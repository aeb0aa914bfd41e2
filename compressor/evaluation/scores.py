"""How answers to instructions are judged: every metric by the name that a preset gives.

A new one is a line in `SCORES`: what an answer adds, and figures of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compressor.evaluation.metrics import (
    CORPUS_BLEU,
    CORPUS_CHRF,
    FigureOf,
    ItemFigure,
    Sums,
    answer_scores,
    answer_words,
    bleu_statistics,
    chrf_statistics,
    divided,
    ratio,
    rouge_l,
    rouge_scores,
    word_errors,
)


def compared(name: str, figure: FigureOf) -> dict[str, FigureOf]:
    """A figure, its paired difference to the full passage's, and the share it keeps of what the passage adds.

    The share, (M - Mnone) / (Mfull - Mnone) (arXiv 2510.20797), is there against the bounds as they are and tuned.
    Higher scores are better.
    """

    def under(bound: str, columns: Sums, times: tuple[np.ndarray, ...]) -> np.ndarray:
        return figure({one: columns[f"{bound}_{one}"] for one in figure.needs}, *times)

    def share(none: str, full: str) -> Callable[..., np.ndarray]:
        def compute(columns: Sums, *times: np.ndarray) -> np.ndarray:
            least = under(none, columns, times)
            gain = np.maximum(under(full, columns, times) - least, 0)
            return divided(figure(columns, *times) - least, gain)

        return compute

    def needs(*bounds: str) -> tuple[str, ...]:
        return (*figure.needs, *(f"{bound}_{one}" for bound in bounds for one in figure.needs))

    kind = type(figure)
    return {
        name: figure,
        f"{name}_difference": kind(needs("full"), lambda c, *times: figure(c, *times) - under("full", c, times)),
        f"normalised_{name}": kind(needs("none", "full"), share("none", "full")),
        f"normalised_{name}_tuned": kind(needs("none_tuned", "full_tuned"), share("none_tuned", "full_tuned")),
    }


class Answered(NamedTuple):
    """An answer and what it is judged by."""

    written: str
    right: Sequence[str]
    passage: str
    members: tuple[Sequence[str], Sequence[str]] = ((), ())
    """Of a list: those written, those wanted."""
    logprobs: Mapping[str, float] = {}
    """Mean log-probability a token of each label."""
    usual: str = ""
    """The most frequent label of the data set."""


class Score(NamedTuple):
    """A metric."""

    columns: Callable[[Answered], Mapping[str, Any]]
    """The numbers an answer adds."""
    figures: Mapping[str, FigureOf]
    note: str = ""


def _lists(one: Answered) -> dict[str, int]:
    written, wanted = ({" ".join(answer_words(member)) for member in side} - {""} for side in one.members)
    return {"list_found": len(written & wanted), "list_written": len(written), "list_wanted": len(wanted)}


def _f1(sums: Sums) -> np.ndarray:
    both = sums["list_written"] + sums["list_wanted"]
    return divided(200 * sums["list_found"], both)


def shares(logprobs: Mapping[str, float]) -> np.ndarray:
    """Probabilities of the labels, in their order."""
    values = np.array(list(logprobs.values()))
    found = np.exp(values - values.max())
    return found / found.sum()


def _ranked(one: Answered) -> dict[str, float]:
    first = next(iter(one.logprobs))
    return {"first_share": float(shares(one.logprobs)[0]), "is_first": float(one.right[0] == first)}


def _graded(one: Answered) -> dict[str, float]:
    values = np.array([float(label) for label in one.logprobs])
    return {"expected": float(shares(one.logprobs) @ values), "graded": float(one.right[0])}


def auc(columns: Sums, times: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of the first label: how often it is likelier where it is right; ties count half."""
    share, first = columns["first_share"], columns["is_first"]
    above = (share[:, None] > share[None]) + 0.5 * (share[:, None] == share[None])
    right, wrong = times * first, times * (1 - first)
    return divided(((right @ above) * wrong).sum(1), right.sum(1) * wrong.sum(1))


def _correlation(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Pearson's correlation, each item counted so many times; NaN where one side does not vary."""
    count = times.sum(1)
    x, y = x - x.mean(), y - y.mean()
    mean = [times @ one / count for one in (x, y, x * x, y * y, x * y)]
    spread = np.maximum(mean[2] - mean[0] ** 2, 0) * np.maximum(mean[3] - mean[1] ** 2, 0)
    return np.divide(
        mean[4] - mean[0] * mean[1], np.sqrt(spread), out=np.full(len(times), np.nan), where=spread > 1e-18
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, those of equals shared."""
    return (values[:, None] > values[None]).sum(1) + (values[:, None] == values[None]).sum(1) / 2


def _pearson(columns: Sums, times: np.ndarray) -> np.ndarray:
    return _correlation(columns["expected"], columns["graded"], times)


def _spearman(columns: Sums, times: np.ndarray) -> np.ndarray:
    return _correlation(_ranks(columns["expected"]), _ranks(columns["graded"]), times)


def _answers(one: Answered) -> dict[str, float]:
    return dict(zip(("em", "f1"), answer_scores(one.written, one.right), strict=True))


_GRADES = ("expected", "graded")
SCORES: dict[str, Score] = {
    "answers": Score(
        _answers,
        {"em": ratio("em", "items", 100), **compared("f1", ratio("f1", "items", 100))},
        "EM, F1: SQuAD's official normalisation, best of the right answers.",
    ),
    "rouge": Score(
        lambda one: rouge_scores(one.written, one.right),
        {
            "rouge_1": ratio("rouge_1", "items"),
            "rouge_2": ratio("rouge_2", "items"),
            **compared("rouge_l", ratio("rouge_l", "items")),
        },
        "ROUGE: F-measure without stemming, the best over the references.",
    ),
    "bleu": Score(
        lambda one: bleu_statistics(one.written, one.right[0]),
        compared("bleu", CORPUS_BLEU),
        "BLEU: of the corpus, against first references.",
    ),
    "chrf": Score(
        lambda one: chrf_statistics(one.written, one.right[0]),
        compared("chrf", CORPUS_CHRF),
        "chrF: of the corpus, against first references.",
    ),
    "source": Score(
        lambda one: {"source_overlap": rouge_l(one.written, one.passage)},
        {"source_overlap": ratio("source_overlap", "items")},
        "ROUGE-L of the source: overlap of what is written with the passage; a copy has 1.",
    ),
    "lists": Score(
        _lists,
        {
            "list_precision": ratio("list_found", "list_written", 100),
            **compared("list_recall", ratio("list_found", "list_wanted", 100)),
            **compared("list_f1", FigureOf(("list_found", "list_written", "list_wanted"), _f1)),
        },
        "precision, recall, set F1: of the members of all lists together, each compared as a whole.",
    ),
    "accuracy": Score(
        lambda one: {"right": one.written == one.right[0], "usual": one.usual == one.right[0]},
        {**compared("accuracy", ratio("right", "items", 100)), "majority": ratio("usual", "items", 100)},
        "Accuracy (%): the label of the highest log-likelihood a token (length-normalised, no EOS). majority: of the "
        "most frequent label alone.",
    ),
    "auc": Score(
        _ranked,
        compared("auc", ItemFigure(("first_share", "is_first"), auc)),
        "AUC: how often the first label is likelier where it is right than where it is not; chance is 0.5.",
    ),
    "correlation": Score(
        _graded,
        {"pearson": ItemFigure(_GRADES, _pearson), **compared("spearman", ItemFigure(_GRADES, _spearman))},
        "Pearson, Spearman: of the labels' expected value with the right number.",
    ),
    "words": Score(
        lambda one: dict(zip(("words_wrong", "words_wanted"), word_errors(one.written, one.right[0]), strict=True)),
        {"word_errors": ratio("words_wrong", "words_wanted")},
        "word error rate: words changed, left out and put in, by words of the reference.",
    ),
}
