"""README and docs: their figures are those of results/, their commands run, their Python prints what they show."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import load_script

from compressor.commands.cli import demo_main, evaluate_main, train_main
from compressor.commands.cli import main as cli
from compressor.model.bases import FLAGSHIP, FLAGSHIP_BASE, NAMED, default_checkpoint
from compressor.model.gguf_cache import cached

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "AGENTS.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if path.name != "log.md"
}
README = PAGES["README.md"]
FLAGSHIP_HERE = pytest.mark.skipif(
    cached(NAMED[FLAGSHIP_BASE].sha256) is None, reason=f"compressor fetch {FLAGSHIP_BASE} gets it"
)


def blocks(text: str) -> list[str]:
    """Command lines of a page's plain code blocks, continuation lines joined."""
    lines = []
    prose = re.sub(r"^```\w+\n.*?^```", "", text, flags=re.S | re.M)
    for block in re.findall(r"^```\n(.*?)^```", prose, re.S | re.M):
        lines += [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(make|python|compressor|accelerate) ", line)]


COMMANDS = [(page, line) for page, text in PAGES.items() if page != "docs/tasks.md" for line in blocks(text)]


def lines_with(*parts: str) -> list[str]:
    return [line for _, line in COMMANDS if any(part in line for part in parts)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def generator() -> Any:
    """runs/readme.py as a module."""
    return load_script(ROOT / "runs" / "readme.py")


def test_figures_are_those_of_the_results(generator: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main(["--check"]) == 0, capsys.readouterr().err


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.slow
@FLAGSHIP_HERE
def test_the_snippet_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    assert len(code.group(1).strip().splitlines()) <= 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compressor.model.bases.FLAGSHIP", FLAGSHIP)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.group(1), {})
    assert printed.getvalue().strip() == (ROOT / "results" / "snippet.txt").read_text().strip()
    assert printed.getvalue().strip() in README


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page: str) -> None:
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", PAGES[page], re.S)):
        assert ast.parse(code, f"{page}, block {number}").body


def test_the_commands_are_found() -> None:
    for kind in ("make demo", "make test", "make train-mini", "train.py", "compressor corpus", "python evaluate.py"):
        assert lines_with(kind), kind
    known = ("make", "python demo.py", "python evaluate.py", "accelerate", "compressor")
    assert not [line for _, line in COMMANDS if not line.startswith(known)]


def test_every_make_target_exists() -> None:
    for line in lines_with("make "):
        assert run("make", "--dry-run", line.split()[1]).returncode == 0, line


@pytest.mark.parametrize("line", lines_with("train.py"))
def test_training_commands_are_valid(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(line.split("train.py", 1)[1])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        train_main([*arguments, "--print-config"])
    assert ended.value.code == 0
    launch = re.search(r"--config_file (\S+)", line.split("train.py", 1)[0])
    assert launch is None or (ROOT / launch.group(1)).exists()


@pytest.mark.parametrize("line", lines_with("compressor corpus", "compressor questions"))
def test_data_commands_are_valid(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli([*shlex.split(line)[1:], "--print-config"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line.split("  #")[0], marks=[FLAGSHIP_HERE] if "smollm2" in line else [])
        for line in re.findall(r"^compressor serve .*", PAGES["docs/serving.md"], re.M)
    ],
)
def test_serving_commands_are_valid(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    own, _, rest = line.partition(" -- ")
    assert cli([*shlex.split(own)[1:], "--dry-run", "--", *shlex.split(rest)]) == 0
    assert " -m vllm.entrypoints.openai.api_server " in (printed := capsys.readouterr().out)
    assert printed.strip().endswith(rest.strip())


ELSEWHERE = ("docs/training.md", "docs/tasks.md")
"""Pages whose commands are run by other tests (test_tasks_page.py)."""
SHORT = {"index": ["--no_measure"], "calibrate": ["--limit", "16", "--lengths", "64"], "compress": ["--no_measure"]}
"""What makes a command quick."""


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if page not in ELSEWHERE and blocks(text)])
def test_commands_run_in_their_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with the files they name, on the small base."""
    text = "We study heat in graphene ribbons. A new model is proposed, and tested on data of two kinds."
    (tmp_path / "notes.txt").write_text(text)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i in range(2)))
    monkeypatch.chdir(tmp_path)
    assert default_checkpoint() == "models/arxiv-mini/compressor"
    served: list[Any] = []
    monkeypatch.setattr("compressor.commands.web.serve", served.append)
    for line in blocks(PAGES[page]):
        program, *arguments = shlex.split(line)
        if program == "compressor" and arguments[0] not in ("corpus", "questions"):
            output = arguments[arguments.index("-o") + 1] if "-o" in arguments else ""
            again = ["--overwrite"] if output and Path(output).is_file() else []
            assert cli([*arguments, *SHORT.get(arguments[0], []), *again]) == 0, (line, capsys.readouterr().err)
        elif line.startswith("python demo.py"):
            assert demo_main(arguments[1:]) == 0, (line, capsys.readouterr().err)
    assert len(served) == sum("--web" in line for line in blocks(PAGES[page]))
    if "regenerate notes.memory --exact" in PAGES[page]:
        assert text in capsys.readouterr().out


SMALL = {
    "regeneration": ["--lengths", "24", "--limit", "2", "--resamples", "50"],
    "qa": ["--limit", "2", "--tokens", "4", "--resamples", "50"],
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


@pytest.mark.parametrize("line", lines_with("python evaluate.py"))
def test_evaluation_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the small base, whatever they name."""
    monkeypatch.chdir(ROOT)
    arguments = [one.replace(FLAGSHIP, default_checkpoint()) for one in shlex.split(line)[2:]]
    assert (ROOT / FLAGSHIP).is_dir()
    task = arguments[arguments.index("--task") + 1]
    assert evaluate_main([*arguments, *SMALL[task], "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    assert COLUMNS[task] <= set(rows[0])
    if "--limit" in SMALL[task]:
        assert {row["n"] for row in rows if row.get("dataset") != "macro"} == {2}


def anchors(text: str) -> set[str]:
    """Names that links to headings of a page go by, as the host of the code makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", prose, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_files_pictures_and_headings_it_names_exist(page: str) -> None:
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", PAGES[page]):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target.read_text(encoding="utf-8")), link
    for path in re.findall(r"`((?:compressor|configs|runs|results|docs|data|models|tests)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_the_examples_of_things_to_add_are_those_that_are_tested() -> None:
    tested = (ROOT / "tests" / "test_extensions.py").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", PAGES["docs/architecture.md"], re.S)
    assert len(examples) == 4
    assert all(example in tested for example in examples)


def test_the_guards_of_the_traps_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGES["AGENTS.md"])
    assert len(re.findall(r"^\d+\. \*\*", PAGES["AGENTS.md"], re.M)) == 10 <= len(named)
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_hosted_checks_run_what_contributors_run_and_pin_what_they_use() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_an_old_figure_is_noticed(generator: Any) -> None:
    stale = re.sub(r"(<!-- begin: flagship -->\n).*?(<!-- end)", r"\1old\n\2", README, flags=re.S)
    assert generator.fill(stale) == generator.fill(README) != stale
