"""The README: its figures are those of results/, its commands exist and run, its Python prints what it shows."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    """Command lines of the README's plain code blocks, continuation lines joined."""
    lines = []
    prose = re.sub(r"^```\w+\n.*?^```", "", README, flags=re.S | re.M)
    for block in re.findall(r"^```\n(.*?)^```", prose, re.S | re.M):
        lines += [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(make|python|compressor|accelerate) ", line)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_figures_are_those_of_the_results() -> None:
    check = run(sys.executable, "runs/readme.py", "--check")
    assert check.returncode == 0, check.stderr


def test_the_snippet_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    assert len(code.group(1).strip().splitlines()) <= 8
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.group(1), {})
    assert printed.getvalue().strip() == (ROOT / "results" / "snippet.txt").read_text().strip()
    assert printed.getvalue().strip() in README


def test_the_commands_are_found() -> None:
    for kind in ("make demo", "make test", "make train-mini", "train.py", "compressor corpus", "python evaluate.py"):
        assert any(kind in line for line in blocks()), kind


def test_every_make_target_exists() -> None:
    for line in blocks():
        if line.startswith("make "):
            assert run("make", "--dry-run", line.split()[1]).returncode == 0, line


@pytest.mark.parametrize("line", [line for line in blocks() if "train.py" in line])
def test_training_commands_are_valid(line: str) -> None:
    arguments = shlex.split(line.split("train.py", 1)[1])
    printed = run(sys.executable, "train.py", *arguments, "--print_config")
    assert printed.returncode == 0, printed.stderr
    launch = re.search(r"--config_file (\S+)", line.split("train.py", 1)[0])
    assert launch is None or (ROOT / launch.group(1)).exists()


@pytest.mark.parametrize("line", [line for line in blocks() if line.startswith("compressor corpus")])
def test_corpus_commands_are_valid(line: str) -> None:
    arguments = shlex.split(line)[2:]
    printed = run(sys.executable, "-m", "compressor", "corpus", *arguments, "--print_config")
    assert printed.returncode == 0, printed.stderr


SMALL = {
    "regeneration": ["--lengths", "96", "--limit", "2"],
    "qa": ["--limit", "2", "--tokens", "4"],
    "utilisation": ["--limit", "2", "--data", "arxiv-test", "--lengths", "32", "--resamples", "50"],
    "efficiency": ["--tokens", "4", "--lengths", "64", "--new_tokens", "4", "8", "--repeats", "1"],
}
"""What makes a task's command quick."""
COLUMNS = {
    "regeneration": {"tokens", "length", "n", "bleu", "rouge_l", "exact_match", "nll_per_token"},
    "qa": {"method", "dataset", "tokens", "n", "em", "f1", "retention_f1", "retention_em"},
    "utilisation": {"n"},
    "efficiency": {"tokens"},
}


@pytest.mark.parametrize("line", [line for line in blocks() if line.startswith("python evaluate.py")])
def test_evaluation_commands_run(line: str, tmp_path: Path) -> None:
    arguments = shlex.split(line)[2:]
    task = arguments[arguments.index("--task") + 1]
    done = run(sys.executable, "evaluate.py", *arguments, *SMALL[task], "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    assert COLUMNS[task] <= set(rows[0])
    if "--limit" in SMALL[task]:
        assert {row["n"] for row in rows if row.get("dataset") != "macro"} == {2}


def test_files_and_pictures_it_names_exist() -> None:
    for path in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:compressor|configs|runs|results|docs|data|models)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


def test_an_old_figure_is_noticed() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "runs" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stale = re.sub(r"(<!-- begin: details -->\n).*?(<!-- end)", r"\1old\n\2", README, flags=re.S)
    assert module.fill(stale) == module.fill(README) != stale
