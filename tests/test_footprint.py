"""The estimate of a step's memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from compressor.training.footprint import kept_bytes


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Softmax(-1), nn.ReLU()])
def test_what_is_tried_is_freed(activation: nn.Module) -> None:
    """A node that keeps its own output must not keep the graph: runs would train beside all that was tried."""
    model = nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8))
    model.requires_grad_(False)
    inputs, outputs = torch.ones(4, 8, requires_grad=True), []
    model[1].register_forward_hook(lambda *call: outputs.append(weakref.ref(call[2])))

    def run() -> Tensor:
        return model(inputs)

    assert kept_bytes(run, model) == 4 * 8 * 4  # the activation's output alone
    assert [one() for one in outputs] == [None]
