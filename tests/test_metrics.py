"""Metrics on known values, and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from compressor.evaluation.metrics import (
    BLEU_COLUMNS,
    FIGURES,
    bleu,
    bleu_signature,
    bleu_statistics,
    bootstrap,
    exact_match,
    ratio,
    rouge_l,
)
from compressor.evaluation.tasks import TASKS

PAIRS = [
    ("the cat sat on the mat today", "the cat sat on a mat today"),
    ("we prove a theorem, and then another one.", "We prove one theorem, and then another."),
    ("", "an empty answer scores nothing"),
    ("exactly the same words as wanted", "exactly the same words as wanted"),
    ("tiny", "tiny"),
]


def _columns(pairs: list[tuple[str, str]]) -> dict[str, list[float]]:
    statistics = [bleu_statistics(*pair) for pair in pairs]
    return {name: [float(one[name]) for one in statistics] for name in BLEU_COLUMNS}


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(1, 2), slice(2, 3), slice(4, 5), slice(0, 5)])
def test_bleu_is_sacrebleus_corpus_bleu(chosen: slice) -> None:
    written, wanted = zip(*PAIRS[chosen], strict=True)
    found = bootstrap(_columns(PAIRS[chosen]), {"bleu": bleu}, resamples=0)["bleu"].value
    assert found == pytest.approx(BLEU().corpus_score(list(written), [list(wanted)]).score, abs=1e-12)


def test_bleu_resamples_are_corpus_bleu_of_the_resampled_passages() -> None:
    rng = np.random.default_rng(7)
    times = rng.multinomial(len(PAIRS), np.full(len(PAIRS), 1 / len(PAIRS)), size=20)
    expected = []
    for row in times:
        chosen = [pair for pair, count in zip(PAIRS, row, strict=True) for _ in range(count)]
        written, wanted = zip(*chosen, strict=True)
        expected.append(BLEU().corpus_score(list(written), [list(wanted)]).score)
    found = bootstrap(_columns(PAIRS), {"bleu": bleu}, resamples=20, seed=7)["bleu"]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


def test_perfect_bleu_and_its_signature() -> None:
    assert bootstrap(_columns(PAIRS[3:4]), {"bleu": bleu})["bleu"].value == pytest.approx(100)
    assert bleu_signature().startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    assert rouge_l("the cat", "the cat sat") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert rouge_l("sat cat the", "the cat sat") == pytest.approx(1 / 3)
    assert rouge_l("The CAT!", "the cat") == pytest.approx(1.0)
    assert rouge_l("", "the cat") == 0.0
    assert rouge_l("字", "字") == 1.0  # no word that rouge-score knows, yet an exact copy


def test_exact_match_sees_every_character() -> None:
    assert exact_match("a b", "a b")
    assert not exact_match("a b ", "a b")


def test_ratio_divides_sums() -> None:
    columns = {"nats": [10.0, 2.0], "tokens": [4.0, 2.0], "nothing": [0.0, 0.0]}
    found = bootstrap(columns, {"a": ratio("nats", "tokens"), "b": ratio("nats", "nothing")})
    assert found["a"].value == 2.0  # not the mean of 2.5 and 1
    assert (found["a"].low, found["a"].high) == (1.0, 2.5)
    assert np.isnan(found["b"].value)  # a share of nothing


def test_bootstrap_repeats_with_its_seed() -> None:
    columns = {"x": np.random.default_rng(0).normal(size=40), "n": np.ones(40)}
    mean = {"mean": ratio("x", "n")}
    first = bootstrap(columns, mean, seed=1)
    assert first == bootstrap(columns, mean, seed=1)
    assert first != bootstrap(columns, mean, seed=2)
    assert first["mean"].low < first["mean"].value < first["mean"].high
    single = bootstrap({"x": [3.0], "n": [1.0]}, mean)["mean"]
    assert (single.value, single.low, single.high) == (3.0, 3.0, 3.0)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        found = bootstrap(
            {"x": rng.exponential(size=60), "n": np.ones(60)}, {"m": ratio("x", "n")}, resamples=400, seed=trial
        )["m"]
        hits += found.low <= 1.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_every_figure_of_every_task_can_be_shown() -> None:
    for task in TASKS.values():
        assert set(task.figures) <= set(FIGURES)
