"""Tasks of evaluation by the name that `--task` takes."""

from __future__ import annotations

from compressor.evaluation.tasks.classify import Classify
from compressor.evaluation.tasks.continuation import Continuation
from compressor.evaluation.tasks.interface import Item, Result, Task
from compressor.evaluation.tasks.paraphrase import Paraphrase
from compressor.evaluation.tasks.qa import QuestionAnswering
from compressor.evaluation.tasks.regeneration import Regeneration
from compressor.evaluation.tasks.retrieve import Retrieve
from compressor.evaluation.tasks.summarise import Summarise

TASKS: dict[str, type[Task]] = {
    "regeneration": Regeneration,
    "qa": QuestionAnswering,
    "continuation": Continuation,
    "summarise": Summarise,
    "classify": Classify,
    "paraphrase": Paraphrase,
    "retrieve": Retrieve,
}

__all__ = ["TASKS", "Item", "QuestionAnswering", "Regeneration", "Result", "Task"]
