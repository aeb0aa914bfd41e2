"""The studies `utilisation` and `efficiency` on tiny models, and the formulas behind the second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compressor.base import load_base
from compressor.errors import CompressorError
from compressor.evaluation.command import EvaluationConfig, evaluate_main
from compressor.evaluation.flops import Setting, causal_pairs
from compressor.evaluation.studies.changes import (
    PARTS_OF_TEXT,
    Change,
    all_changes,
    changed,
    foreign,
    hidden_from,
    parts_of,
    probe,
)
from compressor.evaluation.studies.efficiency import compare_published, llama_shape, lora_parameters, shape_of
from compressor.evaluation.studies.equal_use import permutation_test, statement, verdict
from compressor.evaluation.studies.timing import TensorMeter, peak_memory, time_all, variants
from compressor.generation import attention, decode, score, stream
from compressor.memory import empty_prefix
from compressor.methods.interface import MemoryMethod, token_prefix
from compressor.model import Compressor
from compressor.model_config import BaseConfig

PNG = b"\x89PNG"


@pytest.fixture
def eager(make_tiny_compressor: Callable[..., Any], tiny_base_folder: Path) -> Compressor:
    """A tiny compressor whose base gives its attention weights."""
    return make_tiny_compressor(base=load_base(BaseConfig(path=str(tiny_base_folder), attention="eager"))).eval()


@pytest.fixture
def checkpoint(tiny_compressor: Any, tmp_path: Path) -> str:
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.fixture
def data(tmp_path: Path, texts: list[str]) -> list[str]:
    """A file of passages, one of them over the limit of 64 tokens, and a file of questions, two about one context."""
    passages, questions = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl"
    chosen = [text[:90] for text in texts[:3]] + [texts[3][:300]]
    passages.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(chosen)))
    asked = [
        {"id": str(i), "context": chosen[i // 2], "question": "What?", "answers": [chosen[i // 2].split()[i]]}
        for i in range(5)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in asked))
    return [str(passages), str(questions)]


def _metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# -- formulas --------------------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts(eager: Compressor) -> None:
    """Reading, decoding after a cache, and compressing with adapters, to the last operation."""
    base, shape = eager.base, shape_of(eager)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.mlp_matrices) == (3, 4, 2, 3)
    with eager.adapters(on=False), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            prefix = token_prefix(base, [list(range(5, 24))])
        assert counter.get_total_flops() == shape.forward_flops(20)
        with FlopCounterMode(display=False) as counter:
            decode(base, prefix, torch.arange(5, 12)[None])
        assert counter.get_total_flops() == shape.forward_flops(7, context=20, logits=7)

    adapters = lora_parameters(eager)
    assert adapters == shape.lora_parameters(rank=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager.encode(torch.arange(5, 35)[None], torch.tensor([30]), 8)
    assert counter.get_total_flops() == shape.forward_flops(38, adapters=adapters)


def test_setting_adds_up_a_whole_run(eager: Compressor) -> None:
    shape = shape_of(eager)
    setting = Setting(shape, passage=30, new_tokens=5, value_bytes=4)
    with FlopCounterMode(display=False) as counter, eager.adapters(on=False):
        prefix = token_prefix(eager.base, [list(range(5, 35))])
        steps = list(stream(eager.base, prefix, [[1]], [5], ends=False))
    assert len(steps) == 5
    full, kept = setting.full(new=True), setting.full(new=False)
    assert counter.get_total_flops() == full.flops
    assert full.flops - kept.flops == shape.forward_flops(31)
    # 31 positions of context, BOS, and the first four new tokens: what is written last is not read.
    assert full.kv_bytes == kept.kv_bytes == 2 * 3 * 2 * 8 * 4 * 36
    assert full.pairs == causal_pairs(36)
    assert kept.pairs == sum(range(32, 37))
    memory = setting.memory(8, new=True, adapters=0, bidirectional=False)
    assert memory.kv_bytes == 2 * 3 * 2 * 8 * 4 * 13
    assert memory.kv_peak_bytes == 2 * 3 * 2 * 8 * 4 * 38
    assert memory.pairs == causal_pairs(38) + sum(range(9, 14))
    assert setting.memory(8, True, 0, bidirectional=True).pairs - memory.pairs == 30**2 - causal_pairs(30)


def test_llama_and_the_published_claim() -> None:
    shape = llama_shape()
    # 8.03 billion parameters, of which the norms are 266,240; 128 KiB of keys and values a position.
    assert shape.layers * shape.layer_weights + 2 * shape.vocabulary * shape.hidden + 266_240 == 8_030_261_248
    assert shape.kv_bytes(1, 2) == 128 * 1024
    rows = {(row["prompt"], row["new_tokens"]): row for row in compare_published()["rows"]}
    assert int(rows["new", 100]["pairs_saved"]) == 27
    assert int(rows["reused", 100]["pairs_saved"]) == 90
    assert int(rows["reused", 400]["kv_saved"]) == 55
    assert int(rows["reused", 100]["kv_saved"]) == 83
    assert rows["new", 100]["flops_saved"] < 0


def test_bases_that_the_formulas_do_not_describe_are_refused(
    make_family_base: Callable[..., Any], make_tiny_compressor: Callable[..., Any]
) -> None:
    assert shape_of(make_tiny_compressor(base=make_family_base("phi"))).mlp_matrices == 2
    with pytest.raises(CompressorError, match="FLOPs cannot be counted"):
        shape_of(make_tiny_compressor(base=make_family_base("mixtral"), lora_targets=["q_proj", "k_proj", "v_proj"]))


# -- changes of a memory ---------------------------------------------------------------------------------------------


def _pieces(model: Compressor, *passages: range) -> tuple[MemoryMethod, list[list[Any]]]:
    method = MemoryMethod(model)
    return method, method.compress([list(passage) for passage in passages], [8])[0]


def test_removing_and_shuffling_do_what_they_say(eager: Compressor) -> None:
    method, (one, two, _) = _pieces(eager, range(10, 40), range(50, 95), range(100, 220))
    base = eager.base
    ids = torch.arange(20, 30)[None]
    own, other = method.prefix([one]), foreign(method, [one], [two])
    with eager.adapters(on=False), torch.no_grad():
        before = decode(base, own, ids)
        # A memory without any token is no context at all, at the same position.
        nothing = empty_prefix(base, 1)
        nothing.start = own.start
        gone = decode(base, changed(own, other, 8, Change("removed", "memory")), ids)
        assert torch.allclose(gone, decode(base, nothing, ids), atol=1e-5)
        # Removing a token is compressing it away: the other seven alone.
        few = (
            [layer[:, :, torch.arange(8) != 3] for layer in own.keys],
            [v[:, :, torch.arange(8) != 3] for v in own.values],
        )
        seven = type(own)(*few, own.mask[:, 1:], own.start)
        removed = decode(base, changed(own, other, 8, Change("removed", "token", 3)), ids)
        assert torch.allclose(removed, decode(base, seven, ids), atol=1e-5)
        # Hidden from every layer, one inside the other, the memory is gone; from one, it is not.
        with hidden_from(base, 0, own.slots):
            part = decode(base, own, ids)
            with hidden_from(base, 1, own.slots), hidden_from(base, 2, own.slots):
                assert torch.allclose(decode(base, own, ids), gone, atol=1e-5)
        assert not torch.allclose(part, gone, atol=1e-3)
        assert not torch.allclose(part, before, atol=1e-3)
        assert torch.equal(decode(base, own, ids), before)

    shuffled = changed(own, other, 8, Change("shuffled", "token", 2))
    assert all(torch.equal(k[:, :, 2], o[:, :, 2]) for k, o in zip(shuffled.keys, other.keys, strict=True))
    assert all(torch.equal(k[:, :, 3:], o[:, :, 3:]) for k, o in zip(shuffled.keys, own.keys, strict=True))
    layer = changed(own, other, 8, Change("shuffled", "layer", 1))
    assert torch.equal(layer.values[1], other.values[1])
    assert torch.equal(layer.values[0], own.values[0])
    # The other memory stands where this one stood.
    assert torch.equal(other.start, own.start)


def test_changes_reach_every_segment(eager: Compressor) -> None:
    method, (one, _, long) = _pieces(eager, range(10, 40), range(50, 95), range(100, 220))
    assert [len(one), len(long)] == [1, 2]
    own, other = method.prefix([long]), foreign(method, [long], [one])
    mask = changed(own, other, 8, Change("removed", "token", 3)).mask[0]
    assert (~mask).nonzero()[:, 0].tolist() == [3, 11]
    # One segment stands in for both.
    held = one[0].held
    assert torch.equal(other.values[0][0, :, :8], held.values[0])
    assert torch.equal(other.values[0][0, :, 8:], held.values[0])


def test_attention_is_what_the_base_gives(eager: Compressor, tiny_compressor: Any) -> None:
    """Rows of a padded batch equal single rows; all that is not on the memory is on the text."""
    method, (one, _, long) = _pieces(eager, range(10, 40), range(50, 95), range(100, 220))
    prompts, targets = [[1], [1, 5]], [list(range(10, 17)), list(range(10, 20))]
    with eager.adapters(on=False):
        both = attention(eager.base, method.prefix([one, long]), prompts, targets)
        alone = attention(eager.base, method.prefix([one]), prompts[:1], targets[:1])
        bare = decode(eager.base, method.prefix([long]), torch.tensor([[1, 5]]))
    assert both[0].shape == (3, 7, 16)
    assert torch.allclose(both[0][..., :8], alone[0], atol=1e-5)
    assert float(both[0][..., 8:].max()) == 0
    assert float(both[1].sum(-1).max()) < 1
    assert bare.shape[1] == 2
    with pytest.raises(CompressorError, match="load it with eager"):
        attention(tiny_compressor.base, empty_prefix(tiny_compressor.base, 1), [[1]], [[5]])


def test_probe_agrees_with_scores(eager: Compressor) -> None:
    method, (one, two, long) = _pieces(eager, range(10, 40), range(50, 95), range(100, 220))
    prompts, targets = [[1], [1]], [list(range(10, 40)), list(range(5, 60))]
    found = probe(method, [one, long], [two, one], prompts, targets)
    changes = all_changes(8, 3)
    assert len(changes) == 2 * (8 + 3 + 1)
    with eager.adapters(on=False):
        own = method.prefix([long])
        before = -score(eager.base, own, prompts[1:], targets[1:])[0][:, 0].double()
        prefix = changed(own, own, 8, Change("removed", "token", 5))
        after = -score(eager.base, prefix, prompts[1:], targets[1:])[0][:, 0].double()
    nats = found[1]["nats"]
    assert nats[0] == pytest.approx(float(before.sum()), rel=1e-5)
    assert nats[1 + changes.index(Change("removed", "token", 5))] == pytest.approx(float(after.sum()), rel=1e-5)
    # Keys and values of the first layer come from the memory tokens' embeddings alone, whatever the passage.
    assert float(nats[1 + changes.index(Change("shuffled", "layer", 0))] - nats[0]) == pytest.approx(0, abs=1e-3)
    assert abs(float(nats[1 + changes.index(Change("shuffled", "layer", 2))] - nats[0])) > 1e-2
    assert found[1]["removed_parts"].shape == (8, PARTS_OF_TEXT)
    assert float(found[1]["removed_parts"][5].sum()) == pytest.approx(float((after - before).sum()), rel=1e-3, abs=1e-3)
    assert found[1]["attention"].shape == (3, 8)
    assert float(found[1]["attention"].mean(0).sum()) == pytest.approx(float(found[1]["attention_parts"].sum()))
    assert int(found[1]["tokens_parts"].sum()) == found[1]["tokens"] == 55


def test_parts_of_a_text() -> None:
    assert parts_of(torch.ones(40)).tolist() == [2.0] * PARTS_OF_TEXT
    short = parts_of(torch.tensor([1.0, 2.0]))
    assert (short[0], short[PARTS_OF_TEXT // 2], short.sum()) == (1, 2, 3)


def test_nothing_follows_from_a_memory_that_does_not_help() -> None:
    """Two tokens of unequal effect in a memory that helps, and in one whose removal helps."""
    rng = np.random.default_rng(0)
    for sign, holds in ((1, True), (-1, None)):
        # Unchanged; tokens 0 and 1, one layer and the memory removed; the same shuffled.
        added = np.array([0.0, 2.0, 1.0, 0.0, 3.0 * sign, 0.0, 0.0, 0.0, 0.0])
        results = [{"tokens": 10, "nats": torch.tensor(10 + added + rng.normal(size=9) * 0.01)} for _ in range(20)]
        found = verdict("qa", "set", results, 2, EvaluationConfig(resamples=100))
        assert found["holds"] is holds
        assert (found["most"], found["least"]) == (0, 1)
        assert found["gap_low"] < 1 < found["gap_high"]
        assert found["ratio"] == pytest.approx(2, abs=0.05)
        assert ("nothing follows" in statement(found)) == (holds is None)


def test_permutation_test_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(40, 6))
    assert permutation_test(alike, 400) > 0.05
    assert permutation_test(alike + np.array([1.0, 0, 0, 0, 0, 0]), 400) == pytest.approx(1 / 401)
    assert permutation_test(np.ones((5, 4)), 50) == 1


# -- commands --------------------------------------------------------------------------------------------------------


def test_utilisation_command(
    checkpoint: str, data: list[str], tmp_path: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    argv = ["--task", "utilisation", "--checkpoint", checkpoint, "--data", *data, "--batch_size", "2"]
    argv += ["--resamples", "50", "--output"]
    assert evaluate_main([*argv, str(output)]) == 0
    printed = capsys.readouterr().out
    assert "2408.03094" in printed
    assert "Permutation test" in printed
    metrics = _metrics(output)
    rows = metrics["rows"]
    # For each of two data sets: unchanged, and 8 tokens, 3 layers and all, removed and shuffled.
    assert len(rows) == 2 * (1 + 2 * 12)
    assert {(row["task"], row["dataset"], row["n"]) for row in rows} == {
        ("regeneration", "passages", 4),
        ("qa", "questions", 5),
    }
    for row in rows[1:25]:
        assert row["loss_increase_low"] - 1e-9 <= row["loss_increase"] <= row["loss_increase_high"] + 1e-9
        assert ("attention_mass" in row) == (row["change"] == "removed")
    tokens = [row["attention_mass"] for row in rows[1:9]]
    layers = [row["attention_mass"] for row in rows[9:12]]
    assert sum(tokens) == pytest.approx(sum(layers) / 3)
    assert sum(tokens) == pytest.approx(rows[12]["attention_mass"])
    tests = metrics["equal_use"]["tests"]
    for test in tests:
        assert test["holds"] == (test["p"] < 0.05 if test["memory_nats_low"] > 0 else None)
    assert tests[0]["memory_nats"] == rows[12]["loss_increase"]
    assert (rows[12]["change"], rows[12]["part"]) == ("removed", "memory")
    assert all(1 <= test["effective_tokens"] <= 8 for test in tests)
    files = ("metrics.json", "config.yaml", "table.md", "utilisation.png", "attention.png", "reading.png")
    assert {file.name for file in output.iterdir()} == set(files)
    assert all((output / name).read_bytes().startswith(PNG) for name in files[3:])
    assert "| regeneration | passages | removed | token | 0 | 4 |" in (output / "table.md").read_text()

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", "evaluate.py", *argv, str(tmp_path / "two")],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    two = _metrics(tmp_path / "two")
    assert two["processes"] == 2
    assert all(two[name] == metrics[name] for name in ("rows", "equal_use", "maps", "notes"))


def test_efficiency_command(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    argv = ["--task", "efficiency", "--checkpoint", checkpoint, "--tokens", "8", "1", "--lengths", "40"]
    argv += ["--new_tokens", "4", "8", "--repeats", "2", "--output", str(output)]
    assert evaluate_main(argv) == 0
    assert "27-90%" in capsys.readouterr().out
    metrics = _metrics(output)
    rows = metrics["rows"]
    assert len(rows) == 2 * 3 * 2 * 2  # two bases, three kinds of prompt, two sizes, two numbers of new tokens
    ours = [row for row in rows if row["base"] != "Llama-3-8B"]
    for row in ours:
        assert row["seconds"] >= row["first_token_seconds"] > row["reading_seconds"]
        assert row["first_token_speedup"] == row["full_first_token_seconds"] / row["first_token_seconds"]
        assert row["tokens_per_second"] > 0
    assert all(row["reading_seconds"] == 0 for row in ours if row["prompt"] == "reused")
    assert all(row["peak_saved"] > 0 for row in ours if row["prompt"] != "new" and row["tokens"] == 1)
    assert metrics["machine"]["threads"] == torch.get_num_threads()
    assert {file.name for file in output.iterdir()} == {"metrics.json", "config.yaml", "table.md", "efficiency.png"}
    assert (output / "efficiency.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "efficency"], "did you mean efficiency"),
        (["--task", "nothing-like-it"], "utilisation"),
        (["--task", "efficiency", "--lengths", "65"], "up to 64 tokens at once"),
        (["--task", "efficiency", "--data", "squad-dev"], "do not depend on the text"),
        (["--task", "efficiency", "--new_tokens", "1"], "at least 2 new tokens"),
        (["--task", "efficiency", "--tokens", "9"], "more than the 8 memory tokens"),
        (["--task", "utilisation", "--tokens", "4", "2"], "give one"),
        (["--task", "utilisation", "--methods", "full"], "leave it out"),
        (["--task", "utilisation", "--data", "squad-dev", "--limit", "1"], "has 1 passages here"),
        (["--task", "utilisation", "--data", "no-such.jsonl"], "no-such.jsonl"),
        (["--task", "utilisation", "--repeats", "0"], "at least 1"),
    ],
)
def test_bad_settings(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    output = tmp_path / "out"
    assert evaluate_main(["--checkpoint", checkpoint, "--output", str(output), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not output.exists()


# -- measuring -------------------------------------------------------------------------------------------------------


def test_tensor_meter_counts_what_lives() -> None:
    with TensorMeter() as meter:
        first = torch.zeros(1000)
        view = first[10:].view(-1)
        del first
        assert meter.now == 4000  # the view keeps it
        second = view.new_zeros(500)
        assert meter.peak() == 6000
        del view
        assert meter.now == 2000
        meter.restart()
        assert meter.peak() == 2000
        second.add_(1)
        assert meter.peak() == 2000
    assert second.sum() == 500


def test_peak_memory_holds_at_least_the_keys_and_values(tiny_compressor: Any) -> None:
    shape = shape_of(tiny_compressor)
    ways = variants(tiny_compressor, list(range(5, 55)), [8])
    full, memory = (peak_memory(tiny_compressor, ways[name], [2, 6]) for name in (None, 8))
    assert full.reused[6] >= shape.kv_bytes(51 + 6, 4)
    assert memory.reused[6] >= shape.kv_bytes(8 + 6, 4)
    assert memory.reused[6] < full.reused[6] <= full.new[6]
    assert full.reused[2] <= full.reused[6]


def test_variants_are_timed_in_turn(tiny_compressor: Any) -> None:
    order: list[int | None] = []
    ways = variants(tiny_compressor, list(range(5, 25)), [8, 1])
    watched = {name: (lambda name=name, way=way: order.append(name) or way()) for name, way in ways.items()}
    times = time_all(tiny_compressor, watched, [3, 5], 2, lambda: None)
    assert order == [None, 8, 1] * 3
    assert all(len(runs) == 2 and set(runs[0].written) == {1, 3, 5} for runs in times.values())
