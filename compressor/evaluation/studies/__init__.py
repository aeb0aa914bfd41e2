"""Studies by the name that `--task` takes: measurements of a compressor that are no scores of items.

A new study is a function `(config, accelerator, parts) -> Findings` in a file here and a line in `STUDIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from compressor.evaluation.settings import EvaluationConfig
    from compressor.unfinished import Unfinished

STUDIES: dict[str, str] = {
    "utilisation": "utilisation:utilisation",
    "efficiency": "efficiency:efficiency",
}
"""Where each study is; loaded when it is asked for, because studies use the runner."""


@dataclass(frozen=True)
class Findings:
    """What a study found, on the main process."""

    metrics: dict[str, Any]
    """Entries of `metrics.json`: at least `keys` (columns that tell rows apart), `figures`, `rows` and `notes`."""
    draw: Callable[[Path], None]
    """Writes its plots into a folder."""


Study = Callable[["EvaluationConfig", "Accelerator", "Unfinished"], "Findings | None"]
"""Runs on every process, and adds what is done to the parts; None on all but the main one. Bad settings are a
`CompressorError`."""


def load_study(name: str) -> Study:
    """The study of a name in `STUDIES`."""
    module, _, attribute = STUDIES[name].partition(":")
    return getattr(import_module(f"compressor.evaluation.studies.{module}"), attribute)
