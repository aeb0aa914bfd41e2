"""Several processes on one machine (gloo): the training that one process does, exact resume, a base in shards."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import CompressorError
from compressor.training.config import RunConfig
from compressor.training.loop import start_run
from compressor.training.sharding import sharding_asked

PROJECT = Path(__file__).resolve().parents[1]
STEPS = 10
SCHEDULE = [f"--training.steps={STEPS}", "--training.checkpoint_every=4", "--training.validate_every=8"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any) -> tuple[Path, str]:
    """An uninterrupted run of two processes, and what it printed."""
    output = tmp_path_factory.mktemp("pair") / "run"
    printed = command.finish(command.start([*training_options, *SCHEDULE, f"--output={output}"], processes=2))
    return output, printed


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, training_options: list[str], command: Any) -> Path:
    """The same run in one process with twice the accumulation."""
    output = tmp_path_factory.mktemp("single") / "run"
    argv = [*training_options, *SCHEDULE, "--training.gradient_accumulation_steps=2", f"--output={output}"]
    command.finish(command.start(argv))
    return output


def test_two_processes_speak_with_one_voice(pair: tuple[Path, str], command: Any) -> None:
    output, printed = pair
    assert "x 2 devices" in printed
    assert "0 dead" in printed
    assert printed.count(f"step {STEPS}/{STEPS}  loss") == 1
    assert [row["step"] for row in command.rows(output) if "loss" in row] == list(range(1, STEPS + 1))


def test_two_processes_equal_one_with_twice_the_accumulation(
    pair: tuple[Path, str], single: Path, command: Any
) -> None:
    close(command.rows(pair[0]), command.rows(single))
    for name in ("adapter_model.safetensors", "memory_tokens.safetensors"):
        ours, theirs = load_file(pair[0] / "final" / name), load_file(single / "final" / name)
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], atol=2e-3, rtol=1e-2)


def test_two_killed_and_resumed_processes_repeat_the_run_bit_for_bit(
    pair: tuple[Path, str], tmp_path: Path, training_options: list[str], command: Any
) -> None:
    output = tmp_path / "run"
    argv = [*training_options, *SCHEDULE, f"--output={output}"]
    process = command.start(argv, processes=2, dies_at=12)  # both of them in step 7
    printed = process.communicate(timeout=240)[0]
    assert process.returncode != 0, printed
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-0000004"]
    assert not (output / "final").exists()
    command.finish(command.start([*argv, "--training.resume=true"], processes=2))
    assert command.rows(output) == command.rows(pair[0])
    for name in ("adapter_model.safetensors", "memory_tokens.safetensors", "compressor.json"):
        assert (output / "final" / name).read_bytes() == (pair[0] / "final" / name).read_bytes()


def test_a_run_goes_on_with_more_processes_where_it_was(
    single: Path, tmp_path: Path, training_options: list[str], command: Any
) -> None:
    # The same command line, now on two processes: they share the batch, so that none is left out or repeated.
    output = tmp_path / "run"
    shutil.copytree(single, output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:07d}")
    argv = [
        *training_options,
        *SCHEDULE,
        "--training.gradient_accumulation_steps=2",
        f"--output={output}",
        "--training.resume=true",
    ]
    printed = command.finish(command.start(argv, processes=2))
    assert (
        printed.count(
            "note: training.gradient_accumulation_steps is 1 and not 2, so that a step keeps its 2 micro-batches"
        )
        == 1
    )
    close(command.rows(output), command.rows(single))


def test_the_launcher_passes_a_signal_on_and_both_processes_save(
    tmp_path: Path, training_options: list[str], command: Any
) -> None:
    # The launcher itself ends with status 1 and a traceback of its own; the run is saved all the same.
    output = tmp_path / "run"
    argv = [*training_options, "--training.steps=100000", "--training.checkpoint_every=100000", f"--output={output}"]
    process = command.start(argv, processes=2, launch="cpu.yaml")
    command.wait_for_rows(process, output, 3)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=240)[0]
    step = command.rows(output)[-1]["step"]
    assert f"stopped by a signal after step {step}; go on with --training.resume" in printed
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{step:07d}"]


@pytest.mark.parametrize(("world", "gpu", "cpu"), [("2", False, True), ("2", True, False), ("1", False, False)])
def test_processes_started_together_without_a_gpu_train_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: str, gpu: bool, cpu: bool
) -> None:
    # accelerate needs to be told: otherwise each process would take itself for the only one.
    asked: list[dict[str, Any]] = []
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)

    def accelerator(**options: Any) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(is_main_process=True)

    monkeypatch.setattr("compressor.processes.Accelerator", accelerator)
    start_run(RunConfig(output=str(tmp_path)))
    assert asked[0]["cpu"] is cpu


# -- a base in shards ----------------------------------------------------------------------------------------------

_SHARDS = """
import os, sys
sys.path.insert(0, {project!r})
import torch
from torch.distributed.tensor import DTensor
from compressor.model.load import load_base
from compressor.model.config import BaseConfig, CompressorConfig
from compressor.model.decoder import decode
from compressor.model.memory import memory_prefix
from compressor.processes import make_accelerator
from compressor.training.objectives import Trainee
from compressor.training.sharding import shard_base

def made():
    base = load_base(BaseConfig(path=sys.argv[1]))
    model = Trainee(base, CompressorConfig(memory_tokens=8, lora_rank=4, writer_rank=4, max_passage_tokens=64))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()

def findings(model, batch):
    memories = model.compress_ids([[7, 8, 9, 10, 11, 12], [5, 6, 7]])
    with torch.no_grad():
        logits = decode(model.base, memory_prefix(model.base, memories), torch.tensor([[1, 7, 8], [1, 5, 6]]))
    loss = model(batch)
    loss.backward()
    return logits, loss.detach(), dict((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)

def held_bytes(model):
    local = (getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters())
    return sum(one.numel() * one.element_size() for one in local if isinstance(one, torch.Tensor))

accelerator = make_accelerator()
assert accelerator.num_processes == 2
ids = torch.tensor([[7, 8, 9, 10, 11, 12], [5, 6, 7, 0, 0, 0]])
labels = torch.tensor([[7, 8, 9, 10, 11, 12, 2], [5, 6, 7, 2, -100, -100, -100]])
batch = dict(input_ids=ids, lengths=torch.tensor([6, 3]), memory_tokens=torch.tensor([8, 4]), regeneration_weight=1.0,
    regeneration_inputs=torch.cat([torch.ones(2, 1, dtype=torch.int64), ids], dim=1), regeneration_labels=labels)
for checkpointing in (False, True):
    whole, sharded = made(), made()
    wanted = findings(whole, batch)
    shard_base(sharded, accelerator)
    sharded.activation_checkpointing = checkpointing
    frozen = [p for n, p in sharded.named_parameters() if isinstance(p, DTensor)]
    assert frozen, "nothing is in shards"
    assert not any(p.requires_grad for p in frozen)
    assert any(".layers.0.mlp." in n and isinstance(p, DTensor) for n, p in sharded.named_parameters())
    assert not any("lora_" in n and isinstance(p, DTensor) for n, p in sharded.named_parameters())
    held = held_bytes(sharded)
    assert held < held_bytes(whole) - sum(p.numel() for p in frozen) * 4 * 0.45
    found = findings(sharded, batch)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])
    assert found[2].keys() == wanted[2].keys()
    for name, gradient in wanted[2].items():
        assert gradient is not None
        torch.testing.assert_close(found[2][name], gradient, atol=1e-4, rtol=1e-3, msg=name)
    assert held_bytes(sharded) == held, "layers stay gathered"
print("equal")
accelerator.end_training()
"""


@pytest.mark.slow
def test_a_base_in_shards_computes_what_a_whole_one_does(tiny_base_folder: Path, tmp_path: Path, project: Path) -> None:
    script = tmp_path / "shards.py"
    script.write_text(_SHARDS.format(project=str(project)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(script), str(tiny_base_folder)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_with_shards_is_training(
    optimizer: str, tmp_path: Path, training_options: list[str], command: Any
) -> None:
    # Muon's iteration in bfloat16, on processors that have it, makes 4e-3 of what sums in another order differ by.
    precise = "import compressor.training.optimizers as made\nmade.fast_bfloat16 = lambda device: False"
    argv = [*training_options, "--training.steps=6", "--training.validate_every=3", "--training.checkpoint_every=3"]
    argv += [
        f"--training.optimizer={optimizer}",
        "--training.gradient_accumulation_steps=2",
        "--training.activation_checkpointing=true",
    ]
    # The file for GPUs: processes without any take CPUs. On GPUs alone accelerate refuses shards under its DDP.
    as_on_gpus = "from accelerate import Accelerator\nAccelerator.multi_device = property(lambda self: True)"
    shards = [*argv, f"--output={tmp_path / 'shards'}"]
    change = f"{precise}\n{as_on_gpus}"
    printed = command.finish(command.start(shards, processes=2, launch="fsdp2.yaml", change=change))
    assert "frozen base in shards" in printed
    whole = [*argv, "--training.gradient_accumulation_steps=4", f"--output={tmp_path / 'whole'}"]
    command.finish(command.start(whole, change=precise))
    ours, theirs = command.rows(tmp_path / "shards"), command.rows(tmp_path / "whole")
    close(ours, theirs)
    # The adapter is saved whole: plain DDP goes on with it.
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "shards", resumed)
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoints" / "step-0000006")
    again = [*argv, f"--output={resumed}", "--training.resume=true"]
    command.finish(command.start(again, processes=2, change=precise))
    close(command.rows(resumed), theirs)


@pytest.mark.slow
def test_four_processes_train_as_one_does_and_go_on_for_two(
    tmp_path: Path, training_options: list[str], command: Any
) -> None:
    argv = [*training_options, "--training.steps=6", "--training.validate_every=3", "--training.checkpoint_every=3"]
    command.finish(command.start([*argv, f"--output={tmp_path / 'four'}"], processes=4))
    command.finish(command.start([*argv, "--training.gradient_accumulation_steps=4", f"--output={tmp_path / 'one'}"]))
    close(command.rows(tmp_path / "four"), command.rows(tmp_path / "one"))
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "four", resumed)
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoints" / "step-0000006")
    argv += [f"--output={resumed}", "--training.resume=true"]
    assert "training.gradient_accumulation_steps is 2" in command.finish(command.start(argv, processes=2))
    close(command.rows(resumed), command.rows(tmp_path / "one"))


def test_what_does_not_go_with_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding_asked(RunConfig())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(CompressorError, match="fsdp_version below 2"):
        sharding_asked(RunConfig())
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding_asked(RunConfig())
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    config = RunConfig()
    config.base.quantization, config.training.compile = "int8", "static"
    with pytest.raises(CompressorError, match=r"fsdp_offload_params.*base\.quantization.*training\.compile"):
        sharding_asked(config)


@pytest.mark.parametrize("path", sorted((PROJECT / "configs" / "accelerate").iterdir()), ids=lambda path: path.name)
def test_accelerate_takes_the_launch_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    found = load_config_from_file(str(path))
    assert found.num_processes >= 1
    asked = launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "train.py"])
    asked = _validate_launch_command(asked)[0]
    assert asked.mixed_precision == "no"  # anything else draws a note that it is ignored
    assert asked.use_fsdp is (path.name == "fsdp2.yaml")
    if asked.use_fsdp:
        assert int(asked.fsdp_version) == 2
        assert str(asked.fsdp_cpu_ram_efficient_loading) == "False"


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Rows of two logs are the same but for rounding."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            exact = key in ("step", "passages", "tokens", "learning_rate")
            assert value == (other[key] if exact else pytest.approx(other[key], rel=2e-3))
