"""`python train.py` as a command: killed and resumed, it repeats the uninterrupted run bit for bit; signals save."""

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

STEPS = 24
SCHEDULE = [
    f"--training.steps={STEPS}",
    "--training.accumulation=2",
    "--training.checkpoint_every=5",
    "--training.validate_every=12",
]
Start = Callable[..., "subprocess.Popen[str]"]


def rows(output: Path) -> list[dict[str, Any]]:
    """The log without running times."""
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def finish(process: subprocess.Popen[str]) -> str:
    printed = process.communicate(timeout=180)[0]
    assert process.returncode == 0, printed
    return printed


def wait_for_rows(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Until the run has logged so many rows."""
    log, patience = output / "log.jsonl", time.monotonic() + 180
    while not log.exists() or log.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < patience
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], start_training: Start) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finish(start_training([*training_options, *SCHEDULE, f"--output={output}"]))
    return output


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory, training_options: list[str], start_training: Start, whole: Path
) -> Path:
    """The same run, killed with SIGKILL in the middle and continued."""
    output = tmp_path_factory.mktemp("resumed") / "run"
    argv = [*training_options, *SCHEDULE, f"--output={output}"]
    process = start_training(argv)
    wait_for_rows(process, output, 8)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "final").exists()
    steps = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    assert steps
    assert steps[-1] < f"step-{STEPS:07d}"
    # What a kill while saving leaves.
    (output / "checkpoints" / ".step-0000023.abcd" / "step-0000023").mkdir(parents=True)
    printed = finish(start_training([*argv, "--training.resume=true"]))
    assert "Traceback" not in printed
    return output


def test_a_killed_and_resumed_run_has_the_same_losses_bit_for_bit(whole: Path, resumed: Path) -> None:
    assert [row["step"] for row in rows(whole) if "loss" in row] == list(range(1, STEPS + 1))
    assert rows(resumed) == rows(whole)


def test_a_killed_and_resumed_run_has_the_same_weights_bit_for_bit(whole: Path, resumed: Path) -> None:
    for folder in ("final", f"checkpoints/step-{STEPS:07d}/model"):
        names = sorted(path.name for path in (whole / folder).iterdir())
        assert "memory_tokens.safetensors" in names
        assert names == sorted(path.name for path in (resumed / folder).iterdir())
        for name in names:
            assert (whole / folder / name).read_bytes() == (resumed / folder / name).read_bytes()
    moments = f"checkpoints/step-{STEPS:07d}/optimizer.safetensors"
    assert (whole / moments).read_bytes() == (resumed / moments).read_bytes()


def test_leftovers_of_a_kill_are_gone(resumed: Path) -> None:
    assert not list((resumed / "checkpoints").glob(".*"))


def test_a_run_is_not_started_over(whole: Path, training_options: list[str], start_training: Start) -> None:
    before = (whole / "log.jsonl").read_bytes()
    process = start_training([*training_options, *SCHEDULE, f"--output={whole}"])
    printed = process.communicate(timeout=180)[0]
    assert process.returncode == 2
    assert "--training.resume true" in printed
    assert "Traceback" not in printed
    assert (whole / "log.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, training_options: list[str], start_training: Start
) -> list[tuple[int, str, int, list[str]]]:
    """A long run stopped by SIGTERM, continued, and stopped by Ctrl-C: status, output, last step, checkpoints."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    argv = [*training_options, "--training.steps=100000", "--training.checkpoint_every=100000", f"--output={output}"]
    results = []
    for number, count in ((signal.SIGTERM, 4), (signal.SIGINT, 30)):
        process = start_training([*argv, "--training.resume=true"])
        wait_for_rows(process, output, count)
        process.send_signal(number)
        printed = process.communicate(timeout=180)[0]
        names = sorted(path.name for path in (output / "checkpoints").iterdir())
        results.append((process.returncode, printed, rows(output)[-1]["step"], names))
    return results


@pytest.mark.parametrize("which", [0, 1], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_cleanly(stopped: list[tuple[int, str, int, list[str]]], which: int) -> None:
    status, printed, step, names = stopped[which]
    assert status == 0
    assert f"stopped by a signal after step {step}; go on with --training.resume true" in printed
    assert "Traceback" not in printed
    assert names[-1] == f"step-{step:07d}"
    assert not any(name.startswith(".") for name in names)


def test_a_run_goes_on_where_a_signal_stopped_it(stopped: list[tuple[int, str, int, list[str]]]) -> None:
    first, second = stopped[0][2], stopped[1][2]
    assert 4 <= first < second
    assert f"step {first + 1:>6}/100000" in stopped[1][1]
    assert f"step {first:>6}/100000" not in stopped[1][1]
