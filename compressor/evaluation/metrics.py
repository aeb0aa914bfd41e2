"""Figures of an evaluation: what is summed over passages, and how sums become a figure with its interval.

Every figure is a function of sums over passages (a mean, a ratio, corpus BLEU). A passage therefore leaves a few
numbers (`TextScores`), any process can compute them, and resampling passages is a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

RESAMPLES = 1000
LEVEL = 0.95
NGRAMS = 4
BLEU_COLUMNS = (
    *(f"bleu_match_{n}" for n in range(1, NGRAMS + 1)),
    *(f"bleu_total_{n}" for n in range(1, NGRAMS + 1)),
    "bleu_written",
    "bleu_wanted",
)
"""What a passage adds to corpus BLEU: n-grams matched, n-grams written, words written and words wanted."""

Sums = Mapping[str, np.ndarray]
"""For each column its sum over the passages of every resample, float64 `[resamples]`."""


@dataclass(frozen=True)
class Figure:
    """How a figure is called and shown."""

    label: str
    direction: int
    """1: higher is better, -1: lower is better, 0: neither."""
    decimals: int
    interval: bool = True
    """Whether tables show the interval."""


FIGURES = {
    "bleu": Figure("BLEU", 1, 1),
    "rouge_l": Figure("ROUGE-L", 1, 3),
    "exact_match": Figure("exact match", 1, 3),
    "token_accuracy": Figure("token accuracy", 1, 3),
    "nll_per_token": Figure("nats/token", -1, 3),
    "token_ratio": Figure("token ratio", 0, 1, interval=False),
    "byte_ratio": Figure("byte ratio", 0, 4, interval=False),
}
"""Every figure a task can report. A new one is a line here and a function of sums in its task."""


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    columns: Mapping[str, Sequence[float] | np.ndarray],
    figures: Mapping[str, Callable[[Sums], np.ndarray]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """Figures with percentile bootstrap intervals over passages.

    All figures see the same resamples, and so do calls with the same seed and number of passages. Where every
    passage has the same score (nothing matches exactly, say) the interval has no width: it then says nothing about
    passages unlike those measured.

    Args:
        columns: a number for each passage, `[passages]` each, at least one passage.
        figures: name to a function from sums over passages to the figure.
        level: share of the resamples inside the interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    names = list(columns)
    table = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)
    count = len(table)
    rng = np.random.default_rng(seed)
    drawn = [table.sum(axis=0, keepdims=True)]
    step = max(1, 20_000_000 // count)  # bounds the matrix of multiplicities to 160 MB
    for start in range(0, resamples, step):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        drawn.append(times @ table)
    sums = dict(zip(names, np.concatenate(drawn).T, strict=True))
    results = {}
    for name, figure in figures.items():
        values = figure(sums)
        low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2]) if resamples else values[[0, 0]]
        results[name] = Interval(float(values[0]), float(low), float(high))
    return results


def ratio(above: str, below: str) -> Callable[[Sums], np.ndarray]:
    """The figure that divides the sum of one column by the sum of another; 0 where there is nothing to divide by."""

    def figure(sums: Sums) -> np.ndarray:
        return np.divide(sums[above], sums[below], out=np.zeros_like(sums[above]), where=sums[below] != 0)

    return figure


def bleu(sums: Sums) -> np.ndarray:
    """Corpus BLEU of every resample, 0 to 100, by sacrebleu's own formula (Post, arXiv 1804.08771)."""
    rows = np.stack([sums[name] for name in BLEU_COLUMNS], axis=1).round().astype(int).tolist()
    return np.array(
        [
            BLEU.compute_bleu(row[:NGRAMS], row[NGRAMS : 2 * NGRAMS], row[-2], row[-1], smooth_method="exp").score
            for row in rows
        ]
    )


@lru_cache(maxsize=1)
def bleu_signature() -> str:
    """sacrebleu's description of how `bleu` tokenises and counts, for reports."""
    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])  # the signature names the number of references, known after a score
    return str(metric.get_signature())


@lru_cache(maxsize=1)
def _sentence_bleu() -> BLEU:
    # Counts do not depend on the effective order; without it sacrebleu warns at every sentence.
    return BLEU(effective_order=True)


@lru_cache(maxsize=1)
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False)


def bleu_statistics(written: str, wanted: str) -> dict[str, int]:
    """What a passage adds to corpus BLEU, under the names `BLEU_COLUMNS`."""
    score = _sentence_bleu().sentence_score(written, [wanted])
    values = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    return dict(zip(BLEU_COLUMNS, map(int, values), strict=True))


def rouge_l(written: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words, 0 to 1 (Lin 2004; the rouge-score package).

    Words are runs of ASCII letters and digits in lower case: only an exact copy of a text without any scores above 0.
    """
    return 1.0 if written == wanted else float(_rouge().score(wanted, written)["rougeL"].fmeasure)


def exact_match(written: str, wanted: str) -> bool:
    """Whether the texts are the same, character for character."""
    return written == wanted
