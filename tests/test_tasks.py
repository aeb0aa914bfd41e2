"""Tasks of evaluation besides regeneration and questions: figures against direct computation, data, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.commands.cli import evaluate_main
from compressor.data.questions import Question
from compressor.errors import CompressorError
from compressor.evaluation.figures import FIGURES
from compressor.evaluation.items import Item, Result, Task
from compressor.evaluation.report import text_table
from compressor.evaluation.settings import (
    ContinuationSettings,
    EvaluationConfig,
    QuestionAnsweringSettings,
    RetrieveSettings,
)
from compressor.evaluation.table import entry
from compressor.evaluation.tasks import retrieve
from compressor.evaluation.tasks.continuation import Continuation
from compressor.evaluation.tasks.interference import Interference
from compressor.evaluation.tasks.retrieve import Retrieve, reciprocal_rank
from compressor.methods.bounds import Full, Nothing
from compressor.methods.interface import MemoryMethod, Method
from compressor.model.base import Base

SENTENCE = "the memory of a passage holds what it says so that a decoder can answer questions about it later on"


def _text(seed: int, words: int = 14) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(SENTENCE.split(), size=words)) + "."


def _write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """A small file for each task."""
    return {
        "continuation": _write(tmp_path / "texts.jsonl", [{"id": str(i), "text": _text(i, 40)} for i in range(4)]),
        "summarise": _write(
            tmp_path / "tldr.jsonl",
            [{"id": str(i), "text": _text(i, 30), "targets": [_text(9 + i), _text(20 + i)]} for i in range(3)],
        ),
        "classify": _write(
            tmp_path / "roles.jsonl",
            [
                {
                    "id": str(i),
                    "sentences": [_text(i), _text(i + 5)],
                    "labels": ["background", ("method", "other")[i % 2]],
                }
                for i in range(3)
            ],
        ),
        "paraphrase": _write(
            tmp_path / "pairs.jsonl",
            [
                {
                    "id": str(i),
                    "text": _text(i),
                    "text2": _text(i + 3),
                    "label": ("paraphrase", "not_paraphrase")[i > 1],
                }
                for i in range(4)
            ],
        ),
        "retrieve": _write(
            tmp_path / "titled.jsonl",
            [{"id": str(i), "title": _text(i + 50, 4), "abstract": _text(i)} for i in range(7)],
        ),
    }


@pytest.fixture
def compressor(make_tiny_compressor: Callable[..., Any]) -> Any:
    return make_tiny_compressor()


def _nats(method: Method, passage: list[int], prompt: list[int], target: list[int]) -> list[float]:
    """Log-probabilities of a target after a passage and a prompt by one plain forward pass over all their tokens."""
    base = method.base
    ids = [base.bos, *passage, *prompt, *target]
    logprobs = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    first = len(ids) - len(target)
    return [float(logprobs[first - 1 + i, token]) for i, token in enumerate(target)]


def _run(task: Task, method: Method, config: EvaluationConfig, source: str) -> tuple[list[Item], list[Result]]:
    """Items of a source and their results with the whole passage in the prompt."""
    items = task.items(task.load(source, config), method.base.tokenizer, config)
    results: dict[int, Result] = {}
    for batch in task.batches(items, 2):
        (contexts,) = method.compress([items[i].passage for i in batch], [1])
        with torch.no_grad():
            results |= dict(zip(batch, task.run(method, [items[i] for i in batch], contexts), strict=True))
    return items, [results[i] for i in range(len(items))]


@pytest.mark.parametrize("name", ["continuation", "summarise", "classify", "paraphrase", "retrieve"])
def test_every_task_runs_from_the_command_line(
    compressor: Any, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    compressor.save_pretrained(tmp_path / "checkpoint")
    argv = ["--checkpoint", str(tmp_path / "checkpoint"), "--task", name, "--data", data[name], "--tokens", "4", "1"]
    argv += ["--methods", "kv", "full", "none", "--output", str(tmp_path / "out"), "--resamples", "20"]
    argv += ["--batch_size", "2", *(["--candidates", "3"] if name == "retrieve" else [])]
    assert evaluate_main(argv) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = metrics["rows"]
    assert [(row["method"], row["tokens"]) for row in rows] == [("kv", 4), ("kv", 1), ("full", None), ("none", None)]
    expected = {"continuation": 4, "summarise": 3, "classify": 6, "paraphrase": 4, "retrieve": 7}[name]
    assert {row["n"] for row in rows} == {expected}
    task = entry(name).load()(entry(name).settings(task=name))
    # What random weights keep of nothing is undefined, and there are no tuned bounds.
    shares = {figure for figure in task.figures if figure.startswith(("retention", "normalised"))}
    assert [one for one in metrics["figures"] if one not in shares] == [f for f in task.figures if f not in shares]
    assert set(metrics["figures"]) <= set(FIGURES)
    for row in rows:
        for figure in metrics["figures"]:
            undefined = figure in shares or (figure == "token_ratio" and row["method"] == "none")
            assert undefined if row[figure] is None else math.isfinite(row[figure])
            assert FIGURES[figure].label in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * expected
    assert task.note() in printed
    for figure in metrics["figures"]:
        if figure.endswith("_difference"):
            assert rows[2][figure] == 0


def test_continuation_scores_what_follows(tiny_base: Base, data: dict[str, str]) -> None:
    method = Full(tiny_base)
    config = ContinuationSettings(lengths=[12], limit=3)
    items, results = _run(Continuation(), method, config, data["continuation"])
    assert [len(item.passage) for item in items] == [12] * 3
    for item, result in zip(items, results, strict=True):
        following = item.asked["following"]
        whole = tiny_base.tokenizer(_text(int(item.id), 40), add_special_tokens=False)["input_ids"]
        assert item.passage + following == whole[: 12 + 65]
        expected = _nats(method, item.passage, following[:1], following[1:])
        assert result["nats"] == pytest.approx(-sum(expected), rel=1e-4)
        assert result["target_tokens"] == len(following) - 1
    task = Continuation()
    sums = {name: np.array([sum(task.columns(r)[name] for r in results)]) for name in task.columns(results[0])}
    assert task.figures["perplexity"](sums)[0] == pytest.approx(math.exp(task.figures["nll_per_token"](sums)[0]))

    halves = task.items(
        task.load(data["continuation"], ContinuationSettings()), tiny_base.tokenizer, ContinuationSettings()
    )
    assert [len(item.passage) for item in halves] == [
        len(tiny_base.tokenizer(_text(i, 40), add_special_tokens=False)["input_ids"]) // 2 for i in range(4)
    ]
    # A text that ends with the passage has nothing to score.
    assert not task.items(
        task.load(data["continuation"], ContinuationSettings()),
        tiny_base.tokenizer,
        ContinuationSettings(lengths=[5000]),
    )


def test_interference_is_of_passages_about_something_else(tiny_base: Base, tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "context": _text(i // 2, 20), "question": _text(9 + i, 4), "answers": [_text(20 + i, 2)]}
        for i in range(5)
    ]
    source, config = _write(tmp_path / "asked.jsonl", rows), QuestionAnsweringSettings(task="interference")
    items, results = _run(Interference(), Full(tiny_base), config, source)
    for item, row in zip(items, rows, strict=True):
        assert tiny_base.tokenizer.decode(item.passage) in {one["context"] for one in rows} - {row["context"]}
    # Ids that begin anew in another part of the data.
    again = [{**rows[place], "id": name} for place, name in zip((0, 2, 1, 3, 4), "abcab", strict=True)]
    items, _ = _run(Interference(), Full(tiny_base), config, _write(tmp_path / "again.jsonl", again))
    for item, row in zip(items, again, strict=True):
        assert tiny_base.tokenizer.decode(item.passage) in {one["context"] for one in rows} - {row["context"]}
    _, alone = _run(Interference(), Nothing(tiny_base), config, source)
    for one, other in zip(alone, results, strict=True):
        assert one["agreement"] == 1  # the same answer: nothing was read
        assert one["alone"] == other["alone"] == one["prediction"]
    assert any(one["answer_nats"] != other["answer_nats"] for one, other in zip(alone, results, strict=True))
    with pytest.raises(CompressorError, match="about one context"):
        _run(Interference(), Nothing(tiny_base), config, _write(tmp_path / "one.jsonl", rows[:2]))


def test_retrieval_ranks_by_the_querys_likelihood(tiny_base: Base, data: dict[str, str]) -> None:
    task, method = Retrieve(), Full(tiny_base)
    config = RetrieveSettings(candidates=3)
    items, results = _run(task, method, config, data["retrieve"])
    groups = task.batches(items, 1)
    assert groups == [[0, 1, 2], [3, 4], [5, 6]]  # as equal as can be, at most 3
    for group in groups:
        for query in group:
            asked = items[query].asked
            scores = [sum(_nats(method, items[i].passage, asked["prompt"], asked["query"])) for i in group]
            rank = 1 + sum(score > scores[group.index(query)] for score in scores)
            assert results[query]["reciprocal_rank"] == pytest.approx(1 / rank)
            assert results[query]["hit_1"] == (rank == 1)
            assert results[query]["candidates"] == len(group)
            assert results[query]["best"] == items[group[int(np.argmax(scores))]].id
    assert results[0]["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert tiny_base.tokenizer.decode(items[0].asked["prompt"]) == "\nTitle:"


def test_retrieval_without_passages_is_chance(tiny_base: Base, data: dict[str, str]) -> None:
    _, results = _run(Retrieve(), Nothing(tiny_base), RetrieveSettings(candidates=4), data["retrieve"])
    for result in results:
        assert result["reciprocal_rank"] == pytest.approx(result["chance"])
        assert result["hit_1"] == pytest.approx(1 / result["candidates"])


def test_memories_of_a_group_may_be_encoded_together(compressor: Any, data: dict[str, str]) -> None:
    """Results with memories do not depend on how many are encoded at once."""
    config = RetrieveSettings(candidates=7)
    first = _run(Retrieve(), MemoryMethod(compressor, 1), config, data["retrieve"])[1]
    second = _run(Retrieve(), MemoryMethod(compressor, 16), config, data["retrieve"])[1]
    assert [r["query_nats"] for r in first] == pytest.approx([r["query_nats"] for r in second], rel=1e-4)


def test_ties_share_ranks() -> None:
    assert reciprocal_rank([-1.0, -2.0, -3.0], 0) == (1.0, 1.0)
    assert reciprocal_rank([-1.0, -2.0, -3.0], 2) == (pytest.approx(1 / 3), 0.0)
    assert reciprocal_rank([-1.0, -1.0, -3.0], 1) == (pytest.approx(0.75), 0.5)
    assert reciprocal_rank([-1.0, -2.0, -2.00001], 1) == (pytest.approx((1 / 2 + 1 / 3) / 2), 0.0)


def test_short_names_of_the_hub_hold_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not a split is named."""
    asked = [Question(f"q{i}", f"Context {i}.", "What?", ("it",), "squad") for i in range(2)]
    monkeypatch.setattr(retrieve, "load_questions", lambda source, **_: asked)
    for split in (None, "validation"):
        assert len(Retrieve().load("squad", RetrieveSettings(split=split))) == 2


def test_retrieval_takes_a_passages_first_question(tmp_path: Path) -> None:
    records = [
        {"id": f"q{i}", "context": f"Context {i // 2}.", "question": f"Which {i}?", "answers": ["x"], "title": "T"}
        for i in range(6)
    ]
    task = Retrieve()
    found = task.load(_write(tmp_path / "q.jsonl", records), RetrieveSettings(limit=2))
    assert [(one["text"], one["query"]) for one in found] == [("Context 0.", "Which 0?"), ("Context 1.", "Which 2?")]
    with pytest.raises(CompressorError, match="two to tell apart"):
        task.load(_write(tmp_path / "one.jsonl", records[:2]), RetrieveSettings())
    assert len(task.load("arxiv-test", RetrieveSettings(limit=5))) == 5
    assert {one["starts"] for one in task.load("squad-dev", RetrieveSettings(limit=3))} == {"\nQuestion:"}


def test_tables_name_data_sets_where_there_are_several() -> None:
    rows = [{"method": "kv", "dataset": name, "tokens": 4, "length": None, "n": 3, "mrr": 0.5} for name in ("a", "b")]
    assert "dataset" in text_table(rows, ["mrr"])
    assert "dataset" not in text_table(rows[:1], ["mrr"])
