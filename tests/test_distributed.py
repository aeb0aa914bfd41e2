"""Two processes on one machine (gloo): the same training as one with twice the accumulation, and exact resume."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.training.config import RunConfig
from compressor.training.loop import start_run

STEPS = 16
SCHEDULE = [f"--training.steps={STEPS}", "--training.checkpoint_every=5", "--training.validate_every=8"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any) -> tuple[Path, str]:
    """An uninterrupted run of two processes, and what it printed."""
    output = tmp_path_factory.mktemp("pair") / "run"
    printed = command.finish(command.start([*training_options, *SCHEDULE, f"--output={output}"], processes=2))
    return output, printed


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any) -> Path:
    """The same run in one process with twice the accumulation."""
    output = tmp_path_factory.mktemp("single") / "run"
    argv = [*training_options, *SCHEDULE, "--training.gradient_accumulation_steps=2", f"--output={output}"]
    command.finish(command.start(argv))
    return output


def test_two_processes_speak_with_one_voice(pair: tuple[Path, str], command: Any) -> None:
    output, printed = pair
    assert "x 2 devices" in printed
    assert "0 dead" in printed
    assert printed.count(f"step {STEPS}/{STEPS}  loss") == 1
    assert [row["step"] for row in command.rows(output) if "loss" in row] == list(range(1, STEPS + 1))


def test_two_processes_equal_one_with_twice_the_accumulation(
    pair: tuple[Path, str], single: Path, command: Any
) -> None:
    for ours, theirs in zip(command.rows(pair[0]), command.rows(single), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            exact = key in ("step", "passages", "tokens", "learning_rate")
            assert value == (theirs[key] if exact else pytest.approx(theirs[key], rel=2e-3))
    for name in ("adapter_model.safetensors", "memory_tokens.safetensors"):
        ours, theirs = load_file(pair[0] / "final" / name), load_file(single / "final" / name)
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], atol=2e-3, rtol=1e-2)


def test_two_killed_and_resumed_processes_repeat_the_run_bit_for_bit(
    pair: tuple[Path, str], tmp_path: Path, training_options: list[str], command: Any
) -> None:
    output = tmp_path / "run"
    argv = [*training_options, *SCHEDULE, f"--output={output}"]
    process = command.start(argv, processes=2, dies_at=14)  # both of them in step 8
    printed = process.communicate(timeout=240)[0]
    assert process.returncode != 0, printed
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-0000005"]
    assert not (output / "final").exists()
    command.finish(command.start([*argv, "--training.resume=true"], processes=2))
    assert command.rows(output) == command.rows(pair[0])
    for name in ("adapter_model.safetensors", "memory_tokens.safetensors", "compressor.json"):
        assert (output / "final" / name).read_bytes() == (pair[0] / "final" / name).read_bytes()


def test_a_run_goes_on_with_more_processes_where_it_was(
    single: Path, tmp_path: Path, training_options: list[str], command: Any
) -> None:
    # The same command line, now on two processes: they share the batch, so that none is left out or repeated.
    output = tmp_path / "run"
    shutil.copytree(single, output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:07d}")
    argv = [
        *training_options,
        *SCHEDULE,
        "--training.gradient_accumulation_steps=2",
        f"--output={output}",
        "--training.resume=true",
    ]
    printed = command.finish(command.start(argv, processes=2))
    assert (
        printed.count(
            "note: training.gradient_accumulation_steps is 1 and not 2, so that a step keeps its 2 micro-batches"
        )
        == 1
    )
    for ours, theirs in zip(command.rows(output), command.rows(single), strict=True):
        for key, value in ours.items():
            exact = key in ("step", "passages", "tokens", "learning_rate")
            assert value == (theirs[key] if exact else pytest.approx(theirs[key], rel=2e-3))


def test_the_launcher_passes_a_signal_on_and_both_processes_save(
    tmp_path: Path, training_options: list[str], command: Any
) -> None:
    # The launcher itself ends with status 1 and a traceback of its own; the run is saved all the same.
    output = tmp_path / "run"
    argv = [*training_options, "--training.steps=100000", "--training.checkpoint_every=100000", f"--output={output}"]
    process = command.start(argv, processes=2)
    command.wait_for_rows(process, output, 3)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=240)[0]
    step = command.rows(output)[-1]["step"]
    assert f"stopped by a signal after step {step}; go on with --training.resume true" in printed
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{step:07d}"]


@pytest.mark.parametrize(("world", "gpu", "cpu"), [("2", False, True), ("2", True, False), ("1", False, False)])
def test_processes_started_together_without_a_gpu_train_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: str, gpu: bool, cpu: bool
) -> None:
    # accelerate needs to be told: otherwise each process would take itself for the only one.
    asked: list[dict[str, Any]] = []
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)

    def accelerator(**options: Any) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(is_main_process=True)

    monkeypatch.setattr("compressor.processes.Accelerator", accelerator)
    start_run(RunConfig(output=str(tmp_path)))
    assert asked[0]["cpu"] is cpu
