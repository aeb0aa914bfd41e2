"""The one training loop: every stage runs through `train`.

A stage supplies a module, micro-batches by index, validation and saving (`Stage`). Everything that varies from step to
step is a pure function of the step and the seed (learning rate, batch contents, random numbers), so that a resumed run
repeats the uninterrupted one exactly and N processes repeat one process with N times the accumulation.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from compressor.checkpoints import Checkpoints, TrainingState
from compressor.config import RunConfig, TrainingConfig
from compressor.errors import CompressorError
from compressor.files import atomic_path

Batch = dict[str, Any]
"""Tensors plus `ids` (record ids, for messages), `targets` (tokens the loss is summed over) and `passages`."""


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    @property
    def module(self) -> nn.Module:
        """`module(batch)` returns the summed loss in nats, a scalar that carries the gradient."""

    def micro_batch(self, index: int) -> Batch:
        """The batch of this index: a pure function of the index and the seed, on the CPU."""

    def probe_batch(self) -> Batch:
        """The smallest useful batch, to see which parameters get a gradient."""

    def validate(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """Figures (with `loss`, lower is better) and sample lines; called on every process."""

    def save(self, folder: Path) -> None:
        """Write the model, without training state."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into `module`, exactly."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then cosine or constant (with an optional linear end)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    final = config.final_learning_rate
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if config.decay_steps and step >= config.steps - config.decay_steps:
        left = (config.steps - step) / config.decay_steps
        return config.learning_rate * (final + (1 - final) * max(0.0, left))
    return config.learning_rate


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerator for this run; a tracker whose package is missing is a `CompressorError`."""
    for tracker in config.training.trackers:
        try:
            __import__({"wandb": "wandb", "tensorboard": "tensorboard"}[tracker])
        except ImportError:
            raise CompressorError(
                f"training.trackers names {tracker}, which is not installed: pip install 'kv-compressor[tracking]'"
            ) from None
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    return Accelerator(
        # Without this, processes started together on a machine without accelerators would each train alone.
        cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available(),
        mixed_precision=config.training.mixed_precision,
        log_with=list(config.training.trackers) or None,
        project_dir=config.output,
    )


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request to stop after the current step."""

    def __init__(self) -> None:
        self.requested = False
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class RunLog:
    """One aligned line a step interval on the screen, one JSON row in `log.jsonl`, and the trackers."""

    def __init__(self, accelerator: Accelerator, config: RunConfig, first_step: int):
        self.accelerator = accelerator
        self.steps = config.training.steps
        self.path = Path(config.output) / "log.jsonl"
        self.bar: tqdm | None = None
        if accelerator.is_main_process:
            kept = []
            if first_step and self.path.exists():
                # Rows written after the checkpoint belong to steps that are about to be repeated.
                kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= first_step]
            with atomic_path(self.path) as path:
                path.write_text("".join(line + "\n" for line in kept))
            if sys.stderr.isatty():
                self.bar = tqdm(total=self.steps, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def line(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout) if self.bar is not None else print(text, flush=True)

    def row(self, step: int, values: dict[str, float]) -> None:
        """Record figures of a step (1-based: the number of steps done)."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(values, step=step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _step_of(line: str) -> float:
    """Step of a row of the log; a row that a kill cut short comes after all others."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


def _move(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _refuse_non_finite(value: float, what: str, step: int, batches: Sequence[Batch], accelerator: Accelerator) -> None:
    if math.isfinite(value):
        return
    ids = gather_object([name for batch in batches for name in batch["ids"]])
    shown = ", ".join(map(str, ids[:40])) + (f" and {len(ids) - 40} more" if len(ids) > 40 else "")
    raise CompressorError(
        f"the {what} is {value} at step {step + 1}; records of the batch: {shown}. The last checkpoint is intact: "
        "lower training.learning_rate or look at these records, then go on with --training.resume true"
    )


def train(stage: Stage, config: RunConfig, accelerator: Accelerator) -> TrainingState:
    """Run `stage` to `config.training.steps`, writing checkpoints, `log.jsonl` and `final/` into `config.output`.

    Returns:
        The state at the end: `state.step` is smaller than `training.steps` when a signal stopped the run.

    Raises:
        CompressorError: a loss or gradient that is not finite; `output` holds another run.
    """
    settings = config.training
    optimizer = make_optimizer(stage.module, settings)
    names = {id(parameter): name for name, parameter in stage.module.named_parameters()}
    checkpoints = Checkpoints(Path(config.output), settings.keep_last, accelerator)
    state = checkpoints.start(stage, optimizer, names, resume=settings.resume)
    if settings.compile != "no":
        stage.module.compile(dynamic=settings.compile == "dynamic")
    module, prepared = accelerator.prepare(stage.module, optimizer)
    if settings.trackers:
        accelerator.init_trackers("compressor", config={"output": config.output, "seed": config.seed})
    log = RunLog(accelerator, config, state.step)
    stop = StopSignal()
    world, accumulation = accelerator.num_processes, settings.accumulation
    parameters = [p for p in stage.module.parameters() if p.requires_grad]
    # Sums since the last line: loss, targets, passages; a resumed run takes up those of its checkpoint.
    interval = torch.tensor(state.interval, dtype=torch.float64)
    earlier = interval.clone()
    started = interval_started = time.monotonic()
    first_step = state.step
    # Agreed by all processes once a step; a signal that comes later counts in the next step.
    stopping = False

    try:
        while state.step < settings.steps and not stopping:
            first = state.step * accumulation * world
            indices = [first + a * world + accelerator.process_index for a in range(accumulation)]
            batches = [stage.micro_batch(index) for index in indices]
            counts = torch.tensor(
                [sum(b["targets"] for b in batches), sum(b["passages"] for b in batches)], dtype=torch.float64
            )
            targets, passages = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
            rate = learning_rate(state.step, settings)
            for group in prepared.param_groups:
                group["lr"] = rate

            loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
            for index, batch in zip(indices, batches, strict=True):
                # Dropout depends on the micro-batch alone, not on which process runs it or what ran before.
                torch.manual_seed(config.seed * 1_000_003 + index)
                last = index == indices[-1]
                with nullcontext() if last else accelerator.no_sync(module):
                    loss = module(_move(batch, accelerator.device))
                    # DDP averages gradients over processes; the loss is a mean over all targets of the step.
                    accelerator.backward(loss * (world / targets))
                loss_sum += loss.detach().double()
            totals = torch.stack(
                [loss_sum, torch.tensor(float(stop.requested), dtype=torch.float64).to(loss_sum.device)]
            )
            total_loss, stops = accelerator.reduce(totals, "sum").tolist()
            _refuse_non_finite(total_loss, "loss", state.step, batches, accelerator)
            norm = float(accelerator.clip_grad_norm_(parameters, settings.clip))
            _refuse_non_finite(norm, "gradient norm", state.step, batches, accelerator)
            prepared.step()
            prepared.zero_grad()
            stopping = stops > 0
            state.step += 1
            state.passages += int(passages)
            state.tokens += int(targets)
            interval += torch.tensor([total_loss, targets, passages], dtype=torch.float64)
            log.advance()

            if state.step % settings.log_every == 0 or state.step == settings.steps:
                now = time.monotonic()
                spent = max(now - interval_started, 1e-9)
                mean = float(interval[0] / interval[1])
                fresh = (interval - earlier).tolist()
                left = (now - started) / (state.step - first_step) * (settings.steps - state.step)
                log.line(
                    f"step {state.step:>{len(str(settings.steps))}}/{settings.steps}  loss {mean:7.4f}  "
                    f"lr {rate:.2e}  grad {norm:7.3f}  {fresh[1] / spent:8.0f} tokens/s  "
                    f"{fresh[2] / spent:7.1f} passages/s  ETA {duration(left)}"
                )
                log.row(
                    state.step,
                    {
                        "loss": mean,
                        "learning_rate": rate,
                        "gradient_norm": norm,
                        "passages": state.passages,
                        "tokens": state.tokens,
                        "seconds": round(state.seconds + now - started, 2),
                    },
                )
                interval.zero_()
                earlier.zero_()
                interval_started = now

            last_step = state.step == settings.steps or stopping
            validated = state.step % settings.validate_every == 0 or state.step == settings.steps
            if validated:
                figures, samples = stage.validate(accelerator)
                log.line(
                    f"step {state.step:>{len(str(settings.steps))}}  validation  "
                    + "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
                )
                for sample in samples:
                    log.line("    " + sample)
                log.row(state.step, {f"validation_{name}": value for name, value in figures.items()})
                state.note_validation(figures["loss"])
            if (
                last_step
                or state.step % settings.checkpoint_every == 0
                or (validated and state.best_step == state.step)
            ):
                saved = state.at(state.seconds + time.monotonic() - started, interval.tolist())
                checkpoints.save(stage, optimizer, names, saved)
    finally:
        stop.restore()
        log.close()
        if settings.trackers:
            accelerator.end_training()

    state.seconds += time.monotonic() - started
    if state.step < settings.steps:
        log.line(f"stopped by a signal after step {state.step}; go on with --training.resume true")
    else:
        checkpoints.export(stage)
    return state
