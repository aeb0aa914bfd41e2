"""`benchmarks/house.py`: figures of a checkout whose shape is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_circles_and_counts(project: Path, tmp_path: Path) -> None:
    package = tmp_path / "compressor"
    (package / "part").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "a.py": "from compressor import b\n",
        "b.py": "def f():\n    from compressor.part.c import x\n    return x\n",
        "part/__init__.py": "",
        "part/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import compressor.a\nx = 1\n",
        "d.py": "import compressor.a\n",
    }.items():
        (package / name).write_text(text)
    command = [sys.executable, "benchmarks/house.py", str(tmp_path)]
    printed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "compressor 4 files 5 lines" in lines
    assert "compressor/part 2 files 4 lines" in lines
    assert "circles of imports: 3" in lines
    assert "a, b, part.c" in lines
    assert "imports inside functions: 1" in lines
    assert "longest function: compressor/b.py:1 f, 3 lines" in lines
