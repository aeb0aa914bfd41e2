"""The notebooks: they run from start to end, offline, and hold what they print and draw."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def drawn(cells: list[Any]) -> bool:
    return any("image/png" in one.get("data", {}) for cell in cells for one in cell.get("outputs", []))


@each
def test_what_it_shows_is_kept_and_names_no_folder_of_this_machine(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [one for cell in cells for one in cell.get("outputs", [])]
    assert {one["output_type"] for one in outputs} <= {"stream", "execute_result", "display_data"}
    assert drawn(cells) or notebook.stem == "tasks"
    shown = json.dumps([{**one, "data": {**one.get("data", {}), "image/png": ""}} for one in outputs])
    # No absolute path at all: a slash that begins a word, and a folder's name before the next.
    assert not re.findall(r"(?<![\w.~<:/])/[\w.-]+/", shown)


@pytest.mark.slow
@each
def test_it_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the small compressor, in a folder that holds nothing."""
    pytest.importorskip("nbclient")
    runner = load_script(ROOT / "runs" / "notebooks.py")
    monkeypatch.setenv("KV_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = runner.tidied(runner.executed(notebook, tmp_path))
    assert drawn(done.cells) or notebook.stem == "tasks"
