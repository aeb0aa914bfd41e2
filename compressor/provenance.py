"""Where a result comes from: the code's commit, the versions, the command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

VERSION = "0.1.0"
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "sacrebleu",
    "rouge-score",
    "numpy",
)


def commit() -> str:
    """The checkout's commit, with `-dirty` where tracked files have changed since; `unknown` outside a checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        # In a hook of another repository git would answer for that one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=environment)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that figures depend on."""
    return {
        "compressor": VERSION,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def without_folders(text: str) -> str:
    """A text with the absolute paths in it shortened to their last part, so that it can be published."""
    # A slash that follows anything but a separator is in the middle of a relative path.
    return re.sub(r"(?<![^\s,\[\]='\"])/(?:[^/\s,\[\]]+/)+", "", text)


def run_record(step: int) -> dict[str, Any]:
    """A start of a training run, for `run.json`.

    Absolute paths in the command are shortened to their last part, so that a record can be published.
    """
    # Letters outside the locale's encoding come as surrogates, which no file can hold.
    arguments = [argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for argument in sys.argv]
    command = [without_folders(argument) for argument in arguments]
    return {"from_step": step, "command": command, "commit": commit(), "versions": versions()}
