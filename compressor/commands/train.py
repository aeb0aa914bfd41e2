"""`train.py`: build the stage, train it, and keep a record of each start."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

from compressor.files import atomic_file, make_folder, owned, read_json, write_json
from compressor.parsing import RENAMED, flat, read_yaml
from compressor.progress import note
from compressor.provenance import run_record
from compressor.training.answer import AnswerStage
from compressor.training.checkpoints import Checkpoints
from compressor.training.config import RunConfig
from compressor.training.footprint import step_bytes
from compressor.training.loop import start_run, train
from compressor.training.regenerate import CompressionStage
from compressor.training.stage import moved

FREE_TO_CHANGE = {
    "training.resume",
    "training.gradient_accumulation_steps",  # `Checkpoints.keep_batch` sees to it
    "training.log_every",
    "training.checkpoint_every",
    "training.threads",
    "data.workers",
}
"""Settings that a resumed run may change without a word: the loss does not depend on them."""


def run(config: RunConfig, switches: Any) -> None:
    """Train on all processes, or with --dry-run say what would be done."""
    accelerator = start_run(config)
    set_seed(config.seed)
    if switches.dry_run:
        stage = make_stage(config, accelerator)
        described = describe(stage, config, accelerator)
        if accelerator.is_main_process:
            print(yaml.safe_dump(asdict(config), sort_keys=False) + "\n" + described)
        return
    with owned(config.output) if accelerator.is_main_process else nullcontext():
        checkpoints = Checkpoints(Path(config.output), config.training.keep_last, accelerator)
        # Before minutes of tokenising, and before anything of the earlier run is touched.
        checkpoints.refuse_existing(config.training.resume)
        config = checkpoints.keep_batch(config)
        make_folder(config.output)
        stage = make_stage(config, accelerator)
        described = describe(stage, config, accelerator)  # makes a pass, which shards are gathered for by all
        if accelerator.is_main_process:
            print(described, flush=True)
        processes = accelerator.num_processes
        train(stage, config, accelerator, on_start=lambda step: record_start(config, step, processes, stage))


def record_start(config: RunConfig, step: int, processes: int, stage: CompressionStage) -> None:
    """Write `config.yaml` and add this start to `run.json`; say which settings a resumed run changes."""
    output, settings = Path(config.output), asdict(config)
    stored = output / "config.yaml"
    if step and stored.exists():
        before = {RENAMED.get(key, key): value for key, value in flat(read_yaml(stored)).items()}
        now = flat(settings)
        for key in sorted(key for key in now if before.get(key) != now[key] and key not in FREE_TO_CHANGE):
            note(f"note: {key} was {before.get(key)!r} before step {step} and is {now[key]!r} from here on")
    starts = read_json(output / "run.json") if step and (output / "run.json").exists() else []
    left_out = {use: one.record() for use, one in getattr(stage, "left_out", {}).items() if one.total}
    record = {**run_record(step), "processes": processes, "left_out": left_out}
    write_json(output / "run.json", [*starts, record])
    with atomic_file(stored) as path:
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def make_stage(config: RunConfig, accelerator: Accelerator) -> CompressionStage:
    """The stage that `config.stage` names."""
    if config.stage == "answer":
        return AnswerStage(config, accelerator)
    return CompressionStage(config, accelerator)


def describe(stage: CompressionStage, config: RunConfig, accelerator: Accelerator) -> str:
    """Batch arithmetic, parameter counts and an estimate of memory, as lines of text."""
    settings, devices = config.training, accelerator.num_processes
    batch = stage.micro_batch(0)
    trainable = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in stage.module.parameters() if not p.requires_grad)
    dead = dead_parameters(stage)
    sharded = getattr(stage.module, "sharded", False)
    lines = [
        f"stage {config.stage}, {settings.steps} steps, output {config.output}",
        f"batch: up to {settings.batch_tokens} passage tokens and {settings.batch_passages} passages per device x "
        f"{devices} device{'s' * (devices > 1)} x {settings.gradient_accumulation_steps} accumulated = up to "
        f"{settings.batch_tokens * devices * settings.gradient_accumulation_steps} tokens a step "
        f"(the first micro-batch has {batch['passages']} passages, {batch['targets']} targets)",
        f"parameters: {trainable:,} trainable ({100 * trainable / (trainable + frozen):.1f}%), {frozen:,} frozen, "
        f"{sum(dead.values()):,} dead (trainable, but no gradient reaches them)",
        *(f"  dead: {name} ({count:,})" for name, count in list(dead.items())[:10]),
        f"passes in {'bfloat16' if accelerator.mixed_precision == 'bf16' else 'the types of the weights'} on "
        f"{accelerator.device.type} (training.mixed_precision: {settings.mixed_precision})",
        *(["frozen base in shards: each device holds its part of every layer but the last"] * sharded),
        f"memory for each device, estimated: {step_bytes(stage, config, accelerator) / 2**30:.1f} GiB",
    ]
    return "\n".join(lines)


def dead_parameters(stage: CompressionStage) -> dict[str, int]:
    """Trainable parameters that get no gradient in one real backward pass, with their sizes.

    Leaves no gradients and no training state behind.
    """
    stage.module(moved(stage.probe_batch(), next(stage.module.parameters()).device)).backward()
    dead = {n: p.numel() for n, p in stage.module.named_parameters() if p.requires_grad and p.grad is None}
    stage.module.zero_grad(set_to_none=True)
    return dead
