"""One rule of progress for every command."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from compressor import progress
from compressor.commands.cli import COMMANDS
from compressor.commands.cli import main as cli
from compressor.commands.options import DemoConfig
from compressor.parsing import parse_config
from compressor.progress import Progress, counted, note, set_level


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = progress._level
    with warnings.catch_warnings():
        yield
    progress._level, progress._shown = before, None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test moves."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(clock: list[float], capsys: pytest.CaptureFixture[str], seconds: int) -> list[str]:
    """What work of so many seconds, with a unit done in each, says off a terminal."""
    with Progress("packing a.txt", seconds, "bytes") as work:
        for _ in range(seconds):
            clock[0] += 1.0
            work.add()
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("quiet", "verbose", "seconds", "said"),
    [
        (False, False, 9, 0),  # short work is silent
        (False, False, 100, 4),  # after 10, 40, 70 and 100 seconds
        (False, True, 9, 9),
        (True, False, 100, 0),
        (True, True, 100, 0),
    ],
)
def test_lines_off_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str], quiet: bool, verbose: bool, seconds: int, said: int
) -> None:
    set_level(quiet, verbose)
    assert len(lines(clock, capsys, seconds)) == said
    note("note: something")
    assert capsys.readouterr().err == ("" if quiet else "note: something\n")


def test_a_line_says_what_how_much_and_how_long(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    set_level(False, False)
    assert lines(clock, capsys, 2000)[0] == "packing a.txt: 10 of 2,000 bytes (0%), 1,990 s left"
    with Progress("reading", unit="records") as work:
        clock[0] += 20.0
        work.add(5000)
    assert capsys.readouterr().err == "reading: 5,000 records, 250 a second\n"


def test_a_library_and_other_processes_are_silent(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_level", None)
    assert lines(clock, capsys, 100) == []
    set_level(False, True)
    monkeypatch.setenv("RANK", "1")
    assert lines(clock, capsys, 100) == []


def test_work_within_work_is_not_shown(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    set_level(False, True)
    with Progress("outer", 2, "files") as outer:
        for _ in range(2):
            assert list(counted("abc", "inner", 3, "letters")) == list("abc")
            clock[0] += 5.0
            outer.add()
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["outer", "outer"]
    for _ in counted("ab", "after", 2, "letters"):
        clock[0] += 5.0
    assert capsys.readouterr().err.startswith("after: 1 of 2 letters")


def test_a_bar_on_a_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet, wanted in ((False, True), (True, False)):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        set_level(quiet, False)
        with Progress("packing", 100, "bytes") as work:
            assert (work.bar is not None) == wanted


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_both_switches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if name not in ("pack", "unpack") else nullcontext():
        cli([name, "--help"])
    said = capsys.readouterr().out
    assert "-q, --quiet" in said
    assert "-v, --verbose" in said
    assert not re.findall(r"--[a-z]+_", said)
    example = said.rpartition("example:\n  ")[2]
    assert re.match(rf"(compressor {name}|(python|accelerate launch) {name}\.py) ", example)


def test_commands_are_listed_in_groups_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([]) == 2
    listed = re.findall(r"^  (\w+)  +\S", capsys.readouterr().out, re.M)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_hours_of_work_are_not_begun_by_a_bare_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name} was given no option")
    assert COMMANDS[name].example in said


@pytest.mark.parametrize(
    ("argv", "level"),
    [(["-q"], 0), (["--quiet"], 0), ([], 1), (["--tokens", "4", "-v"], 2), (["-v", "--tokens", "4"], 2)],
)
def test_switches_are_understood_anywhere(argv: list[str], level: int) -> None:
    parse_config(DemoConfig, argv, "")
    assert progress._level == level


def test_pack_of_a_short_text_says_nothing_and_verbose_what_it_came_to(
    tmp_path: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str], clock: Any
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("We study the conductivity of thin films. " * 20, encoding="utf-8")
    assert cli(["pack", "-k", "--base", str(tiny_base_folder), str(source)]) == 0
    assert capsys.readouterr().err == ""
    assert cli(["pack", "-k", "-f", "-v", "--base", str(tiny_base_folder), str(source)]) == 0
    assert "bits a byte" in capsys.readouterr().err
