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

from compressor.commands.demo import demo_main

PASSAGE = "Schrödinger's equation, solved by the cat 🐈 of Łódź."


@pytest.fixture
def passage(tmp_path: Path) -> Path:
    path = tmp_path / "schroedinger.txt"
    path.write_text(PASSAGE, encoding="utf-8")
    return path


SMALL = "--checkpoint models/arxiv-mini/compressor"


def shell(project: Path, line: str, **environment: str) -> subprocess.CompletedProcess[Any]:
    """Run a shell line, `$P` for Python, with its outputs as bytes."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=project,
        env=os.environ | {"P": sys.executable, "PYTHONPATH": str(project), **environment},
        capture_output=True,
        timeout=120,
    )


def test_letters_that_an_output_cannot_show_are_replaced(project: Path, passage: Path) -> None:
    done = shell(project, f"$P demo.py {SMALL} --text {passage} --tokens 2", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Schr?dinger's equation, solved by the cat ? of ??d?." in done.stdout


def test_what_programs_read_is_whole_where_letters_cannot_be_shown(
    passage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, encoding="ascii"))
    assert demo_main([*SMALL.split(), "--text", str(passage), "--tokens", "2", "--json"]) == 0
    assert json.loads(output.getvalue())["passage"] == PASSAGE


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("$P -m compressor pack -c {text} > /dev/full", 1, "standard output could not be written (No space left"),
        ("$P -m compressor pack -k -f -o /dev/full {text}", 1, "/dev/full could not be written (No space left"),
        ("$P -m compressor --help > /dev/full", 2, "standard output could not be written (No space left"),
        ("$P -m compressor pack -c {text} >&-", 1, "standard output could not be written (it is closed)"),
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
