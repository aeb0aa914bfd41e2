"""What only a CUDA device shows: bfloat16 training, torch.compile, resuming there, memories between devices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from compressor.api import Compressor
from compressor.commands.cli import train_main
from compressor.model.config import BaseConfig
from compressor.model.decoder import decode
from compressor.model.fidelity import passage_scores
from compressor.model.generation import generate
from compressor.model.load import load_base
from compressor.model.memory import memory_prefix
from compressor.training.loop import StopSignal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BFLOAT16 = ["--base.dtype=bfloat16", "--training.steps=10", "--training.checkpoint_every=4"]
"""Options of a training whose weights are held in bfloat16, ten steps."""
PASSAGES = [[(7 * i + j) % 400 + 5 for i in range(n)] for j, n in enumerate((30, 9, 17))]


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def options(training_options: list[str]) -> list[str]:
    return [*training_options, *BFLOAT16]


def test_bfloat16_training_runs_and_resumes_on_the_gpu(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = options
    assert train_main([*argv, f"--output={tmp_path / 'whole'}"]) == 0
    whole = losses(tmp_path / "whole")
    assert sum(whole[5:]) < sum(whole[:5])  # of single steps the batches decide
    with monkeypatch.context() as patch:
        # Stop after the step in which the flag is read for the sixth time.
        reads: list[int] = []
        patch.setattr(
            StopSignal, "requested", property(lambda self: (reads.append(1), len(reads) > 5)[1]), raising=False
        )
        patch.setattr(StopSignal, "__init__", lambda self: setattr(self, "previous", {}))
        assert train_main([*argv, f"--output={tmp_path / 'parts'}"]) == 0
    assert len(losses(tmp_path / "parts")) == 6
    assert train_main([*argv, f"--output={tmp_path / 'parts'}", "--training.resume=true"]) == 0
    assert losses(tmp_path / "parts") == pytest.approx(whole, rel=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own import of its compiler
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_compiled_training_equals_plain_training(options: list[str], mode: str, tmp_path: Path) -> None:
    argv = [*options, "--training.steps=4", "--training.mixed_precision=no", "--base.dtype=float32"]
    assert train_main([*argv, f"--output={tmp_path / 'plain'}"]) == 0
    assert train_main([*argv, f"--output={tmp_path / mode}", f"--training.compile={mode}"]) == 0
    assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_a_memory_moves_between_devices(tiny_base_folder: Path, make_tiny_compressor: Callable[..., Any]) -> None:
    here: Compressor = make_tiny_compressor()
    there: Compressor = make_tiny_compressor(base=load_base(BaseConfig(path=str(tiny_base_folder)), "cuda"))
    for one, other in zip(here.compress_ids(PASSAGES), there.compress_ids(PASSAGES), strict=True):
        assert other.keys.device.type == "cuda"
        torch.testing.assert_close(one.keys, other.keys.cpu(), atol=1e-3, rtol=1e-3)
        ids = torch.tensor([[1, 7, 8]])
        with torch.no_grad():
            near = decode(here.base, memory_prefix(here.base, [other.to("cpu")]), ids)
            far = decode(there.base, memory_prefix(there.base, [one]), ids.cuda())
        torch.testing.assert_close(near, far.cpu(), atol=1e-2, rtol=1e-2)


def test_batches_equal_singles_on_the_gpu(tiny_base_folder: Path, make_tiny_compressor: Callable[..., Any]) -> None:
    model: Compressor = make_tiny_compressor(base=load_base(BaseConfig(path=str(tiny_base_folder)), "cuda"))
    memories = model.compress_ids(PASSAGES)
    prompts = [[1], [5, 6, 7], [1, 9]]
    together = generate(model.base, memory_prefix(model.base, memories), prompts, [8, 8, 8])
    for memory, prompt, expected in zip(memories, prompts, together, strict=True):
        assert generate(model.base, memory_prefix(model.base, [memory]), [prompt], [8])[0].ids == expected.ids


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own import of its compiler
@pytest.mark.parametrize("decoding", ["static", "compiled"])
def test_every_way_of_decoding_writes_the_same_on_the_gpu(
    decoding: str, tiny_base_folder: Path, make_tiny_compressor: Callable[..., Any]
) -> None:
    model: Compressor = make_tiny_compressor(base=load_base(BaseConfig(path=str(tiny_base_folder)), "cuda"))
    base, memories = (
        model.base,
        [one.truncate(k) for one, k in zip(model.compress_ids(PASSAGES), (8, 4, 1), strict=True)],
    )
    found = []
    for base.decoding in ("auto", decoding, decoding):  # a second batch has caches elsewhere
        found.append(generate(base, memory_prefix(base, memories), [[1], [5, 6, 7], [1, 9]], [24, 5, 12]))
    assert base.decoding == decoding  # the compiler was not given up
    for others in found[1:]:
        assert [one.ids for one in others] == [one.ids for one in found[0]]


def test_refinement_on_the_gpu(tiny_base_folder: Path) -> None:
    from compressor.model.config import CompressorConfig

    base = load_base(BaseConfig(path=str(tiny_base_folder), dtype="bfloat16"), "cuda")
    model = Compressor(base, CompressorConfig(memory_tokens=8, lora_rank=4, max_passage_tokens=64))
    plain, refined = (model.compress_ids(PASSAGES, 4, refine_steps=steps) for steps in (0, 20))
    nats = []
    for memories in (plain, refined):
        scored = passage_scores(base, memory_prefix(base, memories), PASSAGES)
        nats.append(-sum(float(one[:, 0].sum()) for one in scored))
    assert nats[1] < nats[0]
    assert refined[0].keys.dtype == plain[0].keys.dtype


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60e9, reason="needs 60 GB"
)
def test_a_training_step_of_an_8b_base_is_measured(project: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/training_step.py",
        "--shape",
        "llama3-8b",
        "--variants",
        "ours",
        "published recipe",
    ]
    command += ["--passages", "4", "--repeats", "2", "--memory", "--output", str(tmp_path / "step.json")]
    subprocess.run(command, cwd=project, check=True)
    ours = json.loads((tmp_path / "step.json").read_text())["variants"]["ours"]
    assert ours["bytes"] > 16e9
