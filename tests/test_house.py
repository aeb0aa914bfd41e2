"""The order of imports in the package; and `benchmarks/house.py`, which reads them, on a checkout of a known shape."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from scripts import load_script

ROWS = (
    ("__main__",),
    ("commands",),
    ("evaluation", "serving", "training"),
    ("api",),
    ("packing",),
    ("methods",),
    ("storage",),
    ("model",),
    ("data",),
    ("errors", "files", "parsing", "processes", "progress", "provenance", "streams", "unfinished"),
)
"""Folders and root modules of the package, the highest first. Each imports itself and what stands in rows below it;
those of the lowest row import one another."""
EXCEPTION = "model.memory", ("storage.memory_file", "storage.codec", "storage.calibration")
"""`Memory.save` and `Memory.load` know memory files, for who holds a memory."""


def test_imports_go_down_and_in_no_circle(project: Path) -> None:
    """Those inside functions and for types alone count as much as the others."""
    house = load_script(project / "benchmarks" / "house.py")
    trees = {house.module_of(path): tree for path, tree in house.sources(project, "compressor").items()}
    found = {module: house.imported(tree, module, set(trees)) for module, tree in trees.items()}
    del found["compressor"]  # the door from outside: it imports what is asked of it
    graph = {
        m.removeprefix("compressor."): {n.removeprefix("compressor.") for n in named} for m, named in found.items()
    }
    graph[EXCEPTION[0]] -= set(EXCEPTION[1])
    assert house.circles(graph) == []
    row = {part: number for number, parts in enumerate(ROWS) for part in parts}
    up = [
        f"{module} imports {imported}"
        for module, named in graph.items()
        for imported in named
        if (one := module.split(".")[0]) != (other := imported.split(".")[0])
        and row.get(other, -1) <= row[one] < len(ROWS) - 1
    ]
    assert not up
    assert sum(map(house.local_imports, trees.values())) < 60


def test_circles_and_counts(project: Path, tmp_path: Path) -> None:
    package = tmp_path / "compressor"
    (package / "part").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "a.py": "from compressor import b\n",
        "b.py": "def f():\n    from compressor.part.c import x\n    return x\n",
        "part/__init__.py": "",
        "part/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import compressor.a\nx = 1\n",
        "d.py": '"""Says\nwhat."""\n\n# why\nimport compressor.a\n',
    }.items():
        (package / name).write_text(text)
    command = [sys.executable, "benchmarks/house.py", str(tmp_path)]
    printed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "compressor 4 files 9 lines 5 of code" in lines
    assert "compressor/part 2 files 4 lines 4 of code" in lines
    assert "circles of imports, files in each: 3" in lines
    assert "a, b, part.c" in lines
    assert "imports inside functions: 1" in lines
    assert "longest function: compressor/b.py:1 f, 3 lines" in lines


def test_a_change_names_the_tests_that_import_it(project: Path) -> None:
    affected = runpy.run_path(str(project / "tests" / "affected.py"))["affected"]
    assert affected([]) == []
    assert affected(["tests/test_house.py", "LICENSE"]) == ["tests/test_house.py"]
    assert affected(["docs/faq.md"]) == ["tests/test_readme.py"]
    found = affected(["compressor/model/layouts.py"])
    assert "tests/test_layouts.py" in found
    assert len(found) < len(affected(["tests/conftest.py"])) / 2


def test_the_first_difference_of_two_commits_is_named(project: Path, tmp_path: Path) -> None:
    """`benchmarks/same_losses.py`, on files as it finds them."""
    script = runpy.run_path(str(project / "benchmarks" / "same_losses.py"))
    compare, (old, new) = script["compare"], (tmp_path / "old", tmp_path / "new")
    for folder in (old, new):
        folder.mkdir()
    assert compare(old / "a.json", new / "a.json") == "is not made any more"
    for name, before, now, said in (
        ("a.json", '{"loss": 1.5, "commit": "a"}', '{"loss": 1.5, "commit": "b"}', None),
        ("a.jsonl", '{"step": 1}\n{"loss": [1.5]}', '{"step": 1}\n{"loss": [1.25]}', "1.loss.0: 1.5 is now 1.25"),
        ("b.json", '{"loss": 1.5}', '{"nats": 1.5}', "loss: 1.5 is now None"),
        ("a.memory", "same", "same", None),
        ("b.memory", "some", "same", "byte 1 of 4 (now 4)"),
        ("c.memory", "some", "so", "byte 2 of 4 (now 2)"),
    ):
        (old / name).write_text(before)
        (new / name).write_text(now)
        assert compare(old / name, new / name) == said, name
    placed = [part for command in script["COMMANDS"] for part in command if "{}" in part]
    assert all(part.count("{}") == 1 for part in placed)
