"""What the training loop needs to know: of a stage (`Stage`), and of where a run stands (`TrainingState`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

Batch = dict[str, Any]
"""Tensors plus `ids` (record ids, for messages), `targets` (tokens the loss is summed over) and `passages`."""


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    @property
    def module(self) -> nn.Module:
        """`module(batch)` returns the summed loss in nats, a scalar that carries the gradient."""

    def micro_batch(self, index: int) -> Batch:
        """The batch of this index: a pure function of the index and the seed, on the CPU."""

    def probe_batch(self) -> Batch:
        """The smallest useful batch, to see which parameters get a gradient."""

    def origin(self) -> dict[str, str]:
        """What the weights and batches are made from, a short text each: hashes of base and data, the optimiser.

        A run is resumed only where these are what they were.
        """

    def validate(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """Figures (with `loss`, lower is better) and sample lines; called on every process."""

    def save(self, folder: Path) -> None:
        """Write the model, without training state, whole or not at all."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into `module`, exactly."""


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
    micro_batches: int = 0
    """Micro-batches of a step, those of all processes together; 0 in checkpoints that did not record it."""
    averaged: int = 0
    """Steps whose weights the checkpoint's model is the mean of; 0 where it is the weights of the last."""
    origin: dict[str, str] = field(default_factory=dict)
    """What the run is made from (`Stage.origin`)."""

    def note_validation(self, loss: float) -> None:
        """Remember the step with the lowest validation loss."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
