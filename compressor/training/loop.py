"""The one training loop: every stage runs through `train`.

A stage supplies a module, micro-batches by index, validation and saving (`Stage`). Everything that varies from step to
step is a pure function of the step and the seed (learning rate, batch contents, random numbers), so that a resumed run
repeats the uninterrupted one exactly and N processes repeat one process with N times the accumulation.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from compressor.errors import CompressorError, WriteError, first_line, lacking
from compressor.processes import (
    current_device,
    held_dtype,
    keep_kernels_few,
    make_accelerator,
    precise,
    return_free_memory,
    summed,
)
from compressor.progress import note
from compressor.training.checkpoints import Checkpoints
from compressor.training.config import RunConfig, TrainingConfig
from compressor.training.log import RunLog, start_trackers
from compressor.training.optimizers import WeightAverage, make_optimizer
from compressor.training.sharding import prepared
from compressor.training.stage import Batch, Stage, TrainingState, moved

TRIM_EVERY = 10
"""Steps after which a process on CPUs gives free memory back."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then cosine or constant (with an optional linear end)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    final = config.final_learning_rate
    if config.lr_scheduler_type == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if config.decay_steps and step >= config.steps - config.decay_steps:
        left = (config.steps - step) / config.decay_steps
        return config.learning_rate * (final + (1 - final) * max(0.0, left))
    return config.learning_rate


def start_run(config: RunConfig) -> Accelerator:
    """The accelerator of a training run; a tracker whose package is missing is a `CompressorError`."""
    for tracker in config.training.trackers:
        try:
            __import__({"wandb": "wandb", "tensorboard": "tensorboard"}[tracker])
        except ImportError:
            raise lacking("training.trackers", tracker, "tracking") from None
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    keep_kernels_few()
    precision = config.training.mixed_precision
    if precision == "auto" and held_dtype(config.base.dtype, current_device()) != "float32":
        # Weights that are held in half precision are computed with as they are: no cast in any pass.
        precision = "no"
    return make_accelerator(
        mixed_precision=precision,
        log_with=list(config.training.trackers) or None,
        project_dir=config.output,
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


def _refuse_non_finite(value: float, what: str, step: int, batches: Sequence[Batch], accelerator: Accelerator) -> None:
    if math.isfinite(value):
        return
    ids = gather_object([name for batch in batches for name in batch["ids"]])
    shown = ", ".join(map(str, ids[:40])) + (f" and {len(ids) - 40} more" if len(ids) > 40 else "")
    raise CompressorError(
        f"the {what} is {value} at step {step + 1}; records of the batch: {shown}. The last checkpoint is intact: "
        "lower training.learning_rate or look at these records, then go on with --training.resume"
    )


@dataclass(frozen=True)
class StepResult:
    """What a step left, agreed by all processes."""

    loss: float
    """Summed over all targets of the step, nats."""
    targets: float
    passages: float
    gradient_norm: float
    """Before clipping."""
    stop: bool
    """Whether a signal had reached any process."""


def run_step(
    stage: Stage,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: RunConfig,
    accelerator: Accelerator,
    stop: StopSignal,
) -> StepResult:
    """One optimiser step, the number `step` from 0, over `gradient_accumulation_steps` micro-batches on every process.

    Raises:
        CompressorError: the loss or the gradient is not finite; names the records.
    """
    settings, world, device = config.training, accelerator.num_processes, accelerator.device
    first = step * settings.gradient_accumulation_steps * world
    indices = [first + a * world + accelerator.process_index for a in range(settings.gradient_accumulation_steps)]
    batches = [stage.micro_batch(index) for index in indices]
    counts = [sum(batch[name] for batch in batches) for name in ("targets", "passages")]
    targets, passages = summed(torch.tensor(counts, dtype=torch.float64), accelerator)
    # In float16 the gradients of a mean over many targets vanish on their way back. A power of two rounds none.
    half = held_dtype(config.base.dtype, device) == "float16"
    scale = 2.0 ** math.floor(math.log2(targets / world)) if half and targets else 1.0
    loss_sum = torch.zeros((), dtype=precise(device), device=device)
    for index, batch in zip(indices, batches, strict=True):
        # Dropout depends on the micro-batch alone, not on which process runs it or what ran before.
        torch.manual_seed(config.seed * 1_000_003 + index)
        with nullcontext() if index == indices[-1] else accelerator.no_sync(module):
            loss = module(moved(batch, device))
            # DDP averages gradients over processes; the loss is a mean over all targets of the step.
            accelerator.backward(loss * (world * scale / targets))
        loss_sum += loss.detach().to(loss_sum)
    asked = torch.full_like(loss_sum, float(stop.requested))
    total_loss, stops = summed(torch.stack([loss_sum, asked]), accelerator)
    _refuse_non_finite(total_loss, "loss", step, batches, accelerator)
    trainable = [p for p in stage.module.parameters() if p.requires_grad]
    if scale != 1:
        torch._foreach_div_([p.grad for p in trainable if p.grad is not None], scale)
    norm = float(accelerator.clip_grad_norm_(trainable, settings.max_grad_norm))
    _refuse_non_finite(norm, "gradient norm", step, batches, accelerator)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(total_loss, targets, passages, norm, stops > 0)


def _compile(stage: Stage, mode: str, accelerator: Accelerator) -> None:
    """Compile the module, and try it forward and backward on two micro-batches; where that fails, do without."""
    stage.module.compile(dynamic=mode == "dynamic")
    reason = ""
    try:
        for index in range(2):
            with accelerator.autocast():
                loss = stage.module(moved(stage.micro_batch(index), accelerator.device))
            loss.backward()
    except (CompressorError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the compiler's own, of many kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
    stage.module.zero_grad(set_to_none=True)
    reasons = [one for one in gather_object([reason]) if one]
    if reasons:
        stage.module._compiled_call_impl = None
        if accelerator.is_main_process:
            note(
                f"note: torch {torch.__version__} cannot compile this model with training.compile {mode} "
                f"({reasons[0][:300]}): it is trained without"
            )


def train(
    stage: Stage,
    config: RunConfig,
    accelerator: Accelerator,
    on_start: Callable[[int], None] | None = None,
) -> TrainingState:
    """Run `stage` to `config.training.steps`, writing checkpoints, `log.jsonl` and `final/` into `config.output`.

    `on_start` is called on the main process with the step the run starts from, once nothing can refuse it any more and
    unless it is done already.

    Returns:
        The state at the end: `state.step` is smaller than `training.steps` when a signal stopped the run.

    Raises:
        CompressorError: a loss or gradient that is not finite; `output` holds another run, or one that was trained
            from another base or other data, or whose batch these processes cannot share.
    """
    checkpoints = Checkpoints(Path(config.output), config.training.keep_last, accelerator)
    config = checkpoints.keep_batch(config)
    settings = config.training
    optimizer = make_optimizer(stage.module, settings)
    names = {id(parameter): name for name, parameter in stage.module.named_parameters()}
    average = WeightAverage(stage.module, settings.average_from)
    state = checkpoints.start(stage, optimizer, names, average, resume=settings.resume)
    state.micro_batches = settings.gradient_accumulation_steps * accelerator.num_processes
    if on_start is not None and accelerator.is_main_process and state.step < settings.steps:
        on_start(state.step)
    if settings.compile != "no":
        _compile(stage, settings.compile, accelerator)
    module, stepping = prepared(stage.module, accelerator), accelerator.prepare_optimizer(optimizer)
    if settings.trackers:
        start_trackers(accelerator, config, stage)
    figures: dict[str, float] = {}
    log, stop = RunLog(accelerator, config, state), StopSignal()
    stopping = False
    try:
        while state.step < settings.steps and not stopping:
            rate = learning_rate(state.step, settings)
            for group in stepping.param_groups:
                group["lr"] = rate
            result = run_step(stage, module, stepping, state.step, config, accelerator, stop)
            # A signal that comes from here on counts in the next step, on all processes alike.
            stopping = result.stop
            state.step += 1
            average.update(state.step)
            if state.step % TRIM_EVERY == 0 and accelerator.device.type == "cpu":
                return_free_memory()
            state.passages += int(result.passages)
            state.tokens += int(result.targets)
            log.advance(result.loss, result.targets, result.passages)

            finished = state.step == settings.steps
            if finished or state.step % settings.log_every == 0:
                log.training(rate, result.gradient_norm)
            if finished or state.step % settings.validate_every == 0:
                with average.applied():
                    figures, samples = stage.validate(accelerator)
                log.validation(figures, samples)
                state.note_validation(figures["loss"])
            best = state.best_step == state.step
            if finished or stopping or best or state.step % settings.checkpoint_every == 0:
                state.seconds = round(log.seconds, 2)
                checkpoints.save(stage, optimizer, names, average, state)
        if state.step < settings.steps:
            log.line(f"stopped by a signal after step {state.step}; go on with --training.resume")
        else:
            with average.applied():
                checkpoints.export(stage)
            log.finish(figures, Path(config.output) / "final" if settings.log_model else None)
    except WriteError as error:
        raise checkpoints.interrupted(error) from None
    finally:
        stop.restore()
        log.close()
    # Ends trackers and the process group: processes that leave it open can abort at exit.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return state
