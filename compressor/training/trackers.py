"""What trackers (wandb, tensorboard) are told of a run besides the figures of `log.jsonl`.

Every setting, parameter counts, commit and versions as the run's configuration; of wandb also the samples of every
validation as a table that grows, the best and last figures as its summary, and the trained compressor as an artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from compressor.parsing import flat
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


class Wandb:
    """The run of wandb, where it is among the trackers; elsewhere, and on other processes, nothing happens."""

    def __init__(self, accelerator: Accelerator):
        here = accelerator.is_main_process and any(tracker.name == "wandb" for tracker in accelerator.trackers)
        self.run = accelerator.get_tracker("wandb", unwrap=True) if here else None
        self.rows: list[list[Any]] = []

    def samples(self, step: int, samples: list[str]) -> None:
        """Add sample lines (`kind: text`) of a validation to the table `samples`: step, kind, text."""
        if self.run is None:
            return
        import wandb  # optional

        for sample in samples:
            kind, told, text = sample.strip().partition(": ")
            self.rows.append([step, *((kind, text) if told and " " not in kind else ("answer", sample.strip()))])
        self.run.log({"samples": wandb.Table(columns=["step", "kind", "text"], data=list(self.rows))}, step=step)

    def finish(self, state: TrainingState, figures: Mapping[str, float], checkpoint: Path | None) -> None:
        """Summarise the last validation; log the folder `checkpoint`, if there is one, as an artifact."""
        if self.run is None:
            return
        self.run.summary.update({f"final_{name}": value for name, value in figures.items()})
        self.run.summary.update({"best_step": state.best_step, "best_loss": state.best_loss})
        if checkpoint is not None:
            self.run.log_artifact(str(checkpoint), name=f"compressor-{self.run.id}", type="model")
