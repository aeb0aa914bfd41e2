"""Long work that is interrupted: what is left, what is said, and that it goes on to the same end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from compressor.commands.cli import evaluate_main
from compressor.errors import CompressorError
from compressor.evaluation import items, notes, runner
from compressor.unfinished import Unfinished


@pytest.fixture(scope="module")
def checkpoint(tiny_base_folder: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint; beside it are data of a few records, which are read in no time."""
    from compressor.api import Compressor
    from compressor.model.config import BaseConfig, CompressorConfig
    from compressor.model.load import load_base

    folder = tmp_path_factory.mktemp("unfinished") / "checkpoint"
    settings = CompressorConfig(memory_tokens=8, lora_rank=4, lora_alpha=8.0, max_passage_tokens=64)
    Compressor(load_base(BaseConfig(path=str(tiny_base_folder))), settings).save_pretrained(folder)
    asked = {"question": "What?", "answers": ["heat"]}
    for name, fields in (("passages", {}), ("one", asked), ("other", asked)):
        kind, most = ("context", 40) if fields else ("text", 200)
        rows = [{"id": f"{name}-{i}", kind: text[:most]} for i, text in enumerate(texts[:6])]
        (folder.parent / f"{name}.jsonl").write_text("".join(json.dumps(row | fields) + "\n" for row in rows))
    return str(folder)


TASKS = {
    "regeneration": (["passages"], ["--lengths", "12", "24", "--methods", "kv", "full"]),
    "qa": (["one", "other"], ["--question_tokens", "48", "--methods", "kv", "none", "full"]),
    "utilisation": (["passages", "one"], ["--lengths", "12", "--question_tokens", "24"]),
}


def arguments(task: str, checkpoint: str, output: Path) -> list[str]:
    data, own = TASKS[task]
    named = [str(Path(checkpoint).parent / f"{name}.jsonl") for name in data]
    sizes = ["--limit", "4"] if task == "utilisation" else ["--tokens", "8", "2", "--limit", "2"]
    common = ["--checkpoint", checkpoint, "--task", task, "--batch_size", "2", "--resamples", "20"]
    return [*common, *sizes, *own, "--data", *named, "--output", str(output)]


@pytest.fixture(scope="module", params=["regeneration", "qa"])
def whole(
    request: pytest.FixtureRequest, checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A task and the output of an evaluation of it that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / request.param
    assert evaluate_main(arguments(request.param, checkpoint, output)) == 0
    return request.param, output


def same(one: Path, other: Path) -> None:
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (one, other))
    for name in ("rows", "notes", "left_out"):
        assert first[name] == second[name]
    assert (one / "predictions.jsonl").read_text() == (other / "predictions.jsonl").read_text()
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Batches that are run, of which the last is followed by what was appended to `ends`."""
    done: list[Any] = []
    honest = items.run_fitting

    def run_fitting(task: Any, method: Any, items: Any, contexts: Any) -> Any:
        if ENDS and len(done) == ENDS[0]:
            os.kill(os.getpid(), ENDS[1])
        done.append(method.name)
        return honest(task, method, items, contexts)

    monkeypatch.setattr(items, "run_fitting", run_fitting)
    yield done
    ENDS.clear()


ENDS: list[int] = []
"""Number of batches after which a signal comes, and the signal."""


def test_predictions_with_any_line_separator_are_taken_up(tmp_path: Path) -> None:
    """JSON escapes \n, but neither U+2028 nor U+0085, at which `str.splitlines` cuts."""
    results = [{"prediction": f"one{mark}two", "left_out": None} for mark in ("\n", "\r", "\x0b", "\x85", "\u2028")]
    chosen = [items.Item(f"r{number}", [1]) for number in range(len(results))]
    (tmp_path / "metrics.json").write_text(json.dumps({"made_with": {"items": "hash"}}))
    runner.write_predictions(tmp_path / "predictions.jsonl", chosen, {"kv": {8: results}})
    parts = Unfinished(tmp_path / "unfinished")
    runner.finished_parts(tmp_path, parts)
    assert [(part["place"], part["result"]) for part in parts.parts] == list(enumerate(results))


def test_an_interrupted_evaluation_goes_on_to_the_same_table(
    whole: tuple[str, Path],
    checkpoint: str,
    tmp_path: Path,
    batches: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, expected = whole
    number, status = (signal.SIGINT, 130) if task == "regeneration" else (signal.SIGTERM, 143)
    output = tmp_path / "out"
    argv = arguments(task, checkpoint, output)
    ENDS[:] = [5, number]
    assert evaluate_main(argv) == status
    message = capsys.readouterr().err
    assert f"stopped; what is done is in {output}/unfinished: the same command with --resume goes on" in message
    assert "Traceback" not in message
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    parts = [json.loads(line) for line in (output / "unfinished" / "parts-0.jsonl").read_text().splitlines()]
    assert parts[0].keys() == {"method", "tokens", "place", "id", "result"}
    assert {path.name for path in output.iterdir()} == {"unfinished"}

    # Neither lost nor mixed with something else by mistake.
    ENDS.clear()
    assert evaluate_main(argv) == 2
    assert "add --resume to go on with it, or --overwrite" in capsys.readouterr().err
    for other in (["--tokens", "8", "1"], ["--batch_size", "3"], ["--limit", "3"]):
        assert evaluate_main([*argv, *other, "--resume"]) == 2
        assert f"with settings.{other[0][2:]} = " in capsys.readouterr().err
    assert evaluate_main([*argv, "--resume", "--overwrite"]) == 2
    assert "give one of them" in capsys.readouterr().err

    # A kill may come within a line.
    with (output / "unfinished" / "parts-0.jsonl").open("a") as file:
        file.write('{"method": "kv", "tokens": 8, "pla')
    before = len(batches)
    assert evaluate_main([*argv, "--resume"]) == 0
    same(output, expected)
    again = len(batches) - before

    # What went on elsewhere says so.
    made_with = json.loads((output / "metrics.json").read_text())["made_with"]["surroundings"]
    made_with["versions"]["torch"] = "0.1"
    now = runner.surroundings(Accelerator())
    assert notes.surroundings_note(made_with, now) == [
        f"Made in parts, with torch 0.1, then {torch.__version__}: last digits may depend on that."
    ]
    assert notes.surroundings_note(now, now) == []

    # The finished evaluation is compared and not made again.
    before = len(batches)
    assert evaluate_main([*argv, "--resume"]) == 0
    assert len(batches) == before
    same(output, expected)
    assert evaluate_main([*argv, "--overwrite"]) == 0
    assert len(batches) - before > again


def test_another_number_of_processes_goes_on(
    whole: tuple[str, Path], checkpoint: str, tmp_path: Path, batches: list[Any], program: Callable[..., Any]
) -> None:
    task, expected = whole
    if task != "qa":
        pytest.skip("one task through two processes is enough")
    output = tmp_path / "out"
    argv = arguments(task, checkpoint, output)
    ENDS[:] = [3, signal.SIGTERM]
    assert evaluate_main(argv) == 143
    status, _, errors = program("evaluate.py", *argv, "--resume", processes=2)
    assert status == 0, errors
    same(output, expected)


def test_other_weights_or_data_do_not_go_on(
    make_tiny_compressor: Callable[..., Any],
    checkpoint: str,
    tmp_path: Path,
    batches: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, data, output = tmp_path / "checkpoint", tmp_path / "data.jsonl", tmp_path / "out"
    shutil.copytree(checkpoint, weights)
    data.write_text("".join(json.dumps({"id": str(i), "text": f"Text number {i}."}) + "\n" for i in range(6)))
    argv = ["--checkpoint", str(weights), "--data", str(data), "--tokens", "2", "--batch_size", "2"]
    argv += ["--output", str(output)]
    ENDS[:] = [2, signal.SIGTERM]
    assert evaluate_main(argv) == 143
    ENDS.clear()
    text = data.read_text()
    data.write_text(text.replace("number 3", "number three"))
    assert evaluate_main([*argv, "--resume"]) == 2
    assert "with items = " in capsys.readouterr().err
    data.write_text(text)

    shutil.rmtree(weights)
    make_tiny_compressor(seed=1).save_pretrained(weights)
    assert evaluate_main([*argv, "--resume"]) == 2
    assert "with weights of kv" in capsys.readouterr().err


def test_a_study_goes_on(checkpoint: str, tmp_path: Path, batches: list[Any]) -> None:
    """Its parts hold tensors."""
    argv = arguments("utilisation", checkpoint, tmp_path)[:-1]
    assert evaluate_main([*argv, str(tmp_path / "whole")]) == 0
    ENDS[:] = [len(batches) + 3, signal.SIGTERM]
    assert evaluate_main([*argv, str(tmp_path / "out")]) == 143
    ENDS.clear()
    before = len(batches)
    assert evaluate_main([*argv, str(tmp_path / "out"), "--resume"]) == 0
    assert 0 < len(batches) - before < 4
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "out"))
    for name in ("rows", "notes"):
        assert one[name] == other[name]

    # The finished study is compared and not measured again.
    before = len(batches)
    assert evaluate_main([*argv, str(tmp_path / "out"), "--resume"]) == 0
    assert evaluate_main([*argv, str(tmp_path / "out"), "--resume"]) == 0
    assert len(batches) == before
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"] == one["rows"]
    assert evaluate_main([*argv, str(tmp_path / "out"), "--resume", "--limit", "3"]) == 2


def test_parts_of_other_processes_are_read_and_theirs_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    for parts in [Unfinished(folder, process=process) for process in (1, 0, 2)]:
        parts.expect({"settings": {"a": 1}})
        parts.add([{"by": parts.process, "text": "字\u2028line"}])
    again = Unfinished(folder, resume=True, process=1)
    assert sorted(part["by"] for part in again.parts) == [0, 1, 2]
    assert {part["text"] for part in again.parts} == {"字\u2028line"}
    again.start()
    again.add([{"by": 1}])
    assert len(Unfinished(folder, resume=True).parts) == 4
    with pytest.raises(CompressorError, match=r"settings\.a = 1, and now it is 2"):
        Unfinished(folder, resume=True).expect({"settings": {"a": 2}})
    fresh = Unfinished(folder, again=True)
    fresh.start()
    assert not folder.exists()


def test_other_files_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(CompressorError, match=r"holds thesis\.tex"):
        Unfinished(tmp_path).start()
    assert (tmp_path / "thesis.tex").exists()


def test_an_interrupted_calibration_goes_on_to_the_same_file(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compressor.commands import cli
    from compressor.storage import fitting

    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    argv = ["calibrate", "arxiv-validation", "--checkpoint", checkpoint, "--limit", "40", "--rank", "8"]
    argv += ["--lengths", "24", "--sensitivity", "20", "--output"]
    assert cli.main([*argv, str(whole)]) == 0
    calls = []
    honest = {name: getattr(fitting, name) for name in ("_compressed", "_squared_gradients")}

    def counted(name: str, *args: Any) -> Any:
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(name)
        return honest[name](*args)

    for name in honest:
        monkeypatch.setattr(fitting, name, partial(counted, name))
    assert cli.main([*argv, str(out)]) == 143
    assert f"what is done is in {out}.unfinished: the same command with --resume goes on" in capsys.readouterr().err
    assert not out.exists()
    calls.append("stopped")
    assert cli.main([*argv, str(out)]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert cli.main([*argv, str(out), "--base-dtype", "bfloat16", "--resume"]) == 2
    assert "settings.base_dtype = " in capsys.readouterr().err
    assert cli.main([*argv, str(out), "--limit", "41", "--resume"]) == 2
    assert "with passages = " in capsys.readouterr().err
    before = len(calls)
    assert cli.main([*argv, str(out), "--resume"]) == 0
    assert calls[before:] == ["_squared_gradients"]
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "out.safetensors"}


def test_times_of_an_interrupted_study_are_kept(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.evaluation.studies import efficiency

    measured: list[int] = []
    honest = efficiency.measure

    def measure(model: Any, length: int, *args: Any) -> Any:
        if measured == [8]:
            os.kill(os.getpid(), signal.SIGINT)
        measured.append(length)
        return honest(model, length, *args)

    monkeypatch.setattr(efficiency, "measure", measure)
    argv = ["--checkpoint", checkpoint, "--task", "efficiency", "--lengths", "8", "16", "--new_tokens", "2", "4"]
    argv += ["--repeats", "1", "--output", str(tmp_path / "out")]
    assert evaluate_main(argv) == 130
    assert (tmp_path / "out" / "unfinished" / "parts-0.jsonl").exists()
    measured[:] = []
    for _ in range(2):  # gone on with, then compared
        assert evaluate_main([*argv, "--resume"]) == 0
    assert measured == [16]
