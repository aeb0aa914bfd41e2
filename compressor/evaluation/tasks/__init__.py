"""Tasks of evaluation by the name that `--task` takes."""

from __future__ import annotations

from compressor.evaluation.tasks.interface import Item, Result, Task
from compressor.evaluation.tasks.qa import QuestionAnswering
from compressor.evaluation.tasks.regeneration import Regeneration

TASKS: dict[str, type[Task]] = {"regeneration": Regeneration, "qa": QuestionAnswering}

__all__ = ["TASKS", "Item", "QuestionAnswering", "Regeneration", "Result", "Task"]
