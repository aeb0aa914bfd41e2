"""Studies: measurements of a compressor that are no scores of items.

A new one is a function `(config, accelerator, parts) -> Findings` in a file here, and a line in `evaluation/table.py`.
On all processes but the main one it returns None; bad settings are a `CompressorError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Findings:
    """What a study found, on the main process."""

    metrics: dict[str, Any]
    """Entries of `metrics.json`: at least `keys` (columns that tell rows apart), `figures`, `rows` and `notes`."""
    draw: Callable[[Path], None]
    """Writes its plots into a folder."""
