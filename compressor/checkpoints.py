"""Training checkpoints: written whole or not at all, never pickled.

`OUTPUT/checkpoints/step-0000200/` holds what the stage saves (`model/`), the optimiser's moments
(`optimizer.safetensors`) and `state.json`. The newest N and the best are kept.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compressor.errors import CompressorError
from compressor.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from compressor.training import Stage


@dataclass
class TrainingState:
    """Where a run stands. Batches, rates and random numbers follow from `step` and the seed."""

    step: int = 0
    passages: int = 0
    tokens: int = 0
    """Target tokens seen."""
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float | None = None
    interval: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Loss, targets and passages since the last row of the log."""

    def note_validation(self, loss: float) -> None:
        """Remember the step with the lowest validation loss."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, output: Path, keep_last: int, accelerator: Accelerator):
        self.output, self.folder = output, output / "checkpoints"
        self.keep_last, self.accelerator = keep_last, accelerator

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def newest(self) -> int:
        """Step of the newest complete checkpoint, 0 if there is none."""
        return max(self.steps(), default=0)

    def refuse_existing(self, resume: bool) -> None:
        """Raise a `CompressorError` if the folder holds a run that is not to be resumed."""
        if self.newest() and not resume:
            raise CompressorError(
                f"{self.output} already holds a run at step {self.newest()}: go on with --training.resume true, "
                "or choose another --output"
            )

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def start(
        self, stage: Stage, optimizer: torch.optim.Optimizer, names: dict[int, str], resume: bool
    ) -> TrainingState:
        """Create the folder or, with `resume`, load the newest checkpoint.

        Raises:
            CompressorError: the folder holds a run and `resume` is off, or the checkpoint is damaged or of another
                model.
        """
        self.refuse_existing(resume)
        steps = self.steps()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):  # a kill while saving leaves these
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if not steps:
            return TrainingState()
        path = self.path(steps[-1])
        try:
            state = TrainingState(**read_json(path / "state.json"))
            moments = load_file(path / "optimizer.safetensors")
            stage.load(path / "model")
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, OSError, TypeError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CompressorError(
                f"checkpoint {path} is of another model or damaged ({type(error).__name__}: {reason}): give the "
                "settings it was trained with, or delete this folder to resume from the one before it"
            ) from None
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in moments.items():
            name, moment = key.rsplit("/", 1)
            by_name.setdefault(name, {})[moment] = value
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                if name not in by_name:
                    raise CompressorError(
                        f"checkpoint {path} has no optimiser state for {name}: it is of another model"
                    )
                optimizer.state[parameter] = {
                    moment: value if moment == "step" else value.to(parameter.device)
                    for moment, value in by_name[name].items()
                }
        return state

    def save(self, stage: Stage, optimizer: torch.optim.Optimizer, names: dict[int, str], state: TrainingState) -> None:
        """Write the checkpoint of `state.step` atomically and delete those no longer kept."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with atomic_path(self.path(state.step)) as path:
                path.mkdir()
                stage.save(path / "model")
                moments = {
                    f"{names[id(parameter)]}/{moment}": value.detach().contiguous()
                    for parameter, values in optimizer.state.items()
                    for moment, value in values.items()
                }
                save_file(moments, path / "optimizer.safetensors")
                write_json(path / "state.json", asdict(state))
            steps = self.steps()
            for step in set(steps[: -self.keep_last]) - {state.best_step}:
                shutil.rmtree(self.path(step), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def export(self, stage: Stage) -> None:
        """Write the finished model to `OUTPUT/final`."""
        if self.accelerator.is_main_process:
            with atomic_path(self.output / "final") as path:
                stage.save(path)
        self.accelerator.wait_for_everyone()
