"""Two processes that would write into one output."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compressor.commands.cli import evaluate_main, train_main
from compressor.commands.cli import main as cli
from compressor.errors import CompressorError
from compressor.files import owned

HOLDER = """
import sys, time
from compressor.files import owned
with owned(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held(output: Path, project: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns an output."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def commands(tmp_path: Path, training_options: list[str], tiny_compressor: Any, corpus: tuple[str, str]) -> Any:
    """Commands that write folders, each but for its output."""
    checkpoint, base = tmp_path / "checkpoint", tiny_compressor.base.name
    tiny_compressor.save_pretrained(checkpoint)
    quick = ["--no-measure", "--limit=2"]
    model = ["--checkpoint", str(checkpoint), "--base", base]
    return {
        "train": lambda output: train_main([*training_options, "--training.steps=1", f"--output={output}"]),
        "index": lambda output: cli(["index", corpus[1], f"--output={output}", "--encoder=bm25", *quick, *model]),
        "evaluate": lambda output: evaluate_main(
            [*model, f"--data={corpus[1]}", "--lengths", "12", "--limit", "1", f"--output={output}"]
        ),
        "corpus": lambda output: cli(
            ["corpus", f"--source={corpus[1]}", f"--output={output}", "--undated=train", "--min_words=1"]
        ),
    }


@pytest.mark.parametrize("name", ["train", "index", "evaluate", "corpus"])
def test_the_second_is_refused_and_told_of_the_first_which_a_kill_ends(
    name: str,
    tmp_path: Path,
    project: Path,
    training_options: list[str],
    tiny_compressor: Any,
    corpus: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Callable[[Path], int] = commands(tmp_path, training_options, tiny_compressor, corpus)[name]
    output = tmp_path / "out"
    with held(output, project) as other:
        capsys.readouterr()
        assert run(output) == 2
        said = capsys.readouterr().err
        assert f"out is being written by process {other.pid} on {socket.gethostname()} since 2" in said
        assert not output.exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / ".out.owner").exists()  # a stale record is no owner
        assert run(output) == 0, capsys.readouterr().err
    assert output.exists()
    assert not list(tmp_path.glob(".out.*"))


def test_an_output_is_owned_through_links_and_free_after_the_block(tmp_path: Path, project: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with held(tmp_path / "link", project), pytest.raises(CompressorError, match="is being written by process"):
        owned(tmp_path / "out").__enter__()
    started = time.monotonic()
    for _ in range(2):
        with owned(tmp_path / "out"):
            pass
    assert time.monotonic() - started < 5


def test_a_run_is_not_started_over_before_its_first_checkpoint(
    tmp_path: Path, training_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("[]")
    argv = [*training_options, "--training.steps=1", f"--output={tmp_path}"]
    assert train_main(argv) == 2
    assert "holds a run that was stopped before its first checkpoint: go on with" in capsys.readouterr().err
    assert train_main([*argv, "--training.resume=true"]) == 0


def test_a_run_does_not_replace_what_is_no_run(
    tmp_path: Path, training_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("mine: true\n")
    for more in ([], ["--training.resume=true"]):
        assert train_main([*training_options, "--training.steps=1", f"--output={tmp_path}", *more]) == 2
        assert "holds config.yaml but no run" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"
