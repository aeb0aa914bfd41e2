"""The estimate of a step's memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.data.batches import Piece
from compressor.methods.table import TRAINED
from compressor.model.table import layouts_of
from compressor.parsing import parse_config
from compressor.training.config import RunConfig
from compressor.training.footprint import kept_bytes, kept_of
from compressor.training.loop import start_run
from compressor.training.regenerate import CompressionStage


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


def test_weights_are_left_out_and_what_autocast_makes_of_them_is_not() -> None:
    model = nn.Linear(8, 16, bias=False).requires_grad_(False)
    inputs = torch.ones(4, 8, requires_grad=True)
    assert kept_bytes(lambda: model(inputs), model) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(lambda: model(inputs), model) == 8 * 16 * 2


@pytest.mark.parametrize(("longest", "other"), [(20, 12), (64, 24)])  # shorter and longer than all that are tried
@pytest.mark.parametrize("method", TRAINED)
def test_what_small_micro_batches_keep_tells_what_others_keep(
    method: str, longest: int, other: int, training_options: list[str], tmp_path: Path
) -> None:
    options = [
        f"--compressor.method={method}",
        f"--compressor.layout={layouts_of(method)[0]}",
        "--compressor.max_passage_tokens=64",
        "--objective.continuation=0",
        f'--data.lengths=[{{"low": {longest}, "high": {longest}}}]',
        f"--output={tmp_path}",
    ]
    config = parse_config(RunConfig, [*training_options, *options], "test")[0]
    accelerator = start_run(config)
    stage = CompressionStage(config, accelerator)
    record, most = stage.validation[-1].record, stage.module.config.memory_tokens
    with accelerator.autocast():
        kept = kept_of(stage, checkpointing=False)
        for rows, width in ((7, longest), (3, other)):
            batch = stage.collate(stage.held_out, [Piece(record, 0, width)] * rows, [most] * rows)
            found = kept_bytes(lambda batch=batch: stage.module(batch), stage.module)
            assert kept(*batch["input_ids"].shape) == pytest.approx(found, rel=0.1), (rows, width)
