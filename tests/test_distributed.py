"""Two processes on one machine (gloo): the same training as one with twice the accumulation, and exact resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.config import RunConfig
from compressor.training import make_accelerator

STEPS = 16
SCHEDULE = [f"--training.steps={STEPS}", "--training.checkpoint_every=5", "--training.validate_every=8"]
Start = Callable[..., "subprocess.Popen[str]"]


def rows(output: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def finish(process: subprocess.Popen[str]) -> str:
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    return printed


def wait_for_rows(process: subprocess.Popen[str], output: Path, count: int) -> None:
    log, patience = output / "log.jsonl", time.monotonic() + 240
    while not log.exists() or log.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < patience
        time.sleep(0.002)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, training_options: list[str], start_training: Start
) -> tuple[Path, str]:
    """An uninterrupted run of two processes, and what it printed."""
    output = tmp_path_factory.mktemp("pair") / "run"
    printed = finish(start_training([*training_options, *SCHEDULE, f"--output={output}"], processes=2))
    return output, printed


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], start_training: Start) -> Path:
    """The same run in one process with twice the accumulation."""
    output = tmp_path_factory.mktemp("single") / "run"
    finish(start_training([*training_options, *SCHEDULE, "--training.accumulation=2", f"--output={output}"]))
    return output


def test_two_processes_speak_with_one_voice(pair: tuple[Path, str]) -> None:
    output, printed = pair
    assert "x 2 devices" in printed
    assert "0 dead" in printed
    assert printed.count(f"step {STEPS}/{STEPS}  loss") == 1
    assert [row["step"] for row in rows(output) if "loss" in row] == list(range(1, STEPS + 1))


def test_two_processes_equal_one_with_twice_the_accumulation(pair: tuple[Path, str], single: Path) -> None:
    for ours, theirs in zip(rows(pair[0]), rows(single), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            exact = key in ("step", "passages", "tokens", "learning_rate")
            assert value == (theirs[key] if exact else pytest.approx(theirs[key], rel=2e-3))
    for name in ("adapter_model.safetensors", "memory_tokens.safetensors"):
        ours, theirs = load_file(pair[0] / "final" / name), load_file(single / "final" / name)
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], atol=2e-3, rtol=1e-2)


def test_two_killed_and_resumed_processes_repeat_the_run_bit_for_bit(
    pair: tuple[Path, str], tmp_path: Path, training_options: list[str], start_training: Start
) -> None:
    output = tmp_path / "run"
    argv = [*training_options, *SCHEDULE, f"--output={output}"]
    process = start_training(argv, processes=2)
    wait_for_rows(process, output, 7)
    # Workers run in sessions of their own: find them below the launcher.
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (output / "final").exists()
    finish(start_training([*argv, "--training.resume=true"], processes=2))
    assert rows(output) == rows(pair[0])
    for name in ("adapter_model.safetensors", "memory_tokens.safetensors", "compressor.json"):
        assert (output / "final" / name).read_bytes() == (pair[0] / "final" / name).read_bytes()


def children(pid: int) -> list[int]:
    """Processes started by `pid`."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def test_the_launcher_passes_a_signal_on_and_both_processes_save(
    tmp_path: Path, training_options: list[str], start_training: Start
) -> None:
    # The launcher itself ends with status 1 and a traceback of its own; the run is saved all the same.
    output = tmp_path / "run"
    argv = [*training_options, "--training.steps=100000", "--training.checkpoint_every=100000", f"--output={output}"]
    process = start_training(argv, processes=2)
    wait_for_rows(process, output, 3)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    step = rows(output)[-1]["step"]
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
    monkeypatch.setattr("compressor.training.Accelerator", lambda **options: asked.append(options))
    make_accelerator(RunConfig(output=str(tmp_path)))
    assert asked[0]["cpu"] is cpu
