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
from rouge_score.rouge_scorer import RougeScorer

from compressor.commands.evaluate import evaluate_main
from compressor.data.left_out import LeftOut
from compressor.data.questions import Question
from compressor.errors import CompressorError
from compressor.evaluation.metrics import FIGURES
from compressor.evaluation.report import text_table
from compressor.evaluation.settings import EvaluationConfig
from compressor.evaluation.tasks import TASKS, Item, Result, Task, retrieve
from compressor.evaluation.tasks import records as records_module
from compressor.evaluation.tasks.choices import choose, label_ids, most_frequent
from compressor.evaluation.tasks.records import task_records
from compressor.evaluation.tasks.retrieve import Retrieve, reciprocal_rank
from compressor.methods.full import Full
from compressor.methods.interface import MemoryMethod, Method
from compressor.methods.none import Nothing
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
    argv += ["--batch_size", "2", "--candidates", "3"]
    assert evaluate_main(argv) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = metrics["rows"]
    assert [(row["method"], row["tokens"]) for row in rows] == [("kv", 4), ("kv", 1), ("full", None), ("none", None)]
    expected = {"continuation": 4, "summarise": 3, "classify": 6, "paraphrase": 4, "retrieve": 7}[name]
    assert {row["n"] for row in rows} == {expected}
    # What random weights keep of nothing is undefined.
    shares = {figure for figure in TASKS[name].figures if figure.startswith(("retention", "normalised"))}
    assert [one for one in metrics["figures"] if one not in shares] == [
        f for f in TASKS[name].figures if f not in shares
    ]
    assert set(metrics["figures"]) <= set(FIGURES)
    for row in rows:
        for figure in metrics["figures"]:
            undefined = figure in shares or (figure == "token_ratio" and row["method"] == "none")
            assert undefined if row[figure] is None else math.isfinite(row[figure])
            assert FIGURES[figure].label in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * expected
    assert TASKS[name]().note() in printed
    if "accuracy_difference" in metrics["figures"]:
        assert rows[2]["accuracy_difference"] == 0
        assert rows[2]["retention_accuracy"] == (1 if rows[2]["accuracy"] else None)


def test_continuation_scores_what_follows(tiny_base: Base, data: dict[str, str]) -> None:
    method = Full(tiny_base)
    config = EvaluationConfig(lengths=[12], limit=3)
    items, results = _run(TASKS["continuation"](), method, config, data["continuation"])
    assert [len(item.passage) for item in items] == [12] * 3
    for item, result in zip(items, results, strict=True):
        following = item.asked["following"]
        whole = tiny_base.tokenizer(_text(int(item.id), 40), add_special_tokens=False)["input_ids"]
        assert item.passage + following == whole[: 12 + 65]
        expected = _nats(method, item.passage, following[:1], following[1:])
        assert result["nats"] == pytest.approx(-sum(expected), rel=1e-4)
        assert result["target_tokens"] == len(following) - 1
    task = TASKS["continuation"]()
    sums = {name: np.array([sum(task.columns(r)[name] for r in results)]) for name in task.columns(results[0])}
    assert task.figures["perplexity"](sums)[0] == pytest.approx(math.exp(task.figures["nll_per_token"](sums)[0]))

    halves = task.items(task.load(data["continuation"], EvaluationConfig()), tiny_base.tokenizer, EvaluationConfig())
    assert [len(item.passage) for item in halves] == [
        len(tiny_base.tokenizer(_text(i, 40), add_special_tokens=False)["input_ids"]) // 2 for i in range(4)
    ]
    # A text that ends with the passage has nothing to score.
    assert not task.items(
        task.load(data["continuation"], EvaluationConfig()), tiny_base.tokenizer, EvaluationConfig(lengths=[5000])
    )


def test_summarise_takes_the_best_reference(tiny_base: Base, data: dict[str, str]) -> None:
    method = Full(tiny_base)
    items, results = _run(TASKS["summarise"](), method, EvaluationConfig(), data["summarise"])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for item, result in zip(items, results, strict=True):
        assert result["targets"] == item.asked["targets"]
        for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            found = [scorer.score(target, result["prediction"])[theirs].fmeasure for target in result["targets"]]
            assert result[ours] == max(found)
        first = tiny_base.tokenizer(" " + result["targets"][0], add_special_tokens=False)["input_ids"]
        expected = _nats(method, item.passage, item.asked["prompt"], [*first, tiny_base.eos])
        assert result["nats"] == pytest.approx(-sum(expected), rel=1e-4)
        assert "one sentence?" in tiny_base.tokenizer.decode(item.asked["prompt"])
    assert TASKS["summarise"]().figures["rouge_1"]({"rouge_1": np.array([1.0]), "items": np.array([4.0])})[0] == 0.25


def test_summarise_reads_scitldrs_own_form(tmp_path: Path) -> None:
    record = {"source": ["First sentence.", "Second one."], "target": ["Short."], "paper_id": "p1", "title": "T"}
    found = TASKS["summarise"]().load(_write(tmp_path / "a.jsonl", [record]), EvaluationConfig())
    assert found == [{"id": "p1", "text": "First sentence. Second one.", "targets": ["Short."]}]


def test_labels_are_chosen_by_their_mean_log_likelihood(tiny_base: Base, data: dict[str, str]) -> None:
    """Against a plain forward pass for each label; labels of several tokens are not at a disadvantage."""
    method = Full(tiny_base)
    items, results = _run(TASKS["classify"](), method, EvaluationConfig(), data["classify"])
    assert [item.id for item in items] == ["0:1", "0:2", "1:1", "1:2", "2:1", "2:2"]
    for item, result in zip(items, results, strict=True):
        means = {}
        for label in ("background", "method", "other"):
            ids = tiny_base.tokenizer(" " + label, add_special_tokens=False)["input_ids"]
            means[label] = float(np.mean(_nats(method, item.passage, item.asked["prompt"], ids)))
        assert result["label_logprobs"] == pytest.approx(means, rel=1e-4)
        assert result["prediction"] == max(means, key=means.__getitem__)
        assert result["right"] == (result["prediction"] == result["label"])
        assert result["usual"] == (result["label"] == "background")
    assert "background, method or other?" in tiny_base.tokenizer.decode(items[0].asked["prompt"])
    assert most_frequent(["b", "a", "b", "a", "c"]) == "a"


def test_data_sets_with_different_labels_share_a_batch(tiny_base: Base, data: dict[str, str], tmp_path: Path) -> None:
    task, method, config = TASKS["classify"](), Full(tiny_base), EvaluationConfig()
    path = _write(
        tmp_path / "s.jsonl", [{"text": _text(i), "label": ("negative", "positive")[i % 2]} for i in range(2)]
    )
    items = [
        item
        for source in (data["classify"], path)
        for item in task.items(task.load(source, config), tiny_base.tokenizer, config)
    ]
    (contexts,) = method.compress([item.passage for item in items], [1])
    with torch.no_grad():
        together = choose(method, items, contexts)
        alone = [choose(method, [item], [context])[0] for item, context in zip(items, contexts, strict=True)]
    assert [len(result["label_logprobs"]) for result in together] == [3] * 6 + [2] * 2
    for one, other in zip(together, alone, strict=True):
        assert one["label_logprobs"] == pytest.approx(other["label_logprobs"], rel=1e-4)
    assert items[-1].id == f"{path}:2"
    assert "positive or negative?" in tiny_base.tokenizer.decode(items[-1].asked["prompt"])


def test_paraphrase_figures(tiny_base: Base, data: dict[str, str]) -> None:
    task = TASKS["paraphrase"]()
    items, results = _run(task, Full(tiny_base), EvaluationConfig(), data["paraphrase"])
    assert [item.asked["label"] for item in items] == ["yes", "yes", "no", "no"]
    for place, item in enumerate(items):
        prompt = tiny_base.tokenizer.decode(item.asked["prompt"])
        assert _text(place + 3) in prompt  # the second sentence is asked about
        assert tiny_base.tokenizer.decode(item.passage) == _text(place)
    common = {"passage_tokens": 4, "memory_tokens": 1, "usual": True}
    said = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("yes", "yes"), ("no", "no")]
    made = [{"prediction": p, "label": w, "right": p == w, **common} for p, w in said]
    sums = {name: np.array([sum(task.columns(r)[name] for r in made)]) for name in task.columns(made[0])}
    assert task.figures["f1"](sums)[0] == pytest.approx(100 * 4 / 6)  # two right, one wrong yes, one missed
    assert task.figures["accuracy"](sums)[0] == pytest.approx(60)
    assert len(results) == 4


@pytest.mark.parametrize("label", ["equivalent", 1, "1", True])
def test_labels_of_pairs_in_other_words(tmp_path: Path, label: Any) -> None:
    record = {"sentence1": "a b", "sentence2": "b a", "label": label, "idx": 7}
    found = TASKS["paraphrase"]().load(_write(tmp_path / "a.jsonl", [record]), EvaluationConfig())
    assert found == [{"id": "7", "text": "a b", "text2": "b a", "label": "yes"}]


def test_retrieval_ranks_by_the_querys_likelihood(tiny_base: Base, data: dict[str, str]) -> None:
    task, method = TASKS["retrieve"](), Full(tiny_base)
    config = EvaluationConfig(candidates=3)
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
    _, results = _run(TASKS["retrieve"](), Nothing(tiny_base), EvaluationConfig(candidates=4), data["retrieve"])
    for result in results:
        assert result["reciprocal_rank"] == pytest.approx(result["chance"])
        assert result["hit_1"] == pytest.approx(1 / result["candidates"])


def test_memories_of_a_group_may_be_encoded_together(compressor: Any, data: dict[str, str]) -> None:
    """Results with memories do not depend on how many are encoded at once."""
    config = EvaluationConfig(candidates=7)
    first = _run(TASKS["retrieve"](), MemoryMethod(compressor, 1), config, data["retrieve"])[1]
    second = _run(TASKS["retrieve"](), MemoryMethod(compressor, 16), config, data["retrieve"])[1]
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
        assert len(Retrieve().load("squad", EvaluationConfig(split=split))) == 2


def test_retrieval_takes_a_passages_first_question(tmp_path: Path) -> None:
    records = [
        {"id": f"q{i}", "context": f"Context {i // 2}.", "question": f"Which {i}?", "answers": ["x"], "title": "T"}
        for i in range(6)
    ]
    task = TASKS["retrieve"]()
    found = task.load(_write(tmp_path / "q.jsonl", records), EvaluationConfig(limit=2))
    assert [(one["text"], one["query"]) for one in found] == [("Context 0.", "Which 0?"), ("Context 1.", "Which 2?")]
    with pytest.raises(CompressorError, match="two to tell apart"):
        task.load(_write(tmp_path / "one.jsonl", records[:2]), EvaluationConfig())
    assert len(task.load("arxiv-test", EvaluationConfig(limit=5))) == 5
    assert {one["starts"] for one in task.load("squad-dev", EvaluationConfig(limit=3))} == {"\nQuestion:"}


def test_class_numbers_of_the_hub_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {
            "idx": datasets.Value("int32"),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "labels": datasets.List(datasets.ClassLabel(names=["x", "y"])),
        }
    )
    columns = {"idx": [3], "sentence": ["fine"], "label": [1], "labels": [[1, 0]]}
    asked = []

    def load(hub: Any, split: str | None) -> Any:
        asked.append((hub.name, split))
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(records_module, "load_hub", load)
    (row,) = task_records("stanfordnlp/sst2", EvaluationConfig(), "", lambda row: row, LeftOut())
    assert row.values == {"idx": 3, "sentence": "fine", "label": "positive", "labels": ["y", "x"]}
    assert asked == [("stanfordnlp/sst2", "validation")]
    assert TASKS["classify"]().load("stanfordnlp/sst2", EvaluationConfig(split="train")) == [
        {"id": "3", "text": "fine", "label": "positive"}
    ]
    assert asked[-1][1] == "train"


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("summarise", {"text": "a"}, "no field 'targets' or 'target' or 'summary'; its fields are 'text'. The task"),
        ("summarise", {"text": "a", "targets": []}, "'targets' is empty"),
        ("classify", {"text": "a"}, "no field 'label'"),
        ("classify", {"text": "a", "label": 3.5}, "must be text but is a number"),
        ("classify", {"sentences": ["a", "b"], "labels": ["x"]}, "2 sentences have 1 labels"),
        ("classify", {"text": "a", "label": "x"}, "nothing to tell apart"),
        ("paraphrase", {"text": "a", "text2": "b", "label": "maybe"}, "'maybe' is none of paraphrase"),
        ("paraphrase", {"text": "a", "label": 1}, "no field 'text2' or 'sentence2'"),
        ("paraphrase", {"text": " ", "text2": "b", "label": 1}, "'text' is blank"),
        ("retrieve", {"title": "a"}, "no field 'text' or 'abstract'"),
    ],
)
def test_broken_records_are_named(
    tiny_base: Base, tmp_path: Path, task: str, record: dict[str, Any], message: str
) -> None:
    path = _write(tmp_path / "broken.jsonl", [record])
    config, chosen = EvaluationConfig(), TASKS[task]()

    def read() -> list[Item]:
        return chosen.items(chosen.load(path, config), tiny_base.tokenizer, config)

    with pytest.raises(CompressorError) as caught:
        read()
    assert message in str(caught.value)
    if "tell apart" not in message:
        assert "broken.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("summarise", "SciTLDR-A/test.jsonl"),
        ("classify", "allenai/csabstruct"),
        ("paraphrase", "nyu-mll/glue:mrpc"),
    ],
)
def test_without_data_the_message_says_what_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, message: str
) -> None:
    """The tests are offline, so the hub ids that are the defaults cannot be loaded."""
    assert evaluate_main(["--task", task, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"task {task}" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_labels_are_answers(tiny_base: Base) -> None:
    expected = tiny_base.tokenizer([" not paraphrase", " yes"], add_special_tokens=False)["input_ids"]
    assert label_ids(tiny_base.tokenizer, ["not_paraphrase", "yes"]) == expected


def test_tables_name_data_sets_where_there_are_several() -> None:
    rows = [{"method": "kv", "dataset": name, "tokens": 4, "length": None, "n": 3, "mrr": 0.5} for name in ("a", "b")]
    assert "dataset" in text_table(rows, ["mrr"])
    assert "dataset" not in text_table(rows[:1], ["mrr"])
