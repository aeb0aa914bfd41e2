"""The mean of the trained weights over a run's steps, which is what a run validates and exports where it has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The mean of the weights after `first` steps and after each later one (SWA, arXiv 1803.05407).

    At a rate that does not fall, weights wander about where they lead; their mean does not, and does without the rate's
    fall. Until `first` it is the weights themselves.

    Args:
        module: whose parameters with a gradient are averaged.
        first: step; None keeps no mean.
    """

    def __init__(self, module: nn.Module, first: int | None):
        self.module, self.first, self.count = module, first, 0
        averaged = first is not None
        self.trained = {name: one for name, one in module.named_parameters() if one.requires_grad and averaged}
        self.weights: dict[str, Tensor] = {name: one.detach().clone() for name, one in self.trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        if self.first is not None:
            self.count += step >= self.first
            share = 1 / max(1, self.count)
            torch._foreach_lerp_(list(self.weights.values()), list(self.trained.values()), share)

    @torch.no_grad()
    def restore(self, last: dict[str, Tensor], count: int) -> None:
        """Take what the module has been given, a checkpoint's model, as the mean, and give it the last weights.

        Args:
            last: by parameter name; empty where the checkpoint holds no mean, whose model is the last weights.
            count: steps whose weights the mean is of; 0 where there is none, which then begins here.
        """
        self.count = count
        parameters = dict(self.module.named_parameters())
        for name, average in self.weights.items():
            average.copy_(parameters[name])
        for name, weights in last.items():
            parameters[name].copy_(weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the mean in this block, if there is one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.trained.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
