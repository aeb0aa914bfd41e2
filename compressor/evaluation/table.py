"""Every task and study of evaluation by the name that `--task` takes. A new one is a file and a line here.

Nothing is imported before it is asked for, so that settings are checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressor.data.instructions import preset_names
from compressor.errors import unknown
from compressor.evaluation import settings
from compressor.model.table import load

STUDY = "compressor.evaluation.studies"


@dataclass(frozen=True)
class Entry:
    """A task or study."""

    place: str
    """Module and name: of the package, or with dots of any."""
    settings: type[settings.EvaluationConfig] = settings.TaskSettings
    """What it reads."""
    package: str = "compressor.evaluation.tasks"

    def load(self) -> Any:
        """The subclass of `Task`, or the study's function."""
        return load(self.place, self.package)


TASKS: dict[str, Entry] = {
    "regeneration": Entry("regeneration:Regeneration", settings.RegenerationSettings),
    "qa": Entry("qa:QuestionAnswering", settings.QuestionAnsweringSettings),
    "interference": Entry("interference:Interference", settings.QuestionAnsweringSettings),
    "continuation": Entry("continuation:Continuation", settings.ContinuationSettings),
    "retrieve": Entry("retrieve:Retrieve", settings.RetrieveSettings),
    "prompt": Entry("prompt:Prompted", settings.PromptSettings),
}
STUDIES: dict[str, Entry] = {
    "utilisation": Entry("utilisation:utilisation", settings.UtilisationSettings, STUDY),
    "efficiency": Entry("efficiency:efficiency", settings.EfficiencySettings, STUDY),
}


def entry(name: str) -> Entry:
    """The task, study or preset of that name; an unknown one is a `CompressorError` that names the nearest."""
    found = (TASKS | STUDIES).get(name)
    if found is None and name in preset_names():
        found = TASKS["prompt"]
    if found is None:
        raise unknown("task", name, [*TASKS, *preset_names(), *STUDIES])
    return found


def readers(setting: str) -> list[str]:
    """Names of the tasks and studies that read a setting."""
    return [name for name, one in (TASKS | STUDIES).items() if setting in one.settings.__dataclass_fields__]
