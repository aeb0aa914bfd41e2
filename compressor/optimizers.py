"""The optimisers of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compressor.config import TrainingConfig


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimiser.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal before it is
    applied. Its steps are scaled to AdamW's usual size (Liu et al., arXiv 2502.16982), so that one learning rate does
    for both.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
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
    muon = torch.optim.Muon(
        [p for p in trainable if id(p) in matrices],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    # A module may have nothing but matrices; an optimiser refuses an empty list.
    return (
        MuonAdamW(muon, torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)) if groups else muon
    )


def _linear_weights(module: nn.Module) -> set[int]:
    """Ids of the trainable weights of linear layers, those shared with an embedding left out."""
    shared = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    linear = (part.weight for part in module.modules() if isinstance(part, nn.Linear))
    return {id(weight) for weight in linear if weight.requires_grad} - shared
