"""What a training run tells: a line a step interval, rows in `log.jsonl`, trackers, a progress bar on a terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from compressor.files import atomic_file, write_errors
from compressor.progress import is_quiet
from compressor.training.config import RunConfig
from compressor.training.stage import TrainingState


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
        """Line, samples and row of a validation."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.line(f"{self._step()}  validation  {shown}")
        for sample in samples:
            self.line("    " + sample)
        self.row({f"validation_{name}": value for name, value in figures.items()})

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
