"""Runs notebooks from start to end, and writes them back with what they print and draw.

    python runs/notebooks.py [notebooks/train-your-own.ipynb ...]     all of them by default

Warnings and progress are left out, and this machine's folders, so that two runs differ in results alone.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from compressor.streams import exits_cleanly

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def executed(path: Path, folder: Path) -> Any:
    """A notebook, run in `folder`, with its outputs.

    Raises:
        CellExecutionError: a cell fails.
    """
    import nbclient
    import nbformat

    read = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(read, timeout=3600, startup_timeout=600, resources=place).execute()


def tidied(notebook: Any) -> Any:
    """The same without warnings, progress, times of execution, and names of folders that mean nothing elsewhere."""
    places = {re.escape(str(Path.home())): "~", re.escape(tempfile.gettempdir()) + r"/[^/\s]+": "FOLDER"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for one in cell.get("outputs", []):
            for place, name in places.items():
                if "text" in one:
                    one.text = re.sub(place, name, one.text)
                for kind, value in one.get("data", {}).items():
                    if kind.startswith("text/"):
                        one.data[kind] = re.sub(place, name, value)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


@exits_cleanly
def main() -> int:
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    os.environ["PYTHONPATH"] = str(FOLDER.parent)
    for path in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(tidied(executed(path, Path(folder))), path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
