"""Where a result comes from: the code's commit, the versions, the command."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """The checkout's commit, or `unknown` outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that figures depend on."""
    import compressor

    return {
        "compressor": compressor.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def run_record() -> dict[str, Any]:
    """What `run.json` of a training run holds."""
    return {
        "command": sys.argv,
        "commit": commit(),
        "versions": versions(),
        "machine": platform.processor() or "unknown",
    }
