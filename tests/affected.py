"""Print the tests of what a change touches, for `make check`: seconds rather than the minutes of `make test`.

    python tests/affected.py [COMMIT]        what differs from COMMIT, by default from where the branch left main

These are the changed test files, and those that import a changed module by its name. What depends on a module through
others is left to `make test`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = ("README.md", "docs/", "configs/", "runs/", "results/", "Makefile")
"""What `tests/test_readme.py` reads."""


def git(*arguments: str) -> list[str]:
    """The lines that a git command prints; none where it fails."""
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.splitlines() if run.returncode == 0 else []


def changed(since: str | None) -> list[str]:
    """Paths of files that differ from a commit, new ones included."""
    start = [since] if since else git("merge-base", "HEAD", "main")[:1] or ["HEAD"]
    return [*git("diff", "--name-only", *start), *git("ls-files", "--others", "--exclude-standard")]


@cache
def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, or may: `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return names


def affected(paths: list[str]) -> list[str]:
    """Test files for changed files."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths}
    shared = bool({"tests/conftest.py", "tests/forked.py"} & set(paths))
    found = {path for path in paths if path.startswith("tests/test_") and (ROOT / path).exists()}
    if any(path.startswith(DOCUMENTED) for path in paths):
        found.add("tests/test_readme.py")
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if shared or imported(path) & modules:
            found.add(str(path.relative_to(ROOT)))
    return sorted(found)


if __name__ == "__main__":
    print(*affected(changed(sys.argv[1] if len(sys.argv) > 1 else None)))
