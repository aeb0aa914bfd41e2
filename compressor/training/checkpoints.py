"""Training checkpoints: written whole or not at all, never pickled.

`OUTPUT/checkpoints/step-0000200/` holds what the stage saves (`model/`), the optimiser's moments
(`optimizer.safetensors`) and `state.json`. Where a run averages its weights, `model/` holds the mean, as what is
validated and exported does, and `last.safetensors` the weights that the run goes on from. The newest N and the best are
kept.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compressor.errors import FULL, MORE_SPACE, CompressorError, WriteError
from compressor.files import FolderKind, atomic_folder, read_json, remove_folder, unreadable, write_json
from compressor.progress import note
from compressor.training.config import RunConfig
from compressor.training.optimizers import WeightAverage
from compressor.training.stage import Stage, TrainingState

VALIDATION = "data.validation"
"""The one part of a run's origin that may change: the losses of two validation sets are not compared."""
LAST = "last.safetensors"
CHECKPOINT = FolderKind(
    "a training checkpoint", ("state.json", "optimizer.safetensors", LAST, "model/*", "model/writer/*")
)


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
        """Raise a `CompressorError` if the folder holds a run that is not to be resumed, or files that are no run's."""
        newest = self.newest()
        run = newest or (self.output / "run.json").exists()
        if run and not resume:
            where = f"at step {newest}" if newest else "that was stopped before its first checkpoint"
            raise CompressorError(
                f"{self.output} already holds a run {where}: go on with --training.resume, or choose another --output"
            )
        foreign = [name for name in ("config.yaml", "log.jsonl", "final") if (self.output / name).exists()]
        if foreign and not run:
            raise CompressorError(
                f"{self.output} holds {' and '.join(foreign)} but no run, and this run would replace that: choose "
                "another --output"
            )

    def keep_batch(self, config: RunConfig) -> RunConfig:
        """The configuration with the accumulation that keeps a resumed run's batch for this number of processes.

        A step's place in the data follows from its number and the micro-batches of a step, so these must stay the same.

        Raises:
            CompressorError: this many processes cannot share the batch equally.
        """
        processes, accumulation = self.accelerator.num_processes, config.training.gradient_accumulation_steps
        newest = self.newest()
        stored = read_json(self.path(newest) / "state.json") if newest else {}
        batch = stored.get("micro_batches", 0) if isinstance(stored, dict) else 0
        if not batch or batch == processes * accumulation:
            return config
        if batch % processes:
            fitting = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
            raise CompressorError(
                f"{self.output} trains with {batch} micro-batches a step, which {processes} processes cannot share "
                f"equally: resume with one of {fitting} processes"
            )
        if self.accelerator.is_main_process:
            note(
                f"note: training.gradient_accumulation_steps is {batch // processes} and not {accumulation}, so that "
                f"a step keeps its {batch} micro-batches with {processes} process{'es' * (processes > 1)}"
            )
        return replace(config, training=replace(config.training, gradient_accumulation_steps=batch // processes))

    def compare(self, stage: Stage, state: TrainingState, path: Path) -> None:
        """Refuse to go on from `state` with another base, other data or another optimiser; name what is not refused.

        Raises:
            CompressorError: names all that differs.
        """
        before, now = state.origin or _recorded_base(path), stage.origin()
        changed = {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}
        if changed.pop(VALIDATION, None):
            state.best_step, state.best_loss = 0, None
            if self.accelerator.is_main_process:
                note(f"note: {VALIDATION} differs from step {state.step} on: the best checkpoint is looked for anew")
        if changed:
            shown = "; ".join(f"{key}: {_short(then)}, now {_short(this)}" for key, (then, this) in changed.items())
            raise CompressorError(
                f"{self.output} was trained to step {state.step} with other settings ({shown}): resume with those, or "
                f"start another run from its weights with --init {path / 'model'} and another --output"
            )
        if self.accelerator.is_main_process and (unknown := sorted(set(now) - set(before))):
            note(f"note: checkpoint {path.name} does not record {', '.join(unknown)}: not compared")
        state.origin = now

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def start(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        names: dict[int, str],
        average: WeightAverage,
        resume: bool,
    ) -> TrainingState:
        """Create the folder or, with `resume`, load the newest checkpoint.

        Raises:
            CompressorError: the folder holds a run and `resume` is off, or the checkpoint is damaged, of another
                model, or was trained with other settings (`compare`).
        """
        self.refuse_existing(resume)
        steps = self.steps()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):  # a kill while saving leaves these
                if re.fullmatch(r"\.step-\d{7}\.\w{8}", leftover.name):
                    shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if not steps:
            return TrainingState(origin=stage.origin())
        path = self.path(steps[-1])
        with _naming(path):
            state = TrainingState(**read_json(path / "state.json"))
        self.compare(stage, state, path)
        with _naming(path):
            moments = load_file(path / "optimizer.safetensors")
            stage.load(path / "model")
            last = path / LAST
            average.restore(load_file(last) if last.exists() else {}, state.averaged)
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

    def save(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        names: dict[int, str],
        average: WeightAverage,
        state: TrainingState,
    ) -> None:
        """Write the checkpoint of `state.step` atomically and delete those no longer kept."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with atomic_folder(self.path(state.step), CHECKPOINT) as path:
                with average.applied():
                    stage.save(path / "model")
                moments = {
                    f"{names[id(parameter)]}/{moment}": value.detach().contiguous()
                    for parameter, values in optimizer.state.items()
                    for moment, value in values.items()
                }
                save_file(moments, path / "optimizer.safetensors")
                if average.weights:
                    save_file({name: one.detach() for name, one in average.trained.items()}, path / LAST)
                write_json(path / "state.json", asdict(state) | {"averaged": average.count})
            steps = self.steps()
            for step in set(steps[: -self.keep_last]) - {state.best_step}:
                remove_folder(self.path(step), CHECKPOINT)
        self.accelerator.wait_for_everyone()

    def interrupted(self, error: WriteError) -> WriteError:
        """The same error, with what is kept of the run and how to go on."""
        newest = self.newest()
        kept = f"the checkpoint of step {newest} is whole" if newest else "there was no checkpoint yet"
        space = MORE_SPACE if error.errno in FULL else f"check {self.output} and its permissions"
        resume = "go on with --training.resume" if newest else "start again"
        return WriteError(error.target, error.reason, error.errno, f"{kept}: {space}, then {resume}")

    def export(self, stage: Stage) -> None:
        """Write the finished model to `OUTPUT/final`."""
        if self.accelerator.is_main_process:
            stage.save(self.output / "final")
        self.accelerator.wait_for_everyone()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what a damaged or foreign checkpoint raises into a `CompressorError` that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (SafetensorError, OSError, TypeError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CompressorError(
            f"checkpoint {path} is of another model or damaged ({type(error).__name__}: {reason}): give the "
            "settings it was trained with, or delete this folder to resume from the one before it"
        ) from None


def _recorded_base(path: Path) -> dict[str, str]:
    """The origin of checkpoints that did not record it: the base that their model names."""
    settings = path / "model" / "compressor.json"
    return {"base": read_json(settings)["base"]["fingerprint"]} if settings.exists() else {}


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:12]
