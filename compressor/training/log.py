"""What a training run tells: a line a step interval, rows in `log.jsonl`, a progress bar on a terminal, and trackers.

Trackers (wandb, tensorboard) have the figures of `log.jsonl`, and every setting, parameter counts, commit and versions
as the run's configuration; wandb also the samples of every validation as a table that grows, the best and last figures
as its summary, and the trained compressor as an artifact.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from compressor.files import atomic_file, write_errors
from compressor.parsing import flat
from compressor.progress import is_quiet
from compressor.provenance import commit, versions
from compressor.training.config import RunConfig
from compressor.training.stage import Stage, TrainingState


def start_trackers(accelerator: Accelerator, config: RunConfig, stage: Stage) -> None:
    """Begin the run of each tracker with what it needs to be repeated."""
    trained = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    known = {
        **flat(asdict(config)),
        "parameters.trained": trained,
        "parameters.frozen": sum(p.numel() for p in stage.module.parameters()) - trained,
        "commit": commit(),
        "processes": accelerator.num_processes,
        **{f"versions.{name}": value for name, value in versions().items()},
    }
    # TensorBoard takes plain values alone.
    plain = {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value) for key, value in known.items()
    }
    accelerator.init_trackers("compressor", config=plain)


class RunLog:
    """The log of one run; every process makes one, the main process writes.

    Sums of loss, targets and passages since the last row live in `state.interval`, so that a resumed run takes up those
    of its checkpoint.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, state: TrainingState):
        self.accelerator, self.state, self.steps = accelerator, state, config.training.steps
        self.path = Path(config.output) / "log.jsonl"
        self.first_step, self.earlier_seconds = state.step, state.seconds
        self.started = self.interval_started = time.monotonic()
        # What the interval held before this process: it does not count for the speed.
        self.inherited = list(state.interval)
        wandb = accelerator.is_main_process and any(tracker.name == "wandb" for tracker in accelerator.trackers)
        self.wandb = accelerator.get_tracker("wandb", unwrap=True) if wandb else None
        """Its run, on the main process."""
        self.samples: list[list[Any]] = []
        self.bar: tqdm | None = None
        if accelerator.is_main_process:
            kept = []
            if state.step and self.path.exists():
                # Rows written after the checkpoint belong to steps that are about to be repeated.
                kept = [
                    line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= state.step
                ]
            with atomic_file(self.path) as path:
                path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            if sys.stderr.isatty() and not is_quiet():
                self.bar = tqdm(total=self.steps, initial=state.step, unit="step", dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Running time so far, that of earlier processes included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def advance(self, loss: float, targets: float, passages: float) -> None:
        """Count a finished step: its summed loss in nats, its target tokens, its passages."""
        self.state.interval = [a + b for a, b in zip(self.state.interval, (loss, targets, passages), strict=True)]
        if self.bar is not None:
            self.bar.update()

    def training(self, learning_rate: float, gradient_norm: float) -> None:
        """Line and row of the interval that ends here."""
        now, state = time.monotonic(), self.state
        spent = max(now - self.interval_started, 1e-9)
        loss, targets, passages = state.interval
        mean = loss / targets
        left = (now - self.started) / (state.step - self.first_step) * (self.steps - state.step)
        self.line(
            f"{self._step()}  loss {mean:7.4f}  lr {learning_rate:.2e}  grad {gradient_norm:7.3f}  "
            f"{(targets - self.inherited[1]) / spent:8.0f} tokens/s  "
            f"{(passages - self.inherited[2]) / spent:7.1f} passages/s  ETA {duration(left)}"
        )
        values = {"loss": mean, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
        self.row(values | {"passages": state.passages, "tokens": state.tokens, "seconds": round(self.seconds, 2)})
        self.inherited, state.interval = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        self.interval_started = now

    def validation(self, figures: Mapping[str, float], samples: list[str]) -> None:
        """Line, samples (`kind: text`) and row of a validation."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.line(f"{self._step()}  validation  {shown}")
        for sample in samples:
            self.line("    " + sample)
        self.row({f"validation_{name}": value for name, value in figures.items()})
        if self.wandb is None:
            return
        import wandb  # optional

        step = self.state.step
        for sample in samples:
            kind, told, text = sample.strip().partition(": ")
            self.samples.append([step, *((kind, text) if told and " " not in kind else ("answer", sample.strip()))])
        table = wandb.Table(columns=["step", "kind", "text"], data=list(self.samples))
        self.wandb.log({"samples": table}, step=step)

    def finish(self, figures: Mapping[str, float], checkpoint: Path | None) -> None:
        """Summarise the last validation for wandb; log the folder `checkpoint`, if there is one, as an artifact."""
        if self.wandb is None:
            return
        self.wandb.summary.update({f"final_{name}": value for name, value in figures.items()})
        self.wandb.summary.update({"best_step": self.state.best_step, "best_loss": self.state.best_loss})
        if checkpoint is not None:
            self.wandb.log_artifact(str(checkpoint), name=f"compressor-{self.wandb.id}", type="model")

    def line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.accelerator.is_main_process and not is_quiet():
            tqdm.write(text, file=sys.stdout) if self.bar is not None else print(text, flush=True)

    def row(self, values: dict[str, float]) -> None:
        """Record figures at the number of steps done."""
        if self.accelerator.is_main_process:
            with write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.state.step, **values}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(values, step=self.state.step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _step(self) -> str:
        return f"step {self.state.step:>{len(str(self.steps))}}/{self.steps}"


def _step_of(line: str) -> float:
    """Step of a row of the log; a row that a kill cut short comes after all others."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
