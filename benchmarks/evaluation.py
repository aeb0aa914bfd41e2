"""What an evaluation takes and where it goes, now and on an earlier commit.

    python benchmarks/evaluation.py --old 0c58212^ --output results/benchmark-evaluation.json

`evaluate.py` regenerates --limit passages at five lengths from three numbers of memory tokens, in a process of its own
for each commit, the earlier one in a worktree that is removed afterwards; both read this checkout's checkpoint. Seconds
are the process's own, without imports. What functions take is theirs alone: what is written within a score is not the
score's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compressor.files import write_json
from compressor.streams import exits_cleanly

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "models" / "arxiv-mini" / "compressor"
PARTS = {
    "compressing": ["MemoryMethod.compress"],
    "scoring": ["score"],
    "writing": ["generate"],
    "figures of passages": ["Regeneration.run"],
    "rows and intervals": ["make_rows"],
}
"""Functions and methods, wherever in the package they are, whose time is a part."""
DRIVER = """
import functools, importlib, json, runpy, sys, time
parts, modules, arguments = json.loads(sys.argv[1])
for name in modules:
    importlib.import_module(name)
spent, open_parts = dict.fromkeys(parts, 0.0), [["", 0.0]]
def timed(part, function):
    @functools.wraps(function)
    def wrapper(*args, **options):
        started, own = time.process_time(), [part, 0.0]
        open_parts.append(own)
        try:
            return function(*args, **options)
        finally:
            taken = time.process_time() - started
            open_parts.pop()
            spent[part] += taken - own[1]
            open_parts[-1][1] += taken
    return wrapper
loaded = [module for name, module in list(sys.modules.items()) if name.startswith("compressor.")]
for part, names in parts.items():
    for owner, _, name in (one.rpartition(".") for one in names):
        places = loaded
        if owner:  # a method, of one class
            places = {vars(module)[owner] for module in loaded if owner in vars(module)}
        found = [place for place in places if name in vars(place)]
        if not found:
            sys.exit(f"this commit has no {owner} {name}")
        for function in {getattr(place, name) for place in found}:
            wrapper = timed(part, function)
            for place in found:
                if getattr(place, name) is function:
                    setattr(place, name, wrapper)
started = time.process_time()
sys.argv = ["evaluate.py", *arguments]
try:
    runpy.run_path("evaluate.py", run_name="__main__")
except SystemExit as ended:
    if ended.code:
        raise
print(json.dumps({"seconds": time.process_time() - started, "parts": spent}))
"""
MODULES = ["compressor.evaluation.runner", "compressor.evaluation.tasks.regeneration", "compressor.methods.interface"]


def timed(tree: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an evaluation by a checkout, in all and by part, and the figures of its rows."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--task", "regeneration", "--checkpoint", str(CHECKPOINT), "--data", "arxiv-test"]
        arguments += [
            "--limit",
            str(options.limit),
            "--batch_size",
            str(options.batch_size),
            "--output",
            f"{folder}/made",
        ]
        arguments += ["--lengths", *map(str, options.lengths), "--tokens", *map(str, options.tokens)]
        # By -c the checkout is on the path, before the package that is installed.
        program = [sys.executable, "-c", DRIVER, json.dumps([PARTS, MODULES, arguments])]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(program, cwd=tree, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{done.stdout[-1000:]}{done.stderr[-2000:]}")
        rows = json.loads(Path(folder, "made", "metrics.json").read_text(encoding="utf-8"))["rows"]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["parts"]["loading and the rest"] = found["seconds"] - sum(found["parts"].values())
    return found | {"rouge_l": [row["rouge_l"] for row in rows]}


def commit(name: str) -> str:
    """The hash of a commit."""
    shown = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", name], capture_output=True, text=True)
    if shown.returncode:
        raise SystemExit(f"{name} is no commit of this repository")
    return shown.stdout.strip()


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", help="commit to compare with")
    parser.add_argument("--limit", type=int, default=100, help="passages of each length")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 48, 96, 192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 4, 1])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = {commit("HEAD"): timed(ROOT, options)}
    if options.old:
        with tempfile.TemporaryDirectory() as folder:
            tree, name = Path(folder, "tree"), commit(options.old)
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", str(tree), name], check=True)
            try:
                rows[name] = timed(tree, options)
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    for name, found in rows.items():
        shares = ", ".join(f"{part} {seconds / found['seconds']:.0%}" for part, seconds in found["parts"].items())
        print(f"{name}: {found['seconds']:.1f} s: {shares}")
    if options.output:
        settings = {name: getattr(options, name) for name in ("limit", "batch_size", "lengths", "tokens")}
        surroundings = {"torch": torch.__version__, "threads": os.environ.get("OMP_NUM_THREADS")}
        write_json(
            options.output,
            {**settings, **surroundings, "rows": [{"commit": name, **row} for name, row in rows.items()]},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
