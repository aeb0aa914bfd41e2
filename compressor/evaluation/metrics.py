"""Figures of an evaluation: what is summed over passages, and how sums become a figure with its interval.

Every figure is a function of sums over passages (a mean, a ratio, corpus BLEU). A passage therefore leaves a few
numbers, any process can compute them, and resampling passages is a product of matrices.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.helpers import extract_all_char_ngrams

from compressor.model.fidelity import edits

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
CHRF_COLUMNS = tuple(
    f"chrf_{what}_{n}" for what in ("written", "wanted", "match") for n in range(1, CHRF.CHAR_ORDER + 1)
)
"""What a passage adds to corpus chrF: for each order the character n-grams written, wanted and in both."""

UNSPACED = "".join(
    rf"\p{{Script={name}}}"
    for name in (
        *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar"),
        *("Javanese", "Balinese", "Tai_Tham", "New_Tai_Lue", "Tai_Le", "Tai_Viet"),
    )
)
"""Scripts that are written without spaces between words."""
_UNSPACED = regex.compile(rf"[{UNSPACED}]")
_WORD = regex.compile(
    rf"(?V1)[{UNSPACED}]\p{{M}}*"  # a character of a script without spaces, with its marks
    rf"|[[\p{{L}}\p{{N}}]--[{UNSPACED}]][[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]*"  # letters and digits of any other
    r"|\p{So}\p{M}*"  # a symbol that says something by itself, emoji above all
)
_PIECE = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|(?:(?![{UNSPACED}]).)+", regex.DOTALL)
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]")
_ARTICLES = regex.compile(r"\b(?:a|an|the)\b")

Sums = Mapping[str, np.ndarray]
"""For each column its sum over the passages of every resample, float64 `[resamples]`."""


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
) -> dict[str, Interval]:
    """Figures with percentile bootstrap intervals over passages.

    All figures see the same resamples, and so do calls with the same seed and number of passages. Where every
    passage has the same score (nothing matches exactly, say) the interval has no width: it then says nothing about
    passages unlike those measured.

    Args:
        columns: a number for each passage, `[passages]` each, at least one passage.
        figures: name to a function from sums over passages to the figure.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    return {name: interval(values) for name, values in resampled_figures(columns, figures, resamples, seed).items()}


def interval(values: np.ndarray) -> Interval:
    """A figure with its bounds, from its value on all items followed by those on each resample.

    Resamples in which it is undefined (NaN: a share of nothing) do not count.
    """
    defined = values[1:][~np.isnan(values[1:])]
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(defined) else values[[0, 0]]
    return Interval(float(values[0]), float(low), float(high))


def resampled_figures(
    columns: Mapping[str, Sequence[float] | np.ndarray],
    figures: Mapping[str, Callable[[Sums], np.ndarray]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What `bootstrap` takes intervals of: each figure on all items, then on each resample, `[1 + resamples]`."""
    names = list(columns)
    table = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)
    count = len(table)
    rng = np.random.default_rng(seed)
    drawn = [table.sum(axis=0, keepdims=True)]
    items = {name: figure for name, figure in figures.items() if isinstance(figure, ItemFigure)}
    columns = dict(zip(names, table.T, strict=True))
    found = {name: [figure(columns, np.ones((1, count)))] for name, figure in items.items()}
    step = max(1, 20_000_000 // count)  # bounds the matrix of multiplicities to 160 MB
    for start in range(0, resamples, step):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        drawn.append(times @ table)
        for name, figure in items.items():
            found[name].append(figure(columns, times.astype(np.float64)))
    sums = dict(zip(names, np.concatenate(drawn).T, strict=True))
    return {name: np.concatenate(found[name]) if name in found else figure(sums) for name, figure in figures.items()}


@dataclass(frozen=True)
class FigureOf:
    """A figure as a function of summed columns, and the columns it needs."""

    needs: tuple[str, ...]
    compute: Callable[..., np.ndarray]

    def __call__(self, *sums: Any) -> np.ndarray:
        return self.compute(*sums)


class ItemFigure(FigureOf):
    """A figure that no sums give, of the columns `[items]` and how often resamples have items, `[resamples, items]`."""


def ratio(above: str, below: str, scale: float = 1.0) -> FigureOf:
    """The figure that divides the sum of one column by the sum of another; NaN where there is nothing to divide by."""
    return FigureOf((above, below), lambda sums: scale * divided(sums[above], sums[below]))


def difference(first: str, second: str, count: str, scale: float = 1.0) -> FigureOf:
    """The mean over items of one column minus another: a paired difference."""
    needs = (first, second, count)
    return FigureOf(needs, lambda sums: scale * divided(sums[first] - sums[second], sums[count]))


def retained(score: str, least: str, most: str, direction: int = 1) -> FigureOf:
    """(M - Mnone) / (Mfull - Mnone): the share kept of what the passage adds (arXiv 2510.20797).

    NaN where the passage adds nothing: a share of a loss would look like a gain.

    Args:
        direction: 1 where higher scores are better, -1 where lower ones are.
    """

    def share(sums: Sums) -> np.ndarray:
        gain = np.maximum(direction * (sums[most] - sums[least]), 0)
        return divided(direction * (sums[score] - sums[least]), gain)

    return FigureOf((score, least, most), share)


def divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, NaN where there is nothing to divide by."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def bleu(sums: Sums) -> np.ndarray:
    """Corpus BLEU of every resample, 0 to 100, by sacrebleu's own formula (Post, arXiv 1804.08771).

    The order is the effective one: where nothing of four words was written, shorter n-grams count alone, so that a copy
    of a short text scores 100. Elsewhere it changes nothing.
    """
    rows = np.stack([sums[name] for name in BLEU_COLUMNS], axis=1).round().astype(int).tolist()
    return np.array(
        [
            BLEU.compute_bleu(
                row[:NGRAMS], row[NGRAMS : 2 * NGRAMS], row[-2], row[-1], smooth_method="exp", effective_order=True
            ).score
            for row in rows
        ]
    )


CORPUS_BLEU = FigureOf(BLEU_COLUMNS, bleu)


def chrf(sums: Sums) -> np.ndarray:
    """Corpus chrF of every resample, 0 to 100: F2 of character n-grams, which needs no words (Popović 2015).

    Sacrebleu's definition, whose own function takes texts and not sums.
    """
    written, wanted, match = np.split(np.stack([sums[name] for name in CHRF_COLUMNS]), 3)
    effective = (written > 0) & (wanted > 0)
    orders = np.maximum(effective.sum(axis=0), 1)
    precision, recall = (
        np.divide(match, of, out=np.zeros_like(match), where=effective).sum(axis=0) / orders for of in (written, wanted)
    )
    factor = CHRF.BETA**2
    below = factor * precision + recall
    return 100 * np.divide((1 + factor) * precision * recall, below, out=np.zeros_like(below), where=below > 0)


CORPUS_CHRF = FigureOf(CHRF_COLUMNS, chrf)


@lru_cache(maxsize=1)
def bleu_signature() -> str:
    """sacrebleu's description of how `bleu` tokenises and counts, for reports."""
    metric = _bleu()
    metric.corpus_score(["a"], [["a"]])  # the signature names the number of references, known after a score
    return str(metric.get_signature())


@lru_cache(maxsize=1)
def chrf_signature() -> str:
    """sacrebleu's description of how `chrf` counts, for reports."""
    metric = CHRF()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


@lru_cache(maxsize=1)
def _bleu() -> BLEU:
    return BLEU(effective_order=True)


class _Words(Tokenizer):
    """What rouge-score calls for the words of a text."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache
def _rouge(*kinds: str) -> RougeScorer:
    return RougeScorer(list(kinds), tokenizer=_Words())


def bleu_statistics(written: str, wanted: str) -> dict[str, int]:
    """What a passage adds to corpus BLEU, under the names `BLEU_COLUMNS`."""
    score = _bleu().sentence_score(written, [wanted])
    values = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    return dict(zip(BLEU_COLUMNS, map(int, values), strict=True))


def chrf_statistics(written: str, wanted: str) -> dict[str, int]:
    """What a passage adds to corpus chrF, under the names `CHRF_COLUMNS`."""
    ours, theirs = (extract_all_char_ngrams(text, CHRF.CHAR_ORDER) for text in (written, wanted))
    both = [(one & other).total() for one, other in zip(ours, theirs, strict=True)]
    # As sacrebleu: n-grams longer than what was wanted do not count against what was written.
    counts = [one.total() if other else 0 for one, other in zip(ours, theirs, strict=True)]
    return dict(zip(CHRF_COLUMNS, [*counts, *(one.total() for one in theirs), *both], strict=True))


def rouge_l(written: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words, 0 to 1 (Lin 2004; the rouge-score package).

    Words are those of any script (`words`). A text without any scores 1 for an exact copy and 0 for anything else.
    """
    return 1.0 if written == wanted else float(_rouge("rougeL").score(wanted, written)["rougeL"].fmeasure)


def rouge_scores(written: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, each the best over the references."""
    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    found = [_rouge(*names.values()).score(reference, written) for reference in references]
    return {name: max(float(scores[theirs].fmeasure) for scores in found) for name, theirs in names.items()}


def word_errors(written: str, wanted: str) -> tuple[int, int]:
    """Fewest words changed, left out or put in that make `written` of `wanted`, and the words of `wanted`."""
    theirs = words(wanted)
    return edits(theirs, words(written)), len(theirs)


def answer_scores(written: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer, 0 to 1 each, against the best of the right ones.

    On English these are the figures of SQuAD's official script (Rajpurkar et al. 2016, arXiv 1606.05250);
    `answer_words` says how other scripts are read. A right answer of which normalisation leaves nothing ("%", "A") is
    compared as it stands: else an empty answer would match it. A question without right answers is answered right by
    nothing, as in SQuAD 2.0.
    """
    if not answers:
        right = float(not answer_words(written))
        return right, right
    found = []
    for answer in answers:
        normal = answer_words if answer_words(answer) else plain_words
        ours, theirs = normal(written), normal(answer)
        shared, both = (Counter(ours) & Counter(theirs)).total(), len(ours) + len(theirs)
        # Nothing is all of nothing: as SQuAD 2.0's script has it, its F1 is its exact match.
        found.append((float(ours == theirs), 2 * shared / both if both else 1.0))
    return max(exact for exact, _ in found), max(f1 for _, f1 in found)


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits, marks included, each emoji or such symbol, and in
    scripts without spaces each character.

    On text of ASCII these are the words of the rouge-score package.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def answer_words(text: str) -> list[str]:
    """The words that answers are compared by: SQuAD's normalisation (arXiv 1606.05250) in any script.

    Lower case, no punctuation, no English articles, split at white space; beyond the official script, punctuation is
    Unicode's, compatible characters (full-width digits, composed letters) are alike, and in scripts without spaces each
    character is a word, as in MLQA's evaluation (arXiv 1910.07475).
    """
    kept = _ARTICLES.sub(" ", _PUNCTUATION.sub("", _alike(text)))
    return [piece for word in kept.split() for piece in _PIECE.findall(word)]


def plain_words(text: str) -> list[str]:
    """Words with their punctuation and articles, for answers of which nothing else is left ("%", "A")."""
    return _alike(text).split()


def unspaced(text: str) -> bool:
    """Whether the text has characters of a script without spaces."""
    return _UNSPACED.search(text) is not None


def _alike(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
