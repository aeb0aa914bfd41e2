"""`python train.py` as a command: killed and resumed, it repeats the uninterrupted run bit for bit; signals save."""

from __future__ import annotations

import signal
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    command.finish(command.start([*training_options, *SCHEDULE, f"--output={output}"]))
    return output


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any, whole: Path) -> Path:
    """The same run, killed with SIGKILL in the middle of step 9 and continued."""
    output = tmp_path_factory.mktemp("resumed") / "run"
    argv = [*training_options, *SCHEDULE, f"--output={output}"]
    process = command.start(argv, dies_at=17)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == -signal.SIGKILL, printed
    assert len(command.rows(output)) == 8
    assert not (output / "final").exists()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-0000005"]
    # What a kill while saving leaves.
    (output / "checkpoints" / ".step-0000023.abcd" / "step-0000023").mkdir(parents=True)
    printed = command.finish(command.start([*argv, "--training.resume=true"]))
    assert "Traceback" not in printed
    return output


def test_a_killed_and_resumed_run_has_the_same_losses_bit_for_bit(whole: Path, resumed: Path, command: Any) -> None:
    assert [row["step"] for row in command.rows(whole) if "loss" in row] == list(range(1, STEPS + 1))
    assert command.rows(resumed) == command.rows(whole)


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


def test_a_run_is_not_started_over(whole: Path, training_options: list[str], command: Any) -> None:
    before = (whole / "log.jsonl").read_bytes()
    process = command.start([*training_options, *SCHEDULE, f"--output={whole}"])
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 2
    assert "--training.resume true" in printed
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
    assert f"stopped by a signal after step {step}; go on with --training.resume true" in printed
    assert "Traceback" not in printed
    assert names[-1] == f"step-{step:07d}"
    assert not any(name.startswith(".") for name in names)


def test_a_run_goes_on_where_a_signal_stopped_it(stopped: list[tuple[int, str, int, list[str]]]) -> None:
    first, second = stopped[0][2], stopped[1][2]
    assert 4 <= first < second
    assert f"step {first + 1:>6}/100000" in stopped[1][1]
    assert f"step {first:>6}/100000" not in stopped[1][1]
