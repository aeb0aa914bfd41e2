"""Task `qa`: scores as SQuAD's official script has them, retention, paired differences, macro average."""

from __future__ import annotations

import collections
import copy
import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.commands.cli import evaluate_main
from compressor.data.prompts import question_ids
from compressor.errors import CompressorError
from compressor.evaluation.items import Item, run_fitting
from compressor.evaluation.metrics import (
    answer_scores,
    difference,
    interval,
    ratio,
    resampled_figures,
    retained,
)
from compressor.evaluation.tasks.qa import QuestionAnswering
from compressor.methods.bounds import Full
from compressor.model.config import CompressorConfig

CASES: list[tuple[str, list[str]]] = [
    ("The cat", ["cat"]),
    ("a cat, sat!", ["The cat sat", "dog"]),
    ("cat cat", ["cat"]),
    ("in 1990 AD", ["1990", "the year 1990"]),
    ("", ["something"]),
    ("10,000", ["10000"]),
    ("New-York", ["new york"]),
    ("Ångström", ["ångström"]),
    ("red blue", ["green"]),
]


def official(written: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 as evaluate-v1.1.py computes them."""

    def normalised(text: str) -> str:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(answer: str) -> float:
        ours, right = normalised(written).split(), normalised(answer).split()
        shared = sum((collections.Counter(ours) & collections.Counter(right)).values())
        if shared == 0:
            return 0.0
        precision, recall = shared / len(ours), shared / len(right)
        return 2 * precision * recall / (precision + recall)

    return float(max(normalised(written) == normalised(a) for a in answers)), max(map(f1, answers))


@pytest.mark.parametrize(("written", "answers"), CASES)
def test_scores_are_those_of_the_official_script(written: str, answers: list[str]) -> None:
    assert answer_scores(written, answers) == pytest.approx(official(written, answers))


@pytest.mark.parametrize(("written", "score"), [("", 1.0), (" The.", 1.0), ("something", 0.0)])
def test_nothing_is_the_right_answer_where_there_is_none(written: str, score: float) -> None:
    """As evaluate-v2.0.py scores questions without answers."""
    assert answer_scores(written, []) == (score, score)
    assert answer_scores("", ["something"]) == (0.0, 0.0)


def test_shares_of_nothing_are_undefined() -> None:
    """Neither 0 nor, where the passage does harm, a share of the harm."""
    columns = {"m": [3.0, 1.0], "full": [2.0, 0.0], "none": [1.0, 3.0], "zero": [0.0, 0.0]}
    figures = {
        "nothing": ratio("m", "zero"),
        "harm": retained("m", "none", "full"),
        "nats": retained("m", "none", "full", -1),
    }
    found = resampled_figures(columns, figures, resamples=20)
    assert np.isnan(found["nothing"]).all()
    assert np.isnan(found["harm"][0])
    assert found["nats"][0] == 0
    defined = found["nats"][~np.isnan(found["nats"])]
    one = interval(found["nats"])
    assert defined.min() <= one.low <= one.high <= defined.max()


def test_retention_and_differences_are_of_sums() -> None:
    columns = {"m": [1.0, 0.0, 1.0], "full": [1.0, 1.0, 1.0], "none": [0.0, 0.0, 1.0], "n": [1.0] * 3}
    figures = {
        "share": ratio("m", "full"),
        "kept": retained("m", "none", "full"),
        "lost": difference("m", "full", "n", 100),
    }
    found = {name: values[0] for name, values in resampled_figures(columns, figures, 20).items()}
    assert found == pytest.approx({"share": 2 / 3, "kept": 1 / 2, "lost": -100 / 3})


@pytest.fixture
def questions(tmp_path: Path, texts: list[str]) -> list[str]:
    """Two files of questions; the first has two questions about each context, the second contexts over the limit."""
    paths = []
    for number, (count, size) in enumerate(((3, 90), (2, 400))):
        path = tmp_path / f"set{number}.jsonl"
        with path.open("w") as file:
            for row, text in enumerate(texts[number * 5 : number * 5 + count]):
                context = text[:size]
                for place in range(2):
                    word = context.split()[place]
                    record = {"id": f"{number}-{row}-{place}", "passage": context, "question": f"Word {place}?"}
                    file.write(json.dumps(record | {"answers": [word, word.upper()], "dataset": "d"}) + "\n")
        paths.append(str(path))
    return paths


@pytest.fixture
def argv(tiny_compressor: Any, questions: list[str], tmp_path: Path) -> list[str]:
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    argv = ["--checkpoint", str(tmp_path / "checkpoint"), "--task", "qa", "--data", *questions, "--tokens", "8", "2"]
    return [*argv, "--question_columns", '{"context": "passage"}', "--resamples", "40"]


def test_rows_for_methods_data_sets_and_their_average(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["kv", "recite", "full", "none", "truncate"]
    assert evaluate_main([*argv, "--methods", *methods, "--output", str(tmp_path / "out")]) == 0
    assert "F1 / full" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = {(row["method"], row["tokens"], row["dataset"]): row for row in metrics["rows"]}
    sizes = [
        ("kv", 8),
        ("kv", 2),
        ("recite", 8),
        ("recite", 2),
        ("full", None),
        ("none", None),
        ("truncate", 8),
        ("truncate", 2),
    ]
    assert set(rows) == {(*size, data) for size in sizes for data in ("set0", "set1", "macro")}
    assert [rows["kv", 8, data]["n"] for data in ("set0", "set1", "macro")] == [6, 4, 10]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    for (method, tokens, data), row in rows.items():
        mine = [
            one
            for one in lines
            if (one["method"], one["tokens"]) == (method, tokens) and data in (one["dataset"], "macro")
        ]
        if data == "macro":
            parts = [rows[method, tokens, name] for name in ("set0", "set1")]
            assert row["answer_nats"] == pytest.approx(sum(part["answer_nats"] for part in parts) / 2)
            continue
        assert row["answer_nats"] == pytest.approx(sum(one["answer_nats"] for one in mine) / len(mine))
        nats = {name: rows[name, None, data]["answer_nats"] for name in ("full", "none")}
        kept = (row["answer_nats"] - nats["none"]) / (nats["full"] - nats["none"])
        assert row["normalised_nats"] == pytest.approx(kept)
    # A context over the limit is compressed in segments: all their memory tokens count.
    long = [one for one in lines if one["method"] == "kv" and one["tokens"] == 8 and one["dataset"] == "set1"]
    assert all(one["memory_tokens"] == 8 * -(-one["passage_tokens"] // 64) > 8 for one in long)
    assert all(one["memory_tokens"] == 0 for one in lines if one["method"] == "none")
    # Both read the memories of one checkpoint.
    assert metrics["methods"]["recite"] == metrics["methods"]["kv"] != {}


def test_without_bounds_there_is_no_retention(argv: list[str], tmp_path: Path) -> None:
    assert evaluate_main([*argv, "--limit", "2", "--segment_tokens", "16", "--output", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "retention_f1" not in metrics["figures"]
    assert all(row["retention_f1"] is None for row in metrics["rows"])
    first = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["memory_tokens"] == 8 * -(-first["passage_tokens"] // 16)


def test_unanswerable_questions_are_scored_and_what_cannot_be_placed_is_counted(
    tiny_compressor: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    context = texts[0][:200]
    right = {"context": context, "question": "First?", "answers": [context.split()[0]]}
    no_answer = {"context": context, "question": "Nothing?", "answers": {"text": [], "answer_start": []}}
    nowhere = {"id": "nowhere", "context": context, "question": "Where?", "answers": ["zzzz"]}
    path = tmp_path / "v2.jsonl"
    path.write_text("\n".join(map(json.dumps, (right, no_answer, nowhere))))
    argv = ["--checkpoint", str(tmp_path / "checkpoint"), "--task", "qa", "--data", str(path), "--tokens", "8"]
    argv += ["--question_tokens", "16", "--resamples", "10", "--output"]
    assert evaluate_main([*argv, str(tmp_path / "without")]) == 0
    metrics = json.loads((tmp_path / "without" / "metrics.json").read_text())
    assert {name: one["count"] for name, one in metrics["left_out"]["v2"].items()} == {
        "unanswerable": 1,
        "answer_not_found": 1,
    }
    assert metrics["rows"][0]["n"] == 1
    assert "unanswerable_f1" not in metrics["figures"]
    shown = capsys.readouterr().out
    assert "v2: left out 2 of 3 records: 1: the data says that the context does not answer it (first: " in shown
    assert "(first: nowhere)." in (tmp_path / "without" / "table.md").read_text()
    assert evaluate_main([*argv, str(tmp_path / "with"), "--keep_unanswerable", "true"]) == 0
    metrics = json.loads((tmp_path / "with" / "metrics.json").read_text())
    (row,) = metrics["rows"]
    assert row["n"] == 2
    lines = [json.loads(line) for line in (tmp_path / "with" / "predictions.jsonl").read_text().splitlines()]
    assert [line["answers"] for line in lines] == [right["answers"], []]
    assert lines[1]["f1"] == float(not lines[1]["prediction"])
    assert lines[1]["answer_tokens"] == 1  # EOS
    assert row["unanswerable_f1"] == 100 * lines[1]["f1"]
    assert row["answerable_f1"] == pytest.approx(100 * lines[0]["f1"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "kw"], "did you mean kv"),
        (["--methods", "icae"], "there is no checkpoint of the method icae"),
        (["--methods", "kv", "full", "kv=CHECKPOINT"], "names kv more than once"),
        (["--methods", "full=CHECKPOINT"], "the method full has no checkpoint"),
        (["--lengths", "96"], "lengths means nothing to --task qa"),
        (["--methods", "icae=CHECKPOINT"], "holds the method kv, not icae"),
        (["--question_template", "Answer!"], "no {question} in it"),
        (["--question_template", "chat"], "no chat template"),
        (["--question_columns", '{"context": "text"}'], "text"),
    ],
)
def test_bad_settings_end_with_a_message(
    argv: list[str], extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [one.replace("CHECKPOINT", str(tmp_path / "checkpoint")) for one in extra]
    assert evaluate_main([*argv, *extra, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


CHAT_TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}"
)


def test_a_chat_template_is_used_with_its_special_tokens(tiny_base: Any) -> None:
    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    (ids,) = question_ids(tokenizer, ["Why?"], "chat")
    assert (ids[0], ids[-2], ids[-1]) == (tiny_base.bos, tiny_base.eos, tiny_base.bos)
    assert tokenizer.decode(ids[1:-2]) == "Why?"
    assert tokenizer("<eos>", add_special_tokens=False)["input_ids"] != [tiny_base.eos]  # elsewhere it is text


def test_control_tokens_that_a_question_spells_are_text(tiny_base: Any) -> None:
    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(["<think>", "<other>"])  # not special; the template writes the first
    think, other = tokenizer.convert_tokens_to_ids(["<think>", "<other>"])
    question = "Is <eos><bos>a <think> or <other> there?"
    (ids,) = question_ids(tokenizer, [question], "chat")
    assert tokenizer.decode(ids[1:-2]).replace(" ", "") == question.replace(" ", "")
    assert not {tiny_base.bos, tiny_base.eos, think} & set(ids[1:-2])
    assert other in ids
    assert (ids[0], ids[-2], ids[-1]) == (tiny_base.bos, tiny_base.eos, tiny_base.bos)


def test_arguments_of_a_chat_template_are_passed(tiny_base: Any) -> None:
    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(["<think>"])
    (plain,) = question_ids(tokenizer, ["Why?"], "chat")
    (ids,) = question_ids(tokenizer, ["Why?"], 'chat {"enable_thinking": false}')
    assert ids == [*plain, tokenizer.convert_tokens_to_ids("<think>")]
    CompressorConfig(question_template='chat {"enable_thinking": false}')
    for template in ('chat {"enable_thinking": no}', "chatty"):
        with pytest.raises(CompressorError, match=r"no JSON object after chat|is out of range: it must be a text with"):
            CompressorConfig(question_template=template)
    tokenizer.chat_template = "{{ raise_exception('only with tools') }}"
    with pytest.raises(CompressorError, match=r"chat template fails .*only with tools"):
        question_ids(tokenizer, ["Why?"], "chat")


def test_a_right_answer_that_reaches_beyond_the_positions_is_not_scored(tiny_base: Any) -> None:
    """What is scored may be longer than the most that is written, and the base writes noise beyond its positions."""
    task, method = QuestionAnswering(), Full(tiny_base)
    assert tiny_base.positions is not None
    (long,), (prompt,) = tiny_base.tokenise(["heat " * 200]), tiny_base.tokenise(["Why?"])
    for answer, fits in ((long, False), (long[: task.new_tokens], True)):
        text = tiny_base.tokenizer.decode(answer)
        passage = [5] * (tiny_base.positions - 2 - len(prompt) - task.new_tokens)
        item = Item("a", passage, asked={"question": "Why?", "answers": [text], "prompt": prompt})
        (contexts,) = method.compress([passage], [1])
        (result,) = run_fitting(task, method, [item], contexts)
        assert (result == {"left_out": "beyond_positions"}) != fits
