"""`python train.py` as a command: killed and resumed, it repeats the uninterrupted run bit for bit; signals save."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from compressor.commands.cli import train_main
from compressor.training.optimizers import WeightAverage

STEPS = 12
SCHEDULE = [
    f"--training.steps={STEPS}",
    "--training.gradient_accumulation_steps=2",
    "--training.checkpoint_every=4",
    "--training.validate_every=12",
    "--training.average_from=3",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    command.finish(command.start([*training_options, *SCHEDULE, f"--output={output}"]))
    return output


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any, whole: Path) -> Path:
    """The same run, killed with SIGKILL in the middle of step 7 and continued."""
    output = tmp_path_factory.mktemp("resumed") / "run"
    argv = [*training_options, *SCHEDULE, f"--output={output}"]
    process = command.start(argv, dies_at=13)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == -signal.SIGKILL, printed
    assert len(command.rows(output)) == 6
    assert not (output / "final").exists()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-0000004"]
    # What a kill while saving leaves.
    (output / "checkpoints" / ".step-0000011.abcd1234" / "step-0000011").mkdir(parents=True)
    printed = command.finish(command.start([*argv, "--training.resume=true"]))
    assert "Traceback" not in printed
    return output


def test_a_killed_and_resumed_run_has_the_same_losses_bit_for_bit(whole: Path, resumed: Path, command: Any) -> None:
    assert [row["step"] for row in command.rows(whole) if "loss" in row] == list(range(1, STEPS + 1))
    assert command.rows(resumed) == command.rows(whole)


def test_a_killed_and_resumed_run_has_the_same_weights_bit_for_bit(whole: Path, resumed: Path) -> None:
    for folder in ("final", f"checkpoints/step-{STEPS:07d}/model"):
        names, others = (
            sorted(str(path.relative_to(run / folder)) for path in (run / folder).rglob("*") if path.is_file())
            for run in (whole, resumed)
        )
        assert "memory_tokens.safetensors" in names
        assert names == others
        for name in names:
            assert (whole / folder / name).read_bytes() == (resumed / folder / name).read_bytes()
    for state in ("optimizer", "last"):
        path = f"checkpoints/step-{STEPS:07d}/{state}.safetensors"
        assert (whole / path).read_bytes() == (resumed / path).read_bytes()


def test_what_is_exported_is_the_mean_of_the_weights(whole: Path) -> None:
    name, checkpoint = "memory_tokens.safetensors", whole / "checkpoints" / f"step-{STEPS:07d}"
    (exported,) = load_file(whole / "final" / name).values()
    (kept,) = load_file(checkpoint / "model" / name).values()
    last = load_file(checkpoint / "last.safetensors")
    assert torch.equal(exported, kept)
    (name,) = (name for name in last if "lora" not in name)
    assert last[name].shape == exported.shape
    assert not torch.equal(exported, last[name])


def test_the_mean_is_of_the_weights_after_each_step_from_the_first_on() -> None:
    module = torch.nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average, seen = WeightAverage(module, 5), {}
    for step in range(1, 40):
        with torch.no_grad():
            module.weight += step
        average.update(step)
        seen[step] = module.weight.detach().clone()
        if step <= 5:
            assert torch.equal(average.weights["weight"], seen[step])
    expected = torch.stack([weights for step, weights in seen.items() if step >= 5]).mean(0)
    assert list(average.weights) == ["weight"]
    weights = module.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight.detach(), weights)
    torch.testing.assert_close(average.weights["weight"], expected)
    assert average.count == 35
    average.restore({"weight": expected}, 35)
    assert torch.equal(average.weights["weight"], weights)
    assert torch.equal(module.weight.detach(), expected)
    # A checkpoint without a mean: it begins with the weights after the next step.
    average.restore({}, 0)
    with torch.no_grad():
        module.weight += 1
    average.update(100)
    assert torch.equal(average.weights["weight"], module.weight)
    # Resumed with a later first step: what the mean was of does not count any more.
    average.first = 50
    average.restore({"weight": weights}, 35)
    average.update(41)
    assert torch.equal(average.weights["weight"], weights)


def test_leftovers_of_a_kill_are_gone(resumed: Path) -> None:
    assert not list((resumed / "checkpoints").glob(".*"))


def test_a_run_is_not_started_over(whole: Path, training_options: list[str], command: Any) -> None:
    before = (whole / "log.jsonl").read_bytes()
    process = command.start([*training_options, *SCHEDULE, f"--output={whole}"])
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 2
    assert "--training.resume" in printed
    assert "Traceback" not in printed
    assert (whole / "log.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any
) -> list[tuple[int, str, int, list[str]]]:
    """A long run stopped by SIGTERM, continued, and stopped by Ctrl-C: status, output, last step, checkpoints."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    argv = [*training_options, "--training.steps=100000", "--training.checkpoint_every=100000", f"--output={output}"]
    results = []
    for number, count in ((signal.SIGTERM, 4), (signal.SIGINT, 30)):
        process = command.start([*argv, "--training.resume=true"])
        command.wait_for_rows(process, output, count)
        process.send_signal(number)
        printed = process.communicate(timeout=240)[0]
        names = sorted(path.name for path in (output / "checkpoints").iterdir())
        results.append((process.returncode, printed, command.rows(output)[-1]["step"], names))
    return results


@pytest.mark.parametrize("which", [0, 1], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_cleanly(stopped: list[tuple[int, str, int, list[str]]], which: int) -> None:
    status, printed, step, names = stopped[which]
    assert status == 0
    assert f"stopped by a signal after step {step}; go on with --training.resume" in printed
    assert "Traceback" not in printed
    assert names[-1] == f"step-{step:07d}"
    assert not any(name.startswith(".") for name in names)


def test_a_run_goes_on_where_a_signal_stopped_it(stopped: list[tuple[int, str, int, list[str]]]) -> None:
    first, second = stopped[0][2], stopped[1][2]
    assert 4 <= first < second
    assert f"step {first + 1:>6}/100000" in stopped[1][1]
    assert f"step {first:>6}/100000" not in stopped[1][1]


# -- what shaped a run must be as it was -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, corpus: tuple[str, str], training_options: Any
) -> tuple[Path, list[str]]:
    """A folder with a base, data and a run of two steps from them, and the run's options with FOLDER for the folder."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_base_folder, folder / "base")
    shutil.copy(corpus[0], folder / "train.jsonl")
    shutil.copy(corpus[1], folder / "validation.jsonl")
    options = {"base.path": "base", "data.train": "[train.jsonl]", "data.validation": "[validation.jsonl]"}
    argv = [one for one in training_options if one[2:].split("=")[0] not in options]
    argv += [f"--{key}={value.replace('[', '[FOLDER/')}" for key, value in options.items() if key != "base.path"]
    argv += ["--base.path=FOLDER/base", "--output=FOLDER/run"]
    assert _go_on(folder, argv, "--training.steps=2") == 0
    return folder, argv


def _go_on(folder: Path, argv: list[str], *more: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train_main([*(one.replace("FOLDER", str(folder)) for one in argv), "--training.resume=true", *more])


def _other_weights(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def _other_tokenizer(folder: Path) -> None:
    path = folder / "base" / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(settings))


def _other_text(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        lines[2] = json.dumps(json.loads(lines[2]) | {"text": "Another text stands here than that of before."})
        (folder / name).write_text("\n".join(lines) + "\n")

    return change


def _as_before(folder: Path) -> None:
    (folder / "base").rename(folder / "moved")
    (folder / "moved").rename(folder / "base")


OTHERS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "nothing": (_as_before, [], ""),
    "base": (_other_weights, [], "(base: "),
    "tokenizer": (_other_tokenizer, [], "tokenizer: "),
    "training data": (_other_text("train.jsonl"), [], "(data.train: 60 records "),
    "fewer records": (_as_before, ["--data.limit=50"], ", now 50 records "),
    "optimiser": (_as_before, ["--training.optimizer=muon"], "(training.optimizer: adamw, now muon)"),
    "layout": (_as_before, ["--compressor.layout=after"], "(compressor.layout: nested, now after)"),
    "validation data": (_other_text("validation.jsonl"), [], "note: data.validation differs from step 2 on"),
    "dropout": (_as_before, ["--compressor.lora_dropout=0"], "note: compressor.lora_dropout was 0.1 before step 2"),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_a_run_goes_on_only_with_what_shaped_it(
    begun: tuple[Path, list[str]], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, more, message = OTHERS[what]
    folder = tmp_path / "copy"
    shutil.copytree(begun[0], folder)
    change(folder)
    status = _go_on(folder, begun[1], "--training.steps=3", *more)
    printed = capsys.readouterr()
    if not message or message.startswith("note"):
        assert status == 0
        assert message in printed.out + printed.err
        assert (folder / "run" / "checkpoints" / "step-0000003").exists()
    else:
        assert status == 2
        assert message in printed.err
        assert "--init" in printed.err
        assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-0000002"]


def test_a_checkpoint_that_does_not_record_its_origin_is_still_compared_with_its_base(
    begun: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(begun[0], folder)
    path = folder / "run" / "checkpoints" / "step-0000002" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key not in ("origin", "micro_batches")}))
    shutil.copytree(folder, tmp_path / "same")
    assert _go_on(tmp_path / "same", begun[1], "--training.steps=3") == 0
    assert "does not record" in "".join(capsys.readouterr())
    _other_weights(folder)
    assert _go_on(folder, begun[1], "--training.steps=3") == 2
    assert "(base: " in capsys.readouterr().err


def test_scripts_refuse_what_they_made_from_other_data(project: Path, tmp_path: Path) -> None:
    """runs/rule-questions.sh, with a stand-in for the command that makes the questions."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "python"
    command.write_text('#!/bin/sh\necho made\nfor last; do :; done\nmkdir "$last"\n')
    command.chmod(0o755)
    corpus, output = tmp_path / "corpus", tmp_path / "questions"
    corpus.mkdir()
    (corpus / "train.jsonl").write_text('{"text": "one"}')

    def run() -> tuple[int, str, str]:
        made = subprocess.run(
            ["bash", "runs/rule-questions.sh", str(corpus), str(output)],
            cwd=project,
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        return made.returncode, made.stdout, made.stderr

    assert run() == (0, "made\n", "")
    assert run() == (0, "", "")
    (corpus / "train.jsonl").write_text('{"text": "two"}')
    status, printed, message = run()
    assert (status, printed) == (2, "")
    assert f"error: {output} was made from other data or settings" in message
    (corpus / "train.jsonl").write_text('{"text": "one"}')
    assert run() == (0, "", "")
