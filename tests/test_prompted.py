"""The prompted task: rows through presets, answers read and judged, bounds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from rouge_score.rouge_scorer import RougeScorer

from compressor.commands.cli import evaluate_main
from compressor.data import questions as questions_module
from compressor.data.instructions import PRESETS, Prompt, load_prompt, preset_names
from compressor.data.prompts import answer_ids
from compressor.errors import CompressorError
from compressor.evaluation.figures import FIGURES
from compressor.evaluation.items import Item, Result
from compressor.evaluation.methods import Methods
from compressor.evaluation.metrics import resampled_figures, word_errors
from compressor.evaluation.scores import SCORES, Answered
from compressor.evaluation.settings import PromptSettings
from compressor.evaluation.tasks.prompt import Prompted
from compressor.methods.bounds import Full
from compressor.methods.interface import MemoryMethod
from compressor.model.base import Base
from compressor.model.bases import FLAGSHIP_BASE, NAMED

TEXT = "the memory of a passage holds what it says so that a decoder can answer questions about it later on"


def _write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _text(seed: int, words: int = 14) -> str:
    return " ".join(np.random.default_rng(seed).choice(TEXT.split(), size=words)) + "."


ROWS: dict[str, list[dict[str, Any]]] = {
    "summarise": [{"id": str(i), "text": _text(i, 30), "targets": [_text(9 + i), _text(20 + i)]} for i in range(3)],
    "classify": [{"id": str(i), "text": _text(i), "label": ("x_y", "z")[i % 2]} for i in range(3)],
    "roles": [
        {"id": str(i), "sentences": [_text(i), _text(i + 5)], "labels": ["background", ("method", "other")[i % 2]]}
        for i in range(3)
    ],
    "sentiment": [{"idx": i, "sentence": _text(i), "label": i % 2} for i in range(4)],
    "paraphrase": [
        {"id": str(i), "text": _text(i), "text2": _text(i + 3), "label": ("paraphrase", "not_paraphrase")[i > 1]}
        for i in range(4)
    ],
    "similarity": [{"sentence1": _text(i), "sentence2": _text(i + 3), "score": 0.8 + i} for i in range(4)],
    "rewrite": [{"text": _text(i), "targets": [_text(i + 9)]} for i in range(2)],
    "translate": [{"source": _text(i), "target": f"le passage numéro {i}"} for i in range(2)],
    "race": [
        {
            "article": _text(i, 30),
            "questions": ["Which?", "What?"],
            "options": [["a", "the memory", "c", "d"], ["e", "f", "g", "h"]],
            "answers": ["B", "A"],
        }
        for i in range(2)
    ],
    "entities": [{"text": _text(i), "instruction": "List the names.", "answers": ["Ada", "Charles"]} for i in range(2)],
    "transcript": [{"transcript": _text(i), "spoken": _text(i)} for i in range(2)],
}
"""A few rows in the form of each preset."""


def test_every_preset_has_rows_here() -> None:
    assert set(ROWS) == set(preset_names())
    for name in preset_names():
        prompt = load_prompt(name)
        assert set(prompt.metrics) <= set(SCORES)
        assert {figure for metric in prompt.metrics for figure in SCORES[metric].figures} <= set(FIGURES)
        assert prompt.needs


def _run(name: str, base: Base, source: str, limit: int | None = None) -> tuple[list[Item], list[Result], Prompted]:
    """Items of a source under a preset, and their results with the whole passage in the prompt."""
    config = PromptSettings(task=name, limit=limit)
    task = Prompted(config)
    items = task.items(task.load(source, config), base.tokenizer, config)
    method = Full(base)
    (contexts,) = method.compress([item.passage for item in items], [1])
    with torch.no_grad():
        return items, task.run(method, items, contexts), task


def _nats(base: Base, passage: list[int], prompt: list[int], target: list[int]) -> list[float]:
    """Log-probabilities of a target by one plain forward pass over all tokens."""
    ids = [base.bos, *passage, *prompt, *target]
    logprobs = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    first = len(ids) - len(target)
    return [float(logprobs[first - 1 + i, token]) for i, token in enumerate(target)]


def test_written_answers_are_scored_against_all_references(tiny_base: Base, tmp_path: Path) -> None:
    items, results, task = _run("summarise", tiny_base, _write(tmp_path / "a.jsonl", ROWS["summarise"]))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for item, result in zip(items, results, strict=True):
        for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            found = [scorer.score(target, result["prediction"])[theirs].fmeasure for target in result["answers"]]
            assert result[ours] == max(found)
        (first,) = answer_ids(tiny_base.tokenizer, [result["answers"]])
        expected = _nats(tiny_base, item.passage, item.asked["prompt"], [*first, tiny_base.eos])
        assert result["answer_nats"] == pytest.approx(-sum(expected), rel=1e-4)
        assert tiny_base.tokenizer.decode(item.asked["prompt"]).endswith("in one sentence? Answer:")
    assert task.room(items[0]) == 1 + len(items[0].asked["prompt"]) + 64


@pytest.mark.parametrize("name", ["classify", "roles", "sentiment", "paraphrase", "similarity", "race"])
def test_labels_are_chosen_by_their_mean_log_likelihood(tiny_base: Base, tmp_path: Path, name: str) -> None:
    """Against a plain forward pass for each label; those of several tokens are not at a disadvantage."""
    items, results, task = _run(name, tiny_base, _write(tmp_path / "a.jsonl", ROWS[name]))
    for item, result in zip(items, results, strict=True):
        means = {
            label: float(np.mean(_nats(tiny_base, item.passage, item.asked["prompt"], ids)))
            for label, ids in item.asked["labels"].items()
        }
        assert result["label_logprobs"] == pytest.approx(means, rel=1e-4)
        assert result["prediction"] == max(means, key=means.__getitem__)
        assert name == "similarity" or result["answers"][0] in means
        assert set(task.columns(result)) > {"items", "passage_tokens"}


def test_rows_of_every_form(tiny_base: Base, tmp_path: Path) -> None:
    def loaded(name: str, rows: list[dict[str, Any]]) -> list[Any]:
        config = PromptSettings(task=name)
        return Prompted(config).load(_write(tmp_path / "rows.jsonl", rows), config)

    (one,) = loaded("summarise", [{"source": ["First.", "Second."], "target": ["Short."], "paper_id": "p1"}])
    assert (one.id, one.context, one.answers, one.whole) == ("p1", "First. Second.", ("Short.",), True)
    roles = loaded("roles", ROWS["roles"])
    assert [one.id for one in roles] == ["0:1", "0:2", "1:1", "1:2", "2:1", "2:2"]
    assert "background, objective, method, result or other?" in roles[0].question
    assert [one.answers for one in loaded("classify", ROWS["classify"])] == [("x y",), ("z",), ("x y",)]
    assert loaded("classify", ROWS["classify"])[0].question == "Which of these is it: x y or z?"
    assert [one.answers for one in loaded("sentiment", ROWS["sentiment"])][:2] == [("negative",), ("positive",)]
    for label in ("equivalent", 1, "1", True):
        (one,) = loaded("paraphrase", [{"sentence1": "a b", "sentence2": "b a", "label": label, "idx": 7}])
        assert (one.id, one.question, one.answers) == ("7", "Does this sentence say the same: b a", ("yes",))
    race = loaded("race", ROWS["race"][:1])
    assert race[0].question == "Which? A) a B) the memory C) c D) d"
    assert (race[0].answers, race[0].choices) == (("the memory",), ("a", "the memory", "c", "d"))
    (one,) = loaded("entities", [{"text": "x", "instruction": "List.", "answers": []}])
    assert one.answers == ("none",)
    assert loaded("entities", ROWS["entities"])[0].answers == ("Ada; Charles",)


def test_right_labels_are_spelled_as_those_to_choose_from(tmp_path: Path) -> None:
    """Data and presets write labels in their own ways; a right one that is not among the choices is never right."""
    rows = _write(tmp_path / "rows.jsonl", [{"text": "a b", "label": one} for one in ("POSITIVE", "very_negative", 1)])
    preset = {"instruction": "Which: {labels}?", "answer": "label", "columns": {"answers": "label"}}
    preset |= {
        "metrics": ["accuracy"],
        "labels": ["Positive", "Very negative"],
        "meanings": {"1": "Positive", "Neg": "Very negative"},
    }
    for settings in (preset, {**preset, "meanings": {}}):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
        config = PromptSettings(task="prompt", prompt=str(tmp_path / "own.yaml"))
        found = Prompted(config).load(rows, config)
        assert [one.answers[0] for one in found][:2] == ["Positive", "Very negative"]
        assert found[0].choices == ("Positive", "Very negative")


def test_a_list_without_members_is_empty_however_nothing_is_spelled() -> None:
    assert Prompt(answer="list", nothing="None").listed("none") == []
    assert Prompt(answer="list").listed("None.") == []


def test_class_numbers_of_the_hub_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {
            "idx": datasets.Value("int32"),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
        }
    )
    asked = []

    def load(hub: Any, split: str | None, streaming: bool) -> Any:
        asked.append(split)
        return datasets.Dataset.from_dict({"idx": [3], "sentence": ["fine"], "label": [1]}, features=features)

    monkeypatch.setattr(questions_module, "load_hub", load)
    for split, expected in ((None, "validation"), ("train", "train")):
        config = PromptSettings(task="sentiment", split=split)
        (one,) = Prompted(config).load("stanfordnlp/sst2", config)
        assert (one.id, one.context, one.answers) == ("3", "fine", ("positive",))
        assert asked[-1] == expected


def test_examples_follow_the_instruction() -> None:
    prompt = Prompt(instruction="List {what}.", examples=[{"text": "Ada met Charles.", "answer": "Ada; Charles"}])
    assert prompt.asks({"what": "names"}) == 'List names. For "Ada met Charles." it is: Ada; Charles.'
    assert prompt.listed("Ada; ada;  Charles.\n") == ["Ada", "ada", "Charles"]
    assert prompt.listed("none") == prompt.listed("None.") == []
    assert Prompt().asks({"instruction": "Do."}) == "Do."


def test_lists_are_compared_as_sets() -> None:
    prompt = load_prompt("entities")
    made = [
        SCORES["lists"].columns(Answered("", [], "", (prompt.listed(a), prompt.listed(b))))
        for a, b in (("the Ada; Bob", "ada; Carol; Dan"), ("none", "none"), ("Eve", "none"))
    ]
    figures = SCORES["lists"].figures
    sums = {name: np.array([float(sum(one[name] for one in made))]) for name in made[0]}
    assert figures["list_precision"](sums)[0] == pytest.approx(100 / 3)
    assert figures["list_recall"](sums)[0] == pytest.approx(100 / 3)
    assert figures["list_f1"](sums)[0] == pytest.approx(100 / 3)


def test_auc_and_correlations_against_direct_computation() -> None:
    rng = np.random.default_rng(0)
    share, first = rng.random(30).round(1), (rng.random(30) > 0.6).astype(float)
    columns = {"first_share": share, "is_first": first, "expected": share, "graded": rng.random(30)}
    figures = {**SCORES["auc"].figures, **SCORES["correlation"].figures}
    figures = {name: figure for name, figure in figures.items() if set(figure.needs) <= set(columns)}
    found = resampled_figures(columns, figures, 20, 3)
    pairs = [(a > b) + 0.5 * (a == b) for a in share[first == 1] for b in share[first == 0]]
    assert found["auc"][0] == pytest.approx(np.mean(pairs))
    assert found["pearson"][0] == pytest.approx(np.corrcoef(share, columns["graded"])[0, 1])
    # Items of a resample repeated as often as it has them give the same figures.
    times = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=20)
    drawn = np.repeat(np.arange(30), times[0])
    assert found["pearson"][1] == pytest.approx(np.corrcoef(share[drawn], columns["graded"][drawn])[0, 1])
    assert found["auc"].shape == (21,)
    constant = resampled_figures({**columns, "expected": np.ones(30)}, {"pearson": figures["pearson"]}, 2)
    assert np.isnan(constant["pearson"]).all()


def test_word_errors_are_edits() -> None:
    assert word_errors("a big cat sat", "The cat sat down") == (3, 4)
    assert word_errors("", "two words") == (2, 2)


@pytest.fixture
def checkpoint(make_tiny_compressor: Callable[..., Any], tmp_path: Path) -> str:
    make_tiny_compressor().save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("summarise", "classify", "paraphrase")])
def test_bounds_stand_beside_every_figure(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    counts = (8, 4, 1) if name == "roles" else (4,)  # those of no --tokens, and one
    argv = ["--checkpoint", checkpoint, "--task", name, "--data", _write(tmp_path / "a.jsonl", ROWS[name])]
    argv += [] if name == "roles" else ["--tokens", "4"]
    assert evaluate_main([*argv, "--output", str(tmp_path / "out"), "--resamples", "10"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    sizes = [(method, count) for method in ("kv", "recite") for count in counts]
    assert [(row["method"], row["tokens"]) for row in metrics["rows"]] == [*sizes, ("full", None), ("none", None)]
    # Random weights do nothing with a passage, and the table says so.
    highest = [metrics["rows"][-1].get(f"{one}_high") for one in metrics["figures"] if one.endswith("_difference")]
    doubtful = any(high is not None and high >= 0 for high in highest)
    assert doubtful == ("reading the whole passage is not better than reading none" in capsys.readouterr().out)


def test_trained_bounds_beside_the_checkpoint_are_found(
    make_tiny_compressor: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its folder or in methods/ there; texts are recited after the prefix that ships for the base."""
    make_tiny_compressor().save_pretrained(tmp_path / "compressor")
    for name, place in (("full-tuned", "full-tuned"), ("none-tuned", "methods/none-tuned")):
        make_tiny_compressor(method=name).save_pretrained(tmp_path / place)
    named = replace(NAMED[FLAGSHIP_BASE], cartridge=str(tmp_path / "full-tuned"))
    monkeypatch.setitem(NAMED, FLAGSHIP_BASE, named)
    settings = PromptSettings(task="translate", checkpoint=str(tmp_path / "compressor"))
    found = Methods(settings, Accelerator(cpu=True), Prompted.bounds).specs
    assert [name for name, _ in found] == ["kv", "recite-tuned", "full", "none", "full-tuned", "none-tuned"]
    assert [place for _, place in found][-2:] == [str(tmp_path / "full-tuned"), str(tmp_path / "methods/none-tuned")]


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_bases_of_other_families_translate_from_memories(
    kind: str, make_family_base: Callable[..., Base], make_tiny_compressor: Callable[..., Any], tmp_path: Path
) -> None:
    """No skill is needed to see that instruction, memory and figures meet."""
    config = PromptSettings(task="translate", limit=2)
    task, model = Prompted(config), make_tiny_compressor(base=make_family_base(kind))
    items = task.items(task.load("parallel-en-fr", config), model.base.tokenizer, config)
    method = MemoryMethod(model)
    (contexts,) = method.compress([item.passage for item in items], [4])
    with torch.no_grad():
        results = task.run(method, items, contexts)
    assert [result["answers"] for result in results] == [
        ["Il fait froid aujourd'hui."],
        ["Elle lit un livre dans le jardin."],
    ]
    assert all(result["memory_tokens"] == 4 and result["answer_nats"] > 0 for result in results)
    sums = {name: np.array([sum(task.columns(one)[name] for one in results)]) for name in task.columns(results[0])}
    assert 0 <= task.figures["chrf"](sums)[0] < 100


def test_an_instruction_is_about_all_segments(checkpoint: str, tmp_path: Path) -> None:
    """Also where words of the answer stand in the first: memories of every segment are read."""
    row = {"passage": f"Ada sat. {_text(1, 120)}", "instruction": "List the names.", "answer": "Ada"}
    argv = ["--checkpoint", checkpoint, "--task", "prompt", "--data", _write(tmp_path / "a.jsonl", [row])]
    assert evaluate_main([*argv, "--output", str(tmp_path / "out"), "--methods", "kv", "--tokens", "2"]) == 0
    (line,) = map(json.loads, (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    assert line["passage_tokens"] > 3 * 64
    assert line["memory_tokens"] == 2 * -(-line["passage_tokens"] // 64)
    assert {"em", "f1", "answer_nats"} <= set(line)


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("summarise", {"text": "a"}, "no field 'targets' or 'target' or 'summary' or 'answers'; its fields are 'text'"),
        ("summarise", {"text": "a", "targets": []}, "the answer is empty"),
        ("classify", {"text": "a"}, "no field 'label'"),
        ("classify", {"text": "a", "label": {}}, "must be text or a number but is an object"),
        ("roles", {"sentences": ["a", "b"], "labels": ["method"]}, "2 sentences have 1 labels"),
        ("classify", {"text": "a", "label": "x"}, "nothing to tell apart"),
        ("paraphrase", {"text": "a", "text2": "b", "label": "maybe"}, "'maybe' is none of paraphrase"),
        ("paraphrase", {"text": "a", "label": 1}, "no field 'text2' or 'sentence2'"),
        ("paraphrase", {"text": " ", "text2": "b", "label": 1}, "'context' is blank"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, task: str, record: dict[str, Any], message: str) -> None:
    config = PromptSettings(task=task)
    with pytest.raises(CompressorError) as caught:
        Prompted(config).load(_write(tmp_path / "broken.jsonl", [record]), config)
    assert message in str(caught.value)
    assert "tell apart" in message or "broken.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "summarise"], "SciTLDR-A/test.jsonl"),
        (["--task", "roles"], "allenai/csabstruct"),
        (["--task", "paraphrase"], "nyu-mll/glue:mrpc"),
        (["--task", "summarize"], "did you mean summarise?"),
        (["--task", "prompt", "--prompt", "nowhere.yaml"], "there is no prompt nowhere.yaml"),
        (["--task", "qa", "--prompt", "summarise"], "prompt means nothing to --task qa"),
        (["--task", "roles", "--prompt", "summarise"], "--task roles is a prompt by itself"),
        (["--task", "regeneration", "--candidates", "8"], "means nothing to --task regeneration: leave it out"),
        (["--task", "utilisation", "--candidates=8"], "it is read by retrieve"),
        (["--task", "efficiency", "--limit", "3"], "limit means nothing to --task efficiency"),
        (["--task", "classify", "--question-tokens", "9"], "question_tokens means nothing to --task classify"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    """The tests are offline, so the hub ids that are the defaults cannot be loaded."""
    assert evaluate_main([*argv, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_settings_in_a_file_count_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("task: qa\ncandidates: 4\n")
    assert evaluate_main(["--config", str(tmp_path / "a.yaml")]) == 2
    assert "candidates means nothing to --task qa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metrics": ["bleurt"]}, "there is no metric 'bleurt'"),
        ({"instructions": "x"}, "no setting 'instructions'"),
        ({"labels": ["one"]}, "labels = ['one']"),
        ({"answer": "number"}, "text, label or list"),
        ({"examples": [{"text": "a"}]}, "examples"),
        (["x"], "a list"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(CompressorError) as caught:
        Prompted(PromptSettings(task="prompt", prompt=str(path)))
    assert message in str(caught.value)


def test_presets_say_what_they_are() -> None:
    assert all(path.read_text().startswith("# ") for path in PRESETS.glob("*.yaml"))
