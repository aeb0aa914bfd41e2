"""Commands on standard streams that are closed, full, or cannot show a letter."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.commands.cli import demo_main
from compressor.commands.cli import main as cli

PASSAGE = "Schrödinger's equation, solved by the cat 🐈 of Łódź."


@pytest.fixture
def passage(tmp_path: Path) -> Path:
    path = tmp_path / "schroedinger.txt"
    path.write_text(PASSAGE, encoding="utf-8")
    return path


SMALL = "--checkpoint models/arxiv-mini/compressor"


def shell(project: Path, line: str) -> subprocess.CompletedProcess[Any]:
    """Run a shell line, `$P` for Python, with its outputs as bytes."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=project,
        env=os.environ | {"P": sys.executable, "PYTHONPATH": str(project)},
        capture_output=True,
        timeout=240,
    )


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_letters_that_an_output_cannot_show_are_replaced(
    passage: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """What people read has question marks, what programs read is whole."""
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, encoding="ascii"))  # as Python itself opens it
    assert demo_main([*SMALL.split(), "--text", str(passage), "--tokens", "2", *more]) == 0
    sys.stdout.flush()
    if more:
        assert json.loads(output.getvalue())["passage"] == PASSAGE
    else:
        assert b"Schr?dinger's equation, solved by the cat ? of ??d?." in output.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-c"], "standard output could not be written (No space left"),
        (["-k", "-f", "-o", "/dev/full"], "/dev/full could not be written (No space left"),
    ],
)
def test_a_device_that_is_full_is_named(
    passage: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert cli(["pack", "--quiet", *options, "--base", "models/arxiv-mini/base", str(passage)]) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1, printed
    assert str(passage) not in printed


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("$P -m compressor --help > /dev/full", 2, "standard output could not be written (No space left"),
        (
            "$P -m compressor pack -c --base models/arxiv-mini/base {text} >&-",
            1,
            "standard output could not be written (it is closed)",
        ),
        ("$P -m compressor pack <&- | cat; exit ${{PIPESTATUS[0]}}", 1, "standard input is closed: name a file"),
    ],
)
def test_a_stream_that_is_full_or_closed_is_named(
    project: Path, passage: Path, line: str, status: int, said: str
) -> None:
    done = shell(project, line.format(text=passage))
    printed = done.stderr.decode()
    assert done.returncode == status, printed
    assert said in printed
    assert printed.count("\n") == 1, printed
    assert str(passage) not in printed


def test_closed_streams_do_not_hinder_a_command_that_writes_a_file(
    project: Path, passage: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.memory"
    done = shell(project, f"$P -m compressor compress {passage} {SMALL} -o {target} <&- >&- 2>&-")
    assert done.returncode == 0
    assert target.exists()
