"""The studies `utilisation` and `efficiency` on tiny models, and the formulas behind the second."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compressor.api import Compressor
from compressor.commands.cli import evaluate_main
from compressor.errors import CompressorError
from compressor.evaluation.flops import Setting, causal_pairs
from compressor.evaluation.items import Item
from compressor.evaluation.settings import EfficiencySettings
from compressor.evaluation.studies.efficiency import (
    LLAMA,
    lora_parameters,
    measure,
    published_rows,
    shape_of,
)
from compressor.evaluation.studies.utilisation import (
    AnswerProbe,
    hidden_from,
    permutation_test,
    probe,
    verdict,
    without_token,
)
from compressor.methods.interface import MemoryMethod
from compressor.model.config import BaseConfig
from compressor.model.decoder import decode, empty_prefix, score, token_prefix
from compressor.model.generation import stream
from compressor.model.load import load_base
from compressor.model.lora import WRITER

PNG = b"\x89PNG"


@pytest.fixture
def eager(make_tiny_compressor: Callable[..., Any], tiny_base_folder: Path) -> Compressor:
    """A tiny compressor whose attention is of products, which torch counts."""
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


def test_flops_are_those_that_torch_counts(
    eager: Compressor, make_tiny_compressor: Callable[..., Any], tiny_base_folder: Path
) -> None:
    """Reading and decoding after a cache to the last operation; compressing leaves out what no memory depends on."""
    base, shape = eager.base, shape_of(eager)
    assert (shape.layers, shape.hidden, shape.query_size, shape.kv_size) == (3, 32, 32, 16)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            prefix = token_prefix(base, [list(range(5, 24))])
        assert counter.get_total_flops() == shape.forward_flops(20)
        with FlopCounterMode(display=False) as counter:
            decode(base, prefix, torch.arange(5, 12)[None])
        assert counter.get_total_flops() == shape.forward_flops(7, context=20, logits=7)

    adapters, writer = lora_parameters(eager), lora_parameters(eager, WRITER)
    eager.requires_grad_(False)  # the counter looks for gradients
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager.encode(torch.arange(5, 35)[None], torch.tensor([30]), 8)
    # In two passes, of which the first leaves out what no key or value depends on.
    two = shape.forward_flops(30, adapters=adapters) + shape.forward_flops(8, context=30, adapters=writer)
    assert 0.95 * two < counter.get_total_flops() <= two
    base = load_base(BaseConfig(path=str(tiny_base_folder), attention="eager"))
    shared = make_tiny_compressor(base=base, writer_rank=0).eval().requires_grad_(False)
    adapters = lora_parameters(shared)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shared.encode(torch.arange(5, 35)[None], torch.tensor([30]), 8)
    assert 0.9 * shape.forward_flops(38) < counter.get_total_flops() <= shape.forward_flops(38, adapters=adapters)


def test_setting_adds_up_a_whole_run(eager: Compressor) -> None:
    shape = shape_of(eager)
    setting = Setting(shape, passage=30, new_tokens=5, value_bytes=4)
    with FlopCounterMode(display=False) as counter:
        prefix = token_prefix(eager.base, [list(range(5, 35))])
        steps = list(stream(eager.base, prefix, [[1]], [5], ends=False))
    assert len(steps) == 5
    full, kept = setting.full(new=True), setting.full(new=False)
    # Caches have room for what is to come, which attention multiplies too.
    assert full.flops <= counter.get_total_flops() < 1.03 * full.flops
    assert full.flops - kept.flops == shape.forward_flops(31)
    # 31 positions of context, BOS, and the first four new tokens: what is written last is not read.
    assert full.kv_bytes == kept.kv_bytes == 2 * 3 * 2 * 8 * 4 * 36
    assert full.pairs == causal_pairs(36)
    assert kept.pairs == sum(range(32, 37))
    memory = setting.memory(8, new=True, adapters=0, bidirectional=False)
    assert memory.kv_bytes == 2 * 3 * 2 * 8 * 4 * 13
    assert memory.pairs == causal_pairs(38) + sum(range(9, 14))
    assert setting.memory(8, True, 0, bidirectional=True).pairs - memory.pairs == 30**2 - causal_pairs(30)


def test_llama_and_the_published_claim() -> None:
    shape = LLAMA
    # 8.03 billion parameters, of which the norms are 266,240; 128 KiB of keys and values a position.
    assert shape.layers * shape.layer_weights + 2 * shape.vocabulary * shape.hidden + 266_240 == 8_030_261_248
    assert shape.kv_bytes(1, 2) == 128 * 1024
    rows = {(row["prompt"], row["new_tokens"]): row for row in published_rows()}
    assert int(rows["new", 100]["pairs_saved"]) == 27
    assert int(rows["reused", 100]["pairs_saved"]) == 90
    assert int(rows["reused", 400]["kv_saved"]) == 55
    assert int(rows["reused", 100]["kv_saved"]) == 83
    assert rows["new", 100]["flops_saved"] < 0


def test_bases_that_the_formulas_do_not_describe_are_refused(
    make_family_base: Callable[..., Any], make_tiny_compressor: Callable[..., Any]
) -> None:
    assert shape_of(make_tiny_compressor(base=make_family_base("phi"))).layer_weights > 0
    with pytest.raises(CompressorError, match="FLOPs cannot be counted"):
        shape_of(make_tiny_compressor(base=make_family_base("mixtral"), lora_targets=["q_proj", "k_proj", "v_proj"]))


# -- parts of a memory -----------------------------------------------------------------------------------------------


def _pieces(model: Compressor, *passages: range) -> tuple[MemoryMethod, list[list[Any]]]:
    method = MemoryMethod(model)
    return method, method.compress([list(passage) for passage in passages], [8])[0]


def test_removing_does_what_it_says(tiny_compressor: Compressor) -> None:
    method, (one, long) = _pieces(tiny_compressor, range(10, 40), range(100, 220))
    base = tiny_compressor.base
    ids = torch.arange(20, 30)[None]
    own = method.prefix([one])
    with torch.no_grad():
        before = decode(base, own, ids)
        # A memory without any token is no context at all, at the same position.
        nothing = empty_prefix(base, 1)
        nothing.start = own.start
        gone = decode(base, without_token(own, None, 8), ids)
        assert torch.allclose(gone, decode(base, nothing, ids), atol=1e-5)
        # Removing a token is compressing it away: the other seven alone.
        kept = torch.arange(8) != 3
        few = ([layer[:, :, kept] for layer in own.keys], [layer[:, :, kept] for layer in own.values])
        seven = type(own)(*few, own.mask[:, 1:], own.start)
        assert torch.allclose(decode(base, without_token(own, 3, 8), ids), decode(base, seven, ids), atol=1e-5)
        # Hidden from every layer, one inside the other, the memory is gone; from one, it is not.
        with hidden_from(base, 0, own.slots):
            part = decode(base, own, ids)
            with hidden_from(base, 1, own.slots), hidden_from(base, 2, own.slots):
                assert torch.allclose(decode(base, own, ids), gone, atol=1e-5)
        assert not torch.allclose(part, gone, atol=1e-3)
        assert not torch.allclose(part, before, atol=1e-3)
        assert torch.equal(decode(base, own, ids), before)
    # Every segment loses the token.
    assert len(long) == 2
    assert (~without_token(method.prefix([long]), 3, 8).mask[0]).nonzero()[:, 0].tolist() == [3, 11]


def test_probe_agrees_with_scores(tiny_compressor: Compressor) -> None:
    method, (one, long) = _pieces(tiny_compressor, range(10, 40), range(100, 220))
    prompts, targets = [[1], [1]], [list(range(10, 40)), list(range(5, 60))]
    found = probe(method, [one, long], prompts, targets)
    own = method.prefix([long])
    for place, prefix in ((0, own), (1 + 5, without_token(own, 5, 8)), (-1, without_token(own, None, 8))):
        wanted = -float(score(tiny_compressor.base, prefix, prompts[1:], targets[1:])[0][:, 0].double().sum())
        assert float(found[1]["nats"][place]) == pytest.approx(wanted, rel=1e-5)
    assert found[1]["nats"].shape == (1 + 8 + 3 + 1,)
    assert [one["tokens"] for one in found] == [30, 55]
    # Of a question that has no answer its end is what a removal costs.
    unanswerable = Item("a", list(range(10, 40)), asked={"answers": [], "prompt": [1]})
    assert AnswerProbe().run(method, [unanswerable], [one])[0]["tokens"] == 1


def test_nothing_follows_from_a_memory_that_does_not_help() -> None:
    """Two tokens of unequal effect in a memory that helps, and in one whose removal helps."""
    rng = np.random.default_rng(0)
    for sign, outcome in ((1, "the published claim holds here"), (-1, "nothing follows for the claim")):
        # Unchanged; tokens 0 and 1, one layer and the memory removed.
        added = np.array([0.0, 2.0, 1.0, 0.0, 3.0 * sign])
        results = [{"tokens": 10, "nats": torch.tensor(10 + added + rng.normal(size=5) * 0.01)} for _ in range(20)]
        (found,) = verdict("qa", "set", results, 2, 0)
        assert outcome in found
        most, least = re.findall(r"token (\d) (?:adds )?(\d\.\d+)", found)
        assert (most[0], least[0]) == ("0", "1")
        assert (float(most[1]), float(least[1])) == pytest.approx((2, 1), abs=0.05)
    assert verdict("qa", "set", results, 1, 0) == []


def test_permutation_test_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(40, 6))
    assert permutation_test(alike, 400) > 0.05
    assert permutation_test(alike + np.array([1.0, 0, 0, 0, 0, 0]), 400) == pytest.approx(1 / 401)
    assert permutation_test(np.ones((5, 4)), 50) == 1


# -- commands --------------------------------------------------------------------------------------------------------


def test_utilisation_command(
    checkpoint: str,
    data: list[str],
    tmp_path: Path,
    program: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
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
    # For each of two data sets: the memory, 8 tokens, 3 layers.
    assert len(rows) == 2 * (1 + 8 + 3)
    assert {(row["task"], row["dataset"], row["n"]) for row in rows} == {
        ("regeneration", "passages", 4),
        ("qa", "questions", 5),
    }
    for row in rows:
        assert row["loss_increase_low"] - 1e-9 <= row["loss_increase"] <= row["loss_increase_high"] + 1e-9
        assert ("loss" in row) == (row["part"] == "memory")
    assert {file.name for file in output.iterdir()} == {
        "metrics.json",
        "config.yaml",
        "table.md",
        "parts.jsonl",
        "utilisation.png",
    }
    assert (output / "utilisation.png").read_bytes().startswith(PNG)
    assert "| regeneration | passages | token | 0 | 4 |" in (output / "table.md").read_text()

    status, _, errors = program("evaluate.py", *argv, tmp_path / "two", processes=2)
    assert status == 0, errors
    two = _metrics(tmp_path / "two")
    assert two["processes"] == 2
    assert all(two[name] == metrics[name] for name in ("rows", "notes"))


def test_efficiency_command(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    argv = ["--task", "efficiency", "--checkpoint", checkpoint, "--tokens", "8", "1", "--lengths", "40"]
    argv += ["--new_tokens", "4", "8", "--repeats", "2", "--output", str(output)]
    assert evaluate_main(argv) == 0
    assert "27-90%" in capsys.readouterr().out
    metrics = _metrics(output)
    rows = metrics["rows"]
    assert len(rows) == 3 * 2 * 2  # three kinds of prompt, two sizes, two numbers of new tokens
    for row in rows:
        assert row["seconds"] >= row["first_token_seconds"] > 0
        assert row["first_token_speedup"] == row["full_first_token_seconds"] / row["first_token_seconds"]
        assert row["tokens_per_second"] > 0
    assert all(row["kv_saved"] > 0 for row in rows)
    assert metrics["machine"]["threads"] == torch.get_num_threads()
    assert {file.name for file in output.iterdir()} == {
        "metrics.json",
        "config.yaml",
        "table.md",
        "parts.jsonl",
        "efficiency.png",
    }
    assert (output / "efficiency.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "efficency"], "did you mean efficiency"),
        (["--task", "nothing-like-it"], "utilisation"),
        (["--task", "efficiency", "--lengths", "65"], "up to 64 tokens at once"),
        (["--task", "efficiency", "--data", "squad-dev"], "data means nothing to --task efficiency"),
        (["--task", "efficiency", "--new_tokens", "1"], "at least 2 new tokens"),
        (["--task", "efficiency", "--tokens", "9"], "more than the 8 memory tokens"),
        (["--task", "utilisation", "--tokens", "4", "2"], "give one"),
        (["--task", "utilisation", "--methods", "full"], "leave it out"),
        (["--task", "utilisation", "--data", "no-such.jsonl"], "no-such.jsonl"),
        (["--task", "efficiency", "--repeats", "0"], "at least 1"),
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


@pytest.mark.parametrize("study", ["utilisation", "efficiency"])
def test_more_tokens_than_there_are_are_refused_before_the_base_is_loaded(
    study: str,
    checkpoint: str,
    tmp_path: Path,
    data: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_base(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("compressor.model.checkpoint.load_base", load_base)
    argv = ["--task", study, "--checkpoint", checkpoint, "--tokens", "9", "--output", str(tmp_path / "out")]
    assert evaluate_main([*argv, *(["--data", *data] if study == "utilisation" else [])]) == 2
    assert "tokens = 9 is more than the 8 memory tokens of" in capsys.readouterr().err


def test_variants_are_timed_alike(tiny_compressor: Compressor) -> None:
    times = measure(tiny_compressor, 20, [8, 1], EfficiencySettings(repeats=2, new_tokens=[3, 5]))
    assert list(times) == [None, 8, 1]
    assert all(len(runs) == 2 and set(runs[0].written) == {1, 3, 5} for runs in times.values())
    assert all(0 < run.written[1] < run.written[5] for runs in times.values() for run in runs)
