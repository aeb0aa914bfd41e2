"""The training loop in one process: schedule, log, checkpoints, stops, failures, and learning by heart."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import compressor.training.objectives
from compressor.api import Compressor
from compressor.commands.cli import train_main
from compressor.data.batches import IGNORED, padded_width
from compressor.errors import CompressorError
from compressor.files import FolderKind, atomic_folder
from compressor.parsing import parse_config
from compressor.training import footprint
from compressor.training.checkpoints import Checkpoints
from compressor.training.config import RunConfig, TrainingConfig
from compressor.training.loop import learning_rate, start_run, train
from compressor.training.optimizers import make_optimizer
from compressor.training.regenerate import CompressionStage


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(output: Path, kind: str = "loss") -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# -- the loop, with a stage that says what it was asked ------------------------------------------------------------


class Dot(nn.Module):
    """`weight . x`, summed; `x` is a function of the index, so that gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return ((batch["x"] - self.weight) ** 2).sum() + (self.bias * batch["x"]).sum()


class Scripted:
    """A stage whose batches, validation losses and mishaps are given."""

    def __init__(self, validation: Callable[[int], float] = lambda call: 1.0, at: dict[int, Any] | None = None):
        torch.manual_seed(0)
        self.module = Dot()
        self.validation, self.calls, self.asked = validation, 0, []
        self.at = at or {}
        """What happens when the micro-batch of this index is asked for."""

    def micro_batch(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(index)) + 5
        event = self.at.get(index)
        if event == "nan":
            x[0, 0] = math.nan
        elif event is not None:
            event()
        return {"x": x, "ids": [f"record-{index}-{i}" for i in range(30)], "targets": 3 + index % 2, "passages": 2}

    def probe_batch(self) -> dict[str, Any]:
        return self.micro_batch(0)

    def origin(self) -> dict[str, str]:
        return {"data.train": "scripted"}

    def validate(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        self.calls += 1
        return {"loss": self.validation(self.calls)}, []

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        with atomic_folder(folder, FolderKind("a model", ("model.safetensors",))) as path:
            save_file(self.module.state_dict(), path / "model.safetensors")

    def load(self, folder: Path) -> None:
        self.module.load_state_dict(load_file(folder / "model.safetensors"))


def settings(output: Path, **training: Any) -> RunConfig:
    chosen = {"steps": 12, "warmup_steps": 2, "log_every": 1, "mixed_precision": "no", "learning_rate": 1e-2}
    return RunConfig(output=str(output), training=TrainingConfig(**(chosen | training)))


def run(stage: Any, config: RunConfig) -> Any:
    return train(stage, config, start_run(config))


def raise_signal(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


def test_muon_takes_linear_layers_and_adamw_the_rest() -> None:
    from compressor.training.config import TrainingConfig
    from compressor.training.optimizers import Muon, MuonAdamW, make_optimizer

    torch.manual_seed(0)
    hidden, head = nn.Linear(4, 6), nn.Linear(4, 5, bias=False)
    module = nn.ModuleDict({"words": nn.Embedding(5, 4), "hidden": hidden, "head": head})
    head.weight = module["words"].weight
    optimizer = make_optimizer(module, TrainingConfig(optimizer="muon", learning_rate=0.01, warmup_steps=0))
    assert isinstance(optimizer, MuonAdamW)
    assert optimizer.param_groups[0]["params"] == [hidden.weight]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    head(module["words"](torch.tensor([1, 2]))).sum().backward()
    hidden(torch.randn(9, 4) * torch.tensor([1, 1, 1, 4])).pow(2).sum().backward()
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    optimizer.step()
    moved = {name: (p.detach() - before[name]) for name, p in module.named_parameters()}
    assert all(bool(step.abs().max() > 0) for step in moved.values())
    # Orthogonal steps: their singular values are nearly alike, the gradient's are not.
    spread = [s.max() / s.min() for s in map(torch.linalg.svdvals, (moved["hidden.weight"], hidden.weight.grad))]
    assert 3 * spread[0] < spread[1]
    assert set(optimizer.state) == set(module.parameters())
    assert isinstance(make_optimizer(nn.Linear(3, 2, bias=False), TrainingConfig(optimizer="muon")), Muon)
    assert isinstance(make_optimizer(module, TrainingConfig()), torch.optim.AdamW)


def test_muon_is_torchs_in_any_precision() -> None:
    from compressor.training.optimizers import Muon

    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((6, 4), (4, 6), (6, 4), (5, 5))]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    optimizers = [
        Muon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        for optimizer in optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = parameter.detach().sin() + 0.1
            optimizer.step()
    for mine, other, before in zip(ours, theirs, weights, strict=True):
        # torch's iterates in bfloat16
        torch.testing.assert_close(mine - before, other - before, atol=0.02, rtol=0.05)


@pytest.mark.parametrize(("capabilities", "expected"), [({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "no")])
def test_bfloat16_only_where_the_processor_has_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    from compressor.processes import make_accelerator

    # Of a machine with a GPU, too, where accelerate is told to stay on the CPU.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert make_accelerator("auto").mixed_precision == expected
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_every_micro_batch_is_asked_for_once_in_order(tmp_path: Path) -> None:
    stage = Scripted()
    state = run(stage, settings(tmp_path, steps=4, gradient_accumulation_steps=3))
    assert stage.asked == list(range(12))
    assert (state.step, state.passages, state.tokens) == (4, 24, sum(3 + i % 2 for i in range(12)))


def test_the_loss_is_the_mean_over_the_targets_of_the_whole_step(tmp_path: Path) -> None:
    stage = Scripted()
    run(stage, settings(tmp_path, steps=1, gradient_accumulation_steps=3, max_grad_norm=1e9))
    twin = Scripted()
    batches = [twin.micro_batch(index) for index in range(3)]
    loss = sum(twin.module(batch) for batch in batches) / sum(batch["targets"] for batch in batches)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in twin.module.parameters()]).norm()
    row = rows(tmp_path)[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_gradients_reach_weights_through_a_base_in_float16(tmp_path: Path) -> None:
    """Of a mean over a million targets they are under the smallest number of that type on their way."""

    class Halved(Scripted):
        def micro_batch(self, index: int) -> dict[str, Any]:
            batch = super().micro_batch(index)
            return batch | {"x": batch["x"] / 1000, "targets": 1 << 20}

    class HalfDot(Dot):
        def forward(self, batch: dict[str, Any]) -> Tensor:
            return (self.bias.half() * batch["x"].half()).float().sum() + 0 * self.weight.sum()

    stage = Halved()
    stage.module = HalfDot()
    config = settings(tmp_path, steps=1)
    config.base.dtype = "float16"
    run(stage, config)
    expected = Halved().micro_batch(0)["x"].sum(0) / (1 << 20)
    assert rows(tmp_path)[0]["gradient_norm"] == pytest.approx(expected.norm().item(), rel=1e-2)


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    seen = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: seen.append(
            torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]).norm().item()
        )
    )
    run(Scripted(), settings(tmp_path, steps=3, max_grad_norm=0.5))
    handle.remove()
    assert seen == pytest.approx([0.5] * 3, rel=1e-3)
    assert all(row["gradient_norm"] > 1 for row in rows(tmp_path))


def test_the_learning_rate_warms_up_and_falls() -> None:
    def curve(**options: Any) -> list[float]:
        config = TrainingConfig(steps=10, learning_rate=1.0, **options)
        return [learning_rate(step, config) for step in range(10)]

    cosine = curve(warmup_steps=4, final_learning_rate=0.1)
    assert cosine[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert cosine[7] == pytest.approx(0.55)
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    assert 0.1 < cosine[9] < 0.2
    assert curve(warmup_steps=0)[0] == 1.0
    constant = curve(warmup_steps=2, lr_scheduler_type="constant")
    assert constant == pytest.approx([0.5] + [1.0] * 9)
    falling = curve(warmup_steps=0, lr_scheduler_type="constant", decay_steps=4, final_learning_rate=0.2)
    assert falling == pytest.approx([1.0] * 7 + [0.8, 0.6, 0.4])


def test_the_log_has_a_row_a_step_with_the_rate_that_was_used(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=12, validate_every=5)
    run(Scripted(validation=lambda call: 1.0 / call), config)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, 13))
    assert [row["learning_rate"] for row in logged] == [learning_rate(step, config.training) for step in range(12)]
    assert [row["passages"] for row in logged] == [2 * (step + 1) for step in range(12)]
    assert [row["step"] for row in rows(tmp_path, "validation_loss")] == [5, 10, 12]


def test_fewer_rows_hold_means_over_their_steps(tmp_path: Path) -> None:
    run(Scripted(), settings(tmp_path / "each", learning_rate=1e-6))
    run(Scripted(), settings(tmp_path / "fifth", learning_rate=1e-6, log_every=5))
    each, fifth = rows(tmp_path / "each"), rows(tmp_path / "fifth")
    assert [row["step"] for row in fifth] == [5, 10, 12]
    targets = [3 + index % 2 for index in range(12)]
    for row, (a, b) in zip(fifth, ((0, 5), (5, 10), (10, 12)), strict=True):
        mean = sum(e["loss"] * t for e, t in zip(each[a:b], targets[a:b], strict=True)) / sum(targets[a:b])
        assert row["loss"] == pytest.approx(mean)


def test_weight_decay_touches_matrices_only() -> None:
    module = Dot()
    module.weight.requires_grad_(True)
    groups = make_optimizer(module, TrainingConfig(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.3, [(2, 3)]),
        (0.0, [(3,)]),
    ]


def test_frozen_parameters_are_not_optimised() -> None:
    module = Dot()
    module.weight.requires_grad_(False)
    groups = make_optimizer(module, TrainingConfig()).param_groups
    assert [p is module.bias for g in groups for p in g["params"]] == [True]


# -- checkpoints ---------------------------------------------------------------------------------------------------


def kept(output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (output / "checkpoints").iterdir())


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 3.0, 2.0, 4.0, 4.0]
    state = run(
        Scripted(lambda call: losses[call - 1]), settings(tmp_path, validate_every=2, checkpoint_every=2, keep_last=2)
    )
    assert kept(tmp_path) == [4, 10, 12]
    assert (state.best_step, state.best_loss) == (4, 1.0)
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_the_best_is_saved_when_it_is_found(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 3.0]
    run(
        Scripted(lambda call: losses[call - 1]), settings(tmp_path, validate_every=4, checkpoint_every=100, keep_last=1)
    )
    assert kept(tmp_path) == [8, 12]


def test_a_checkpoint_has_no_pickle_in_it(tmp_path: Path) -> None:
    run(Scripted(), settings(tmp_path))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json", ".jsonl"}


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, log_every: int) -> None:
    options = {
        "gradient_accumulation_steps": 2,
        "log_every": log_every,
        "validate_every": 4,
        "checkpoint_every": 3,
        "weight_decay": 0.1,
    }
    run(Scripted(lambda call: 1.0 / call), settings(tmp_path / "whole", **options))
    stopped = run(Scripted(at={13: raise_signal()}), settings(tmp_path / "parts", **options))
    assert stopped.step == 7
    assert kept(tmp_path / "parts")[-1] == 7
    assert not (tmp_path / "parts" / "final").exists()
    stage = Scripted()
    state = run(stage, settings(tmp_path / "parts", resume=True, **options))
    assert stage.asked[0] == 14
    assert state.step == 12
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for row in (*whole, *parts):
        row.pop("seconds")
    assert whole == parts
    assert same_files(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


def test_what_a_kill_leaves_behind_is_ignored_and_removed(tmp_path: Path) -> None:
    run(Scripted(at={7: raise_signal()}), settings(tmp_path, checkpoint_every=4))
    leftover = tmp_path / "checkpoints" / ".step-0000009.x1y2z3w4" / "step-0000009"
    shutil.copytree(tmp_path / "checkpoints" / "step-0000004", leftover)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')  # a row cut short
    state = run(Scripted(), settings(tmp_path, checkpoint_every=4, resume=True))
    assert state.step == 12
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert (tmp_path / "checkpoints" / "notes.txt").exists()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_a_failure_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    class Failing(Scripted):
        def save(self, folder: Path) -> None:
            super().save(folder)
            if self.asked[-1] == 7:
                raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        run(Failing(), settings(tmp_path, checkpoint_every=4))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000004"]
    assert run(Scripted(), settings(tmp_path, resume=True)).step == 12


def test_starting_over_an_existing_run_is_refused(tmp_path: Path) -> None:
    run(Scripted(), settings(tmp_path, steps=3))
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(CompressorError, match=r"already holds a run at step 3.*--training\.resume"):
        run(Scripted(), settings(tmp_path, steps=3))
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_resuming_where_nothing_is_starts_and_where_all_is_done_ends(tmp_path: Path) -> None:
    assert run(Scripted(), settings(tmp_path, resume=True)).step == 12
    shutil.rmtree(tmp_path / "final")
    stage = Scripted()
    assert run(stage, settings(tmp_path, resume=True)).step == 12
    assert stage.asked == []
    assert (tmp_path / "final").exists()
    assert len(rows(tmp_path)) == 12


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "model/model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    run(Scripted(), settings(tmp_path, steps=4, checkpoint_every=2))
    path = tmp_path / "checkpoints" / "step-0000004" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CompressorError, match="step-0000004"):
        run(Scripted(), settings(tmp_path, steps=6, resume=True))
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000004")
    assert run(Scripted(), settings(tmp_path, steps=6, resume=True)).step == 6


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_the_batch_of_a_resumed_run_is_divided_among_its_processes(
    tmp_path: Path, processes: int, accumulation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Scripted(), settings(tmp_path, steps=2, gradient_accumulation_steps=6))
    config = settings(tmp_path, resume=True, gradient_accumulation_steps=6)
    kept = Checkpoints(tmp_path, 1, SimpleNamespace(num_processes=processes, is_main_process=True)).keep_batch(config)  # type: ignore[arg-type]
    assert kept.training == replace(config.training, gradient_accumulation_steps=accumulation)
    assert ("note: training.gradient_accumulation_steps" in capsys.readouterr().err) == (processes > 1)


def test_processes_that_cannot_share_the_batch_of_a_run_are_refused(tmp_path: Path) -> None:
    run(Scripted(), settings(tmp_path, steps=2, gradient_accumulation_steps=6))
    checkpoints = Checkpoints(tmp_path, 1, SimpleNamespace(num_processes=4, is_main_process=True))  # type: ignore[arg-type]
    with pytest.raises(CompressorError, match=r"6 micro-batches a step, which 4 processes .* one of 1, 2, 3, 6"):
        checkpoints.keep_batch(settings(tmp_path, resume=True))


class _Uncompilable(Dot):
    """A module whose compiled form fails, forward or backward, as torch's compiler does at times."""

    def __init__(self, fails: str):
        super().__init__()
        self.fails, self.calls = fails, 0

    def compile(self, *_: Any, **__: Any) -> None:
        self._compiled_call_impl = self._compiled

    def _compiled(self, batch: dict[str, Any]) -> Tensor:
        self.calls += 1
        if self.fails == "forward":
            raise RuntimeError("InductorError: no kernel\nand many lines more")
        loss = self.forward(batch)
        if self.fails == "backward":
            loss.register_hook(lambda gradient: gradient.no_such_thing)
        return loss


@pytest.mark.parametrize("fails", ["forward", "backward", "nowhere"])
def test_what_cannot_be_compiled_is_trained_without(
    tmp_path: Path, fails: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, stage = Scripted(), Scripted()
    run(plain, settings(tmp_path / "plain", steps=3))
    stage.module = _Uncompilable(fails)
    run(stage, settings(tmp_path / "compiled", steps=3, compile="dynamic"))
    assert ("cannot compile this model with training.compile dynamic" in capsys.readouterr().err) == (
        fails != "nowhere"
    )
    assert stage.module.calls == {"forward": 1, "backward": 1, "nowhere": 2 + 3}[fails]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[0] == losses[1]


# -- stops and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    state = run(Scripted(at={4: raise_signal(number)}), settings(tmp_path, checkpoint_every=100))
    assert state.step == 5
    assert kept(tmp_path) == [5]
    assert "stopped by a signal after step 5; go on with --training.resume" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_a_signal_while_validating_or_updating_is_not_lost(tmp_path: Path) -> None:
    class Interrupted(Scripted):
        def validate(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
            signal.raise_signal(signal.SIGTERM)
            return super().validate(accelerator)

    state = run(Interrupted(), settings(tmp_path / "a", validate_every=4, checkpoint_every=100))
    assert state.step <= 5
    assert kept(tmp_path / "a")[-1] == state.step

    calls = []
    handle = register_optimizer_step_post_hook(
        lambda *_: (calls.append(1), signal.raise_signal(signal.SIGTERM) if len(calls) == 3 else None)
    )
    state = run(Scripted(), settings(tmp_path / "b", checkpoint_every=100))
    handle.remove()
    assert state.step <= 4
    assert kept(tmp_path / "b")[-1] == state.step


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(at={4: twice}), settings(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_a_number_stops_with_step_and_records(tmp_path: Path) -> None:
    with pytest.raises(CompressorError) as raised:
        run(Scripted(at={9: "nan"}), settings(tmp_path, gradient_accumulation_steps=2, checkpoint_every=2))
    message = str(raised.value)
    assert "the loss is nan at step 5" in message
    assert "record-8-0" in message
    assert "and 20 more" in message  # 2 micro-batches of 30 records, 40 shown
    assert kept(tmp_path) == [2, 4]
    assert torch.isfinite(
        load_file(tmp_path / "checkpoints" / "step-0000004" / "model" / "model.safetensors")["weight"]
    ).all()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    stage = Scripted()
    stage.module.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(CompressorError, match="the gradient norm is inf at step 1"):
        run(stage, settings(tmp_path))


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(CompressorError, match=r"wandb.*\[tracking\]"):
        start_run(settings(tmp_path, trackers=["wandb"]))


# -- stage regenerate ----------------------------------------------------------------------------------------------


@pytest.fixture
def configure(training_options: list[str], tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*argv: str) -> RunConfig:
        return parse_config(RunConfig, [*training_options, f"--output={tmp_path / 'run'}", *argv], "test")[0]

    return make


def test_widths_are_few() -> None:
    widths = [padded_width(longest) for longest in range(1, 513)]
    assert len(set(widths)) == 32
    assert all(longest <= width < longest + 8 or width < 1.125 * longest for longest, width in enumerate(widths, 1))


def test_batches_hold_what_the_configuration_asks_for(configure: Callable[..., RunConfig]) -> None:
    config = configure()
    stage = CompressionStage(config, start_run(config))
    base, seen = stage.module.base, set()
    for index in range(12):
        batch, again = stage.micro_batch(index), stage.micro_batch(index)
        assert all(
            torch.equal(batch[key], again[key]) if isinstance(batch[key], Tensor) else batch[key] == again[key]
            for key in batch
        )
        size, width = batch["input_ids"].shape
        assert size * int(batch["lengths"].max()) <= 128
        assert width == padded_width(int(batch["lengths"].max()))
        assert batch["passages"] == size == len(batch["ids"])
        seen |= set(batch["memory_tokens"].tolist())
        total = 0
        for row, n in enumerate(batch["lengths"].tolist()):
            passage = batch["input_ids"][row, :n].tolist()
            assert 4 <= n <= 32
            assert batch["regeneration_inputs"][row, : n + 1].tolist() == [base.bos, *passage]
            assert batch["regeneration_labels"][row, : n + 1].tolist() == [*passage, base.eos]
            assert batch["continuation_inputs"][row, 0] == passage[-1]
            labels = batch["continuation_labels"][row]
            total += n + 1 + int((labels != -100).sum())
        assert batch["targets"] == total
        assert (batch["regeneration_weight"], batch["continuation_weight"]) == (1.0, 0.3)
    assert seen == {2, 4}


def test_the_continuation_is_the_text_that_follows(configure: Callable[..., RunConfig]) -> None:
    config = configure("--data.random_start=1")
    stage = CompressionStage(config, start_run(config))
    pieces = stage.plan.batch(0)
    batch = stage.collate(stage.passages, pieces, [4] * len(pieces))
    for row, piece in enumerate(pieces):
        ids = stage.passages[piece.record]["input_ids"]
        following = ids[piece.start + piece.length :][:64] or [stage.module.base.eos]
        labels = [token for token in batch["continuation_labels"][row].tolist() if token != -100]
        assert labels == following
        assert batch["continuation_inputs"][row, 1 : len(following)].tolist() == following[:-1]


def test_balance_divides_what_each_passage_adds_to_the_gradient_by_its_own_nats(
    configure: Callable[..., RunConfig],
) -> None:
    config = configure("--objective.balance=0.1", "--objective.continuation=0")
    stage = CompressionStage(config, start_run(config))
    batch, model = stage.micro_batch(0), stage.module
    weight = dict(model.named_parameters())["encoder.memory_embeddings"]
    alone = []
    for row in range(len(batch["lengths"])):
        one = {
            name: value[row : row + 1] if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }
        model.balance = None
        loss = model(one)
        (gradient,) = torch.autograd.grad(loss, weight)
        targets = int((one["regeneration_labels"] != IGNORED).sum())
        alone.append((loss.item(), gradient / (loss.item() / targets + 0.1)))
    model.balance = config.objective.balance
    loss = model(batch)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss.item() == pytest.approx(sum(value for value, _ in alone), rel=1e-4)  # what is logged are nats
    torch.testing.assert_close(gradient, sum(one for _, one in alone), atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("layout", ["spread", "nested"])
def test_passages_of_a_batch_have_their_own_numbers_of_tokens(configure: Callable[..., RunConfig], layout: str) -> None:
    """In layouts that move with k, too: a step of one number alone would be as large as one of all."""
    config = configure(f"--compressor.layout={layout}")
    stage = CompressionStage(config, start_run(config))
    counts = [set(stage.micro_batch(index)["memory_tokens"].tolist()) for index in range(12)]
    assert {2, 4} in counts
    assert set.union(*counts) == {2, 4}


def test_shares_of_memory_tokens_keep_to_their_lengths(configure: Callable[..., RunConfig]) -> None:
    shares = "[{tokens: 4, shortest: 12}, {tokens: 2, longest: 20, shortest: 10, weight: 3}, {tokens: 1, longest: 9}]"
    config = configure(f"--objective.tokens={shares}")
    stage = CompressionStage(config, start_run(config))
    rng = np.random.default_rng(0)
    drawn = np.array([stage.draw_tokens(rng, [5, 10, 15, 30]) for _ in range(400)])
    assert [set(column.tolist()) for column in drawn.T] == [{1}, {2}, {2, 4}, {4}]
    assert 0.67 < (drawn[:, 2] == 2).mean() < 0.83
    # Where no share applies, any may be drawn.
    config.objective.tokens = config.objective.tokens[:1] + config.objective.tokens[2:]
    assert {tokens for _ in range(20) for tokens in stage.draw_tokens(rng, [10])} == {1, 4}


def test_a_run_writes_a_compressor_a_log_and_its_configuration(
    training_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    argv = [*training_options, f"--output={output}", "--training.steps=4", "--training.validate_every=2"]
    assert train_main(argv) == 0
    printed = capsys.readouterr().out
    assert "0 dead" in printed
    config = parse_config(RunConfig, ["--config", str(output / "config.yaml")], "test")[0]
    assert config == parse_config(RunConfig, argv, "test")[0]
    figures = rows(output, "validation_loss")[0]
    assert {"validation_nats_4", "validation_nats_2", "validation_nats_swapped"} <= set(figures)
    model = Compressor.from_pretrained(output / "final")
    assert model.compress("Some text.").tokens == 4
    assert same_files(output / "final", output / "checkpoints" / "step-0000004" / "model")
    assert not [path for path in output.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".npz")]
    # Only what is trained is in the checkpoint: adapters and memory tokens, and two moments of each.
    trained = sum(value.numel() for value in model.trainable_state().values())
    moments = load_file(output / "checkpoints" / "step-0000004" / "optimizer.safetensors")
    assert sum(value.numel() for key, value in moments.items() if not key.endswith("/step")) == 2 * trained


def test_the_reported_validation_loss_is_that_of_the_saved_model(configure: Callable[..., RunConfig]) -> None:
    config = configure("--training.steps=3")
    accelerator = start_run(config)
    train(CompressionStage(config, accelerator), config, accelerator)
    logged = rows(Path(config.output), "validation_loss")[-1]
    fresh = configure(f"--init={config.output}/final", "--output=unused")
    figures, _ = CompressionStage(fresh, accelerator).validate(accelerator)
    for name, value in figures.items():
        assert value == pytest.approx(logged[f"validation_{name}"], rel=1e-5)


def test_a_dry_run_writes_nothing(
    training_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(footprint, "LOOKED_AT", 8)
    monkeypatch.setattr("compressor.commands.train.step_bytes", footprint.step_bytes)
    assert train_main([*training_options, f"--output={tmp_path / 'run'}", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "trainable" in printed
    assert re.search(r"memory for each device, estimated: (0\.[1-9]|\d\d?\.\d) GiB", printed)
    assert yaml.safe_load(printed.split("\nstage ")[0])["compressor"]["memory_tokens"] == 4
    assert not (tmp_path / "run").exists()


def test_a_loss_of_nan_ends_the_command_with_status_2_and_record_ids(
    training_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, calls = compressor.training.objectives.Trainee.forward, []

    def spoiled(*given: Any) -> Tensor:
        calls.append(1)
        return honest(*given) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(compressor.training.objectives.Trainee, "forward", spoiled)
    argv = [*training_options, f"--output={tmp_path}", "--training.steps=9", "--training.checkpoint_every=2"]
    assert train_main(argv) == 2
    error = capsys.readouterr().err
    assert "error: the loss is nan at step 4" in error  # one call looks for dead parameters
    assert "train-" in error
    assert "Traceback" not in error
    assert kept(tmp_path) == [2]


def test_what_does_not_fit_together_is_refused(training_options: list[str], tmp_path: Path, capsys: Any) -> None:
    run_ = [*training_options, f"--output={tmp_path}"]
    for extra, message in (
        (["--compressor.max_passage_tokens=16"], "data.lengths = 32 is out of range"),
        (["--base.path=no/such-base"], "cannot load the base 'no/such-base'"),
        (["--data.train=no/such.jsonl"], "no/such.jsonl"),
        (["--init=no/such-checkpoint"], "no/such-checkpoint"),
    ):
        assert train_main([*run_, *extra]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_a_run_from_a_checkpoint_keeps_the_attention_it_asks_for(
    configure: Callable[..., RunConfig], tiny_compressor: Compressor, tmp_path: Path
) -> None:
    tiny_compressor.save_pretrained(tmp_path / "start")
    config = configure(f"--init={tmp_path / 'start'}", "--base.attention=eager")
    stage = CompressionStage(config, start_run(config))
    assert stage.module.base.model.config._attn_implementation == "eager"


def test_a_checkpoint_of_another_size_is_not_resumed(training_options: list[str], tmp_path: Path, capsys: Any) -> None:
    argv = [*training_options, f"--output={tmp_path}", "--training.steps=1"]
    assert train_main(argv) == 0
    written = {name: (tmp_path / name).read_text() for name in ("config.yaml", "run.json", "log.jsonl")}
    assert train_main([*argv, "--training.resume=true", "--compressor.lora_rank=3"]) == 2
    assert written == {name: (tmp_path / name).read_text() for name in written}
    assert "was trained to step 1 with other settings (compressor.lora_rank: 2, now 3)" in capsys.readouterr().err


def test_activation_checkpointing_trains_the_same(configure: Callable[..., RunConfig]) -> None:
    losses = []
    for on in ("false", "true"):
        config = configure(
            "--training.steps=4", f"--training.activation_checkpointing={on}", f"--output={configure().output}-{on}"
        )
        accelerator = start_run(config)
        train(CompressionStage(config, accelerator), config, accelerator)
        losses.append([row["loss"] for row in rows(Path(config.output))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_memory_that_is_ignored_is_reported(configure: Callable[..., RunConfig]) -> None:
    config = configure()
    accelerator = start_run(config)
    figures, samples = CompressionStage(config, accelerator).validate(accelerator)
    assert figures["nats_swapped"] - figures["nats_4"] < 0.05
    assert samples[0].startswith("warning: ")
    assert "ignores the memory" in samples[0]


def test_four_texts_are_learned_by_heart(
    configure: Callable[..., RunConfig], tmp_path: Path, texts: list[str], tiny_base: Any
) -> None:
    # A random base is never sure of anything; louder logits let it be.
    with torch.no_grad():
        tiny_base.model.get_decoder().norm.weight.mul_(8)
    tiny_base.model.save_pretrained(tmp_path / "base")
    tiny_base.tokenizer.save_pretrained(tmp_path / "base")
    wanted = [tiny_base.tokenizer.decode(tiny_base.tokenizer(text)["input_ids"][5:13]) for text in texts[:4]]
    path = tmp_path / "four.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(wanted)))
    config = configure(
        f"--base.path={tmp_path / 'base'}",
        f"--data.train={path}",
        f"--data.validation={path}",
        '--data.lengths=[{"low": 8, "high": 8}]',
        "--data.random_start=0",
        "--compressor.memory_tokens=8",
        "--compressor.lora_rank=16",
        "--compressor.writer_rank=16",
        "--compressor.lora_dropout=0",
        '--objective.tokens=[{"tokens": 8}]',
        "--objective.continuation=0",
        "--training.steps=120",
        "--training.learning_rate=1e-2",
        "--training.warmup_steps=20",
        "--training.batch_passages=8",
        "--training.batch_tokens=512",
        "--training.validate_every=120",
        "--training.log_every=100",
    )
    accelerator = start_run(config)
    stage = CompressionStage(config, accelerator)
    assert stage.passages["tokens"] == [8] * 4
    train(stage, config, accelerator)
    model = Compressor.from_pretrained(Path(config.output) / "final")
    assert model.regenerate(model.compress(wanted)) == wanted


def test_a_record_shortens_absolute_paths_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.provenance import run_record

    argv = ["train.py", "--config", "configs/arxiv-mini/answer.yaml", "[/data/me/a/train-*.parquet,data/b.jsonl]"]
    monkeypatch.setattr("sys.argv", [*argv, "--output=/data/me/outputs/run", "/one"])
    assert run_record(0)["command"] == [
        *("train.py", "--config", "configs/arxiv-mini/answer.yaml", "[train-*.parquet,data/b.jsonl]"),
        *("--output=run", "/one"),
    ]
