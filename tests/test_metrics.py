"""Metrics on known values, and the bootstrap."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from compressor.evaluation.figures import FIGURES
from compressor.evaluation.metrics import (
    BLEU_COLUMNS,
    CHRF_COLUMNS,
    answer_scores,
    bleu,
    bleu_signature,
    bleu_statistics,
    bootstrap,
    chrf,
    chrf_statistics,
    ratio,
    rouge_l,
    rouge_scores,
)
from compressor.evaluation.table import TASKS

PAIRS = [
    ("the cat sat on the mat today", "the cat sat on a mat today"),
    ("we prove a theorem, and then another one.", "We prove one theorem, and then another."),
    ("", "an empty answer scores nothing"),
    ("exactly the same words as wanted", "exactly the same words as wanted"),
    ("tiny", "tiny"),
]


def _columns(pairs: list[tuple[str, str]]) -> dict[str, list[float]]:
    statistics = [bleu_statistics(*pair) | chrf_statistics(*pair) for pair in pairs]
    return {name: [float(one[name]) for one in statistics] for name in (*BLEU_COLUMNS, *CHRF_COLUMNS)}


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(0, 5)])
def test_bleu_and_chrf_are_sacrebleus_corpus_figures(chosen: slice) -> None:
    written, wanted = zip(*PAIRS[chosen], strict=True)
    found = bootstrap(_columns(PAIRS[chosen]), {"bleu": bleu, "chrf": chrf}, resamples=0)
    for name, theirs in (("bleu", BLEU()), ("chrf", CHRF())):
        expected = theirs.corpus_score(list(written), [list(wanted)]).score
        assert found[name].value == pytest.approx(expected, abs=1e-12)


def _scores(written: str, wanted: str) -> dict[str, float]:
    """Every figure of one pair, 0 to 1."""
    found = bootstrap(_columns([(written, wanted)]), {"bleu": bleu, "chrf": chrf}, resamples=0)
    exact, f1 = answer_scores(written, [wanted])
    return {
        "bleu": found["bleu"].value / 100,
        "chrf": found["chrf"].value / 100,
        "rouge_l": rouge_l(written, wanted),
        "rouge_1": rouge_scores(written, [wanted])["rouge_1"],
        "em": exact,
        "f1": f1,
    }


SCRIPTS = {
    # A text, a copy of which a fifth is wrong, and an unrelated text with what an ASCII tokenizer sees of both.
    "Chinese": (
        "我们用 BERT 压缩长文本并回答问题",
        "我们用 BERT 压缩短文章并回答问题",
        "天气很好 BERT 他去公园散步了吗",
    ),
    "Japanese": (
        "この論文は記憶に圧縮する方法を示す",
        "この論文は記録に圧縮する仕方を示す",
        "きょうはとてもいい天気ですね",
    ),
    "Thai": ("ภาษาไทยไม่มีช่องว่างระหว่างคำ", "ภาษาไทยไม่มีช่องว่างระหว่างเมือง", "วันนี้อากาศดีมาก"),
    "Hindi": ("यह मॉडल लंबे पाठ को याद रखता है", "यह मॉडल छोटे पाठ को याद रखता है", "आज मौसम बहुत अच्छा था न"),
    "Russian": (
        "модель сжимает длинный текст в память",
        "модель сжимает короткий текст в память",
        "вчера шёл сильный дождь весь день",
    ),
    "Arabic": ("يضغط النموذج النص الطويل في ذاكرة", "يضغط النموذج النص القصير في ذاكرة", "كان الطقس جميلا جدا أمس"),
    "Greek": (
        "το μοντέλο συμπιέζει μεγάλο κείμενο εδώ",
        "το μοντέλο συμπιέζει μικρό κείμενο εδώ",
        "ο καιρός ήταν πολύ καλός χθες",
    ),
    "emoji": ("🙂 🚀 🌍 🐍 ❤️ 👍 🎉 🔥", "🙂 🚀 🌍 🐍 ❤️ 👎 🎉 🔥", "🍎 🍌 🍇 🍓 🍒 🍑 🥝 🍍"),
    "English": (
        "the model keeps a long text in mind",
        "the model keeps a short text in mind",
        "rain fell all of yesterday night",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_figures_work_on_any_script(script: str) -> None:
    """A copy is perfect, a text with a word wrong is near, an unrelated one is far: for every figure."""
    wanted, near, far = SCRIPTS[script]
    assert list(_scores(wanted, wanted).values()) == pytest.approx([1.0] * 6)
    scores, others = _scores(near, wanted), _scores(far, wanted)
    assert scores["em"] == others["em"] == 0
    for name in ("rouge_l", "rouge_1", "chrf", "f1"):
        assert 0.4 < scores[name] < 1, (name, scores[name])
        assert others[name] < 0.35, (name, others[name])


def test_a_known_word_among_unknown_ones_is_not_a_copy() -> None:
    assert rouge_l("BERT", "我们用 BERT 压缩") < 0.4
    assert rouge_l("Schrodinger", "Schrödinger") == 0
    assert rouge_l("cafe\u0301", "caf\u00e9") == 1  # the same letters, composed in two ways


@pytest.mark.parametrize("copy", ["tiny", "two words", "exactly three words", "字", "😀"])
def test_a_copy_of_a_short_text_is_perfect(copy: str) -> None:
    assert list(_scores(copy, copy).values()) == pytest.approx([1.0] * 6)


def test_words_of_english_are_those_of_rouge_score(texts: list[str]) -> None:
    theirs = RougeScorer(["rougeL"])
    for wanted, written in pairwise(texts[:60]):
        mixed = wanted[: len(wanted) // 2] + written[: len(written) // 2]
        if wanted.isascii() and mixed.isascii():
            assert rouge_l(mixed, wanted) == theirs.score(wanted, mixed)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("written", "answers", "exact", "f1"),
    [
        ("北京大学。", ["北京大学"], 1, 1),
        ("北京", ["北京大学"], 0, 2 / 3),
        ("１９９０年", ["1990年"], 1, 1),
        ("«Война и мир»", ["война и мир"], 1, 1),
        ("1987–1990", ["1987-1990"], 1, 1),
        ("“the” Straße", ["Strasse"], 1, 1),
        ("", ["A"], 0, 0),  # normalised, "A" is nothing, and so is an empty answer
        ("a", ["A"], 1, 1),
        ("%", ["%"], 1, 1),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", [""], 1, 1),  # what a base answers by itself may be nothing, and saying nothing agrees with it
        ("something", [""], 0, 0),
    ],
)
def test_answers_in_any_script(written: str, answers: list[str], exact: float, f1: float) -> None:
    assert answer_scores(written, answers) == pytest.approx((exact, f1))


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
    assert bleu_signature().startswith("nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:")


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    assert rouge_l("the cat", "the cat sat") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert rouge_l("sat cat the", "the cat sat") == pytest.approx(1 / 3)
    assert rouge_l("The CAT!", "the cat") == pytest.approx(1.0)
    assert rouge_l("", "the cat") == 0.0
    assert rouge_l("?!", "?!") == 1.0  # no word, yet an exact copy


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
    for task in (one.load()() for one in TASKS.values()):
        assert set(task.figures) <= set(FIGURES)
