"""The package as people install it: what is in it, and that it works in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
MOST = 60e6


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, env=kept | environment, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, "."], project)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_they_hold_what_they_should_and_nothing_else(built: tuple[Path, Path], project: Path) -> None:
    source, wheel = built
    tracked = set(run(["git", "ls-files"], project).splitlines())
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {name for name in tracked if name.startswith("compressor/")}
    carried = (
        "models/arxiv-mini/base/",
        "models/arxiv-mini/compressor/",
        "models/smollm2-135m/compressor/",
        "models/smollm2-135m/full-tuned/",
        "configs/",
        "data/",
    )
    shipped = {name for name in tracked if name.startswith(carried) or name == "results/published.json"}
    assert inside == code | {f"compressor/shipped/{name}" for name in shipped}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    left_out = {name for name in tracked if name.startswith(("models/arxiv-mini/methods/", ".ci/", ".github/"))}
    assert names - {"PKG-INFO"} == tracked - left_out
    for file in built:
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
        assert file.stat().st_size < MOST


def test_the_wheel_works_in_an_empty_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In a venv of its own that sees this one's libraries, but not this checkout."""
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    run([sys.executable, "-m", "venv", "--without-pip", venv], empty)
    python = venv / "bin" / "python"
    places = {path for path in sys.path if path.endswith("site-packages")} | {sysconfig.get_path("purelib")}
    (site,) = venv.glob("lib/*/site-packages")
    (site / "libraries.pth").write_text("\n".join(sorted(places)) + "\n")
    run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", built[1]], empty)
    small = {"KV_COMPRESSOR_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = venv / "bin" / "compressor"
    shown = run([command, "demo", "--length", "48"], empty, **small)
    assert "48 tokens -> 16 memory tokens" in shown
    assert "ROUGE-L" in shown
    (empty / "notes.txt").write_text("We study the conductivity of thin films.")
    run([command, "compress", "notes.txt", "-o", "notes.memory", "--tokens", "4"], empty, **small)
    assert run([command, "regenerate", "--memory", "notes.memory"], empty, **small).strip()
    code = (
        "from compressor import Compressor, Memory; import compressor, compressor.evaluation.report as report; "
        "print(compressor.__file__); report.load_published(); "
        "print(Compressor.from_pretrained().regenerate(Memory.load('notes.memory')))"
    )
    assert str(venv) in run([python, "-c", code], empty, **small)
    assert sorted(path.name for path in empty.iterdir()) == ["notes.memory", "notes.txt"]
