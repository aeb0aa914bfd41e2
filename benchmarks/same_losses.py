"""Whether two commits compute the same: for changes that are to change nothing.

    python benchmarks/same_losses.py main HEAD

In a worktree of each commit, from the same seeds: a few steps of every stage of training on arxiv-mini, an evaluation,
a memory file and a packed text. Logs, figures, weights and files are equal to the last digit (status 0), or the first
difference of each is named (status 1). Everything runs in one process a commit, by the commands of both: a name that
one of them does not know is an error of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PASSAGE = "We study the conductivity of thin films at low temperature. A model with two bands is made.\n"
TRAINING = {
    "data.validation_limit": 4,
    "training.steps": 4,
    "training.warmup_steps": 1,
    "training.decay_steps": 0,
    "training.batch_passages": 4,
    "training.batch_tokens": 512,
    "training.log_every": 1,
    "training.validate_every": 2,
    "training.checkpoint_every": 4,
    "training.mixed_precision": "no",
    "training.threads": 1,
}
SMALL = [f"--{key}={value}" for key, value in TRAINING.items()]
MEASURED = ["--task=regeneration", "--data=arxiv-test", "--lengths=[48]", "--tokens=[16,4]"]
COMMANDS = [
    ["train", "--config", "configs/arxiv-mini/mini.yaml", "--output={}/regenerate", "--compressor.lora_rank=8", *SMALL],
    ["train", "--config", "configs/arxiv-mini/answer.yaml", "--output={}/answer", "--init={}/regenerate/final", *SMALL],
    ["evaluate", "--checkpoint={}/answer/final", "--output={}/evaluation", "--limit=4", "--resamples=20", *MEASURED],
    ["compress", "--text={}/passage.txt", "--checkpoint={}/answer/final", "--output={}/passage.memory"],
    ["pack", "--keep", "--output={}/passage.cz", "--base=models/arxiv-mini/base", "{}/passage.txt"],
]
"""{} is the folder of what a commit makes."""
MADE = ("*/log.jsonl", "*/final/*.safetensors", "evaluation/metrics.json", "evaluation/predictions.jsonl", "passage.*")
ITS_OWN = {"command", "commit", "versions", "seconds", "version", "date", "software", "timings"}
"""Keys of JSON that may differ."""
RUN = """
import json, sys
from compressor.commands.cli import main
for command in json.loads(sys.argv[1]):
    print(">", *command, flush=True)
    if main(command):
        sys.exit(f"failed: {command[0]}")
"""


def run(commit: str, folder: Path, kept: Path) -> str:
    """Run the commands on a commit, in a worktree that is removed afterwards, and move what they make to `kept`.

    Both commits work in one folder after the other: no path tells them apart. Returns what was said if it failed.
    """
    tree, made = folder / "tree", folder / "made"
    made.mkdir()
    (made / "passage.txt").write_text(PASSAGE * 4, encoding="utf-8")
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        commands = [[part.replace("{}", str(made)) for part in command] for command in COMMANDS]
        # By -c the worktree is on the path, before the package that is installed.
        program = [sys.executable, "-c", RUN, json.dumps(commands)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(program, cwd=tree, capture_output=True, text=True, env=environment)
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    made.rename(kept)
    return f"{commit}: {done.stdout[-1000:]}{done.stderr[-2000:]}" if done.returncode else ""


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """Where two values of JSON differ first, and how."""
    if isinstance(old, dict) and isinstance(new, dict):
        inside: Iterator[tuple[Any, Any, Any]] = (
            (key, old.get(key), new.get(key)) for key in {**old, **new} if key not in ITS_OWN
        )
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inside = ((number, *pair) for number, pair in enumerate(zip(old, new, strict=True)))
    else:
        return None if old == new else f"{place or 'the content'}: {old!r} is now {new!r}"
    found = (first_difference(one, other, f"{place}.{key}".lstrip(".")) for key, one, other in inside)
    return next((one for one in found if one is not None), None)


def compare(old: Path, new: Path) -> str | None:
    """The first difference of two files; of JSON its place, of others the byte."""
    if not new.exists():
        return "is not made any more"
    if old.suffix == ".jsonl":
        before, now = (
            [json.loads(line) for line in one.read_text(encoding="utf-8").splitlines()] for one in (old, new)
        )
        return first_difference(before, now)
    if old.suffix == ".json":
        return first_difference(
            json.loads(old.read_text(encoding="utf-8")), json.loads(new.read_text(encoding="utf-8"))
        )
    one, other = old.read_bytes(), new.read_bytes()
    if one == other:
        return None
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"byte {same:,} of {len(one):,} (now {len(other):,})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        old, new = Path(name, "old"), Path(name, "new")
        if said := run(options.old, Path(name), old) or run(options.new, Path(name), new):
            print(said)
            return 2
        files = sorted({path.relative_to(old) for pattern in MADE for path in old.glob(pattern)})
        differences = {path: compare(old / path, new / path) for path in files}
    for path, difference in differences.items():
        print(f"{'DIFFERS' if difference else 'equal  '}  {path}{': ' + difference if difference else ''}")
    return 1 if any(differences.values()) or not files else 0


if __name__ == "__main__":
    sys.exit(main())
