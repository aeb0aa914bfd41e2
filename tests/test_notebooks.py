"""The notebooks run from start to end, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook: Path, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the small compressor, in a folder that holds nothing."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("KV_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(project))
    read = nbformat.read(notebook, as_version=4)
    done = nbclient.NotebookClient(read, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [one for cell in done.cells for one in cell.get("outputs", []) if one["output_type"] == "error"]
    assert any("image/png" in one.get("data", {}) for cell in done.cells for one in cell.get("outputs", [])) or (
        notebook.stem == "tasks"
    )
