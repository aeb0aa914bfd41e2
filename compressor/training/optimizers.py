"""The optimisers of the training loop, and the mean of the weights over its steps, which a run may export instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.processes import fast_bfloat16
from compressor.training.config import TrainingConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024): steepest at zero, singular values end in .7 to 1.2."""
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for matrices.

    Steps are scaled to AdamW's usual size (Liu et al., arXiv 2502.16982), so that one learning rate does for both.
    Differs from `torch.optim.Muon` in that matrices of one shape are orthogonalised together, and in float32 on
    processors that compute bfloat16 slowly: there torch's takes a fifth of a training step of the bundled compressor.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; a closure is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                alike.setdefault(tuple(parameter.shape), []).append((parameter, update))
            for shape, pairs in alike.items():
                size = 0.2 * group["lr"] * math.sqrt(max(shape))
                for (parameter, _), one in zip(pairs, orthogonal(torch.stack([u for _, u in pairs])), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(one, alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix of each, by Newton-Schulz iterations.

    Args:
        matrices: `[count, rows, columns]`.

    Returns:
        The same shape and type, singular values about 1.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide.to(torch.bfloat16 if fast_bfloat16(matrices.device) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrices else x.mT).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimiser."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both; a closure is not supported."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        start = 0
        for part in self.parts:
            # Whoever loads a state dict replaces state and groups: those of the whole are what counts.
            end = start + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[start:end]
            part.step()
            start = end


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimiser over the trainable parameters; weight decay on matrices only."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = _linear_weights(module) if config.optimizer == "muon" else set()
    rest = [p for p in trainable if id(p) not in matrices]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    groups = [group for group in groups if group["params"]]
    if not matrices:
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    muon = Muon([p for p in trainable if id(p) in matrices], lr=config.learning_rate, weight_decay=config.weight_decay)
    # A module may have nothing but matrices; an optimiser refuses an empty list.
    return (
        MuonAdamW(muon, torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)) if groups else muon
    )


def _linear_weights(module: nn.Module) -> set[int]:
    """Ids of the trainable weights of linear layers, those shared with an embedding left out."""
    shared = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    linear = (part.weight for part in module.modules() if isinstance(part, nn.Linear))
    return {id(weight) for weight in linear if weight.requires_grad} - shared


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
            self.count = self.count + 1 if step >= self.first else 0
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
