"""An exponential moving average of the trained weights, which is what a run validates and exports where it has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average `d * average + (1 - d) * weights` after each step (Polyak and Juditsky 1992).

    At a rate that does not fall, weights wander about where they lead; their average does not, and does without most of
    the rate's fall. In a run's first steps d is `(1 + step) / (10 + step)` where that is less than `decay`, so that the
    weights a run starts from are soon forgotten.

    Args:
        module: whose parameters with a gradient are averaged.
        decay: d, 0 to 1; 0 keeps no average.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        trained = {name: one for name, one in module.named_parameters() if one.requires_grad and decay}
        self.trained: dict[str, nn.Parameter] = trained
        self.weights: dict[str, Tensor] = {name: one.detach().clone() for name, one in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after `step` steps in."""
        if self.weights:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.weights.values()), list(self.trained.values()), share)

    @torch.no_grad()
    def restore(self, last: dict[str, Tensor]) -> None:
        """Take what the module has been given, a checkpoint's model, as the average, and give it the last weights.

        Args:
            last: by parameter name; empty where the checkpoint holds no average, whose model is the last weights.
        """
        parameters = dict(self.module.named_parameters())
        for name, average in self.weights.items():
            average.copy_(parameters[name])
        for name, weights in last.items():
            parameters[name].copy_(weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights in this block, if there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.trained.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
