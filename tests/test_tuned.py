"""The bounds with a trained prefix: what they read, that they train, and the yardsticks of a table with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.commands.cli import evaluate_main, train_main
from compressor.errors import CompressorError
from compressor.methods.recite import recited_prefix
from compressor.methods.table import memory_method
from compressor.methods.tuned import START
from compressor.model.bases import FLAGSHIP_BASE, NAMED
from compressor.model.cartridge import text_prefix
from compressor.model.decoder import score, token_prefix
from compressor.model.generation import answer

NAMES = ("full-tuned", "none-tuned")


@pytest.mark.parametrize("name", NAMES)
def test_before_training_the_prefix_is_its_text(make_tiny_compressor: Callable[..., Any], name: str) -> None:
    """`BOS cartridge passage` is what the base keeps of these tokens, each where it stands, in rows of any length."""
    method = memory_method(name)(make_tiny_compressor(method=name))
    base = method.base
    start = base.tokenizer(START, add_special_tokens=False)["input_ids"][:8]
    passages = [list(range(20, 50)), list(range(90, 101)), [7]]
    assert method.sizes([16, 4]) == [16]
    (contexts,) = method.compress(passages, [16])
    reads = name == "full-tuned"
    assert [pieces[0].tokens for pieces in contexts] == [8 + len(ids) * reads for ids in passages]
    prefix = method.prefix(contexts)
    assert prefix.start.tolist() == [method.reach(pieces) for pieces in contexts]
    plain = token_prefix(base, [start + ids * reads for ids in passages])
    assert torch.equal(prefix.start, plain.start)
    prompts, targets = [[30, 31]] * 3, [[32, 33, 34]] * 3
    ours, theirs = (score(base, one, prompts, targets) for one in (prefix, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_bound_makes_no_memories(make_tiny_compressor: Callable[..., Any]) -> None:
    with pytest.raises(CompressorError, match="makes no memories: evaluate it"):
        make_tiny_compressor(method="full-tuned").compress("A text.")


@pytest.mark.usefixtures("no_estimate")
def test_bounds_train_and_stand_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the bundled base, through the commands."""
    questions = tmp_path / "questions.jsonl"
    records = [
        {"id": str(i), "context": f"The colour of box {i} is {colour}.", "question": f"What colour is box {i}?"}
        | {"answers": [colour]}
        for i, colour in enumerate(["red", "green", "blue", "white", "black", "brown", "grey", "pink"] * 4)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    nats = {}
    for name in NAMES:
        options = {
            "stage": "answer",
            "base.path": "models/arxiv-mini/base",
            "compressor.method": name,
            "compressor.memory_tokens": "4",
            "data.train": '["arxiv-validation"]',
            "data.validation": '["arxiv-validation"]',
            "data.validation_limit": "4",
            "data.limit": "32",
            "data.questions": f'["{questions}"]',
            "data.question_share": "0.9",
            "data.lengths": '[{"low": 6, "high": 12}]',
            "objective.tokens": '[{"tokens": 4}]',
            "objective.answer": "1.0",
            "training.steps": "8",
            "training.batch_tokens": "128",
            "training.warmup_steps": "2",
            "training.learning_rate": "2e-2",
            "training.validate_every": "8",
            "training.log_every": "1",
            "training.mixed_precision": "no",
            "training.threads": "1",
            "output": str(tmp_path / name),
        }
        assert train_main([f"--{key}={value}" for key, value in options.items()]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        checked = [row for row in rows if "validation_answer_4" in row]
        nats[name] = checked[-1]["validation_answer_4"]
        assert nats[name] < checked[-1][f"validation_answer_{name.removesuffix('-tuned')}"]  # the same, untrained
    assert nats["full-tuned"] < nats["none-tuned"]

    argv = ["--checkpoint", "models/arxiv-mini/compressor", "--task", "qa", "--data", str(questions), "--limit", "6"]
    argv += ["--tokens", "4", "--resamples", "20", "--output", str(tmp_path / "out"), "--methods", "kv", "full", "none"]
    assert evaluate_main([*argv, *(f"{name}={tmp_path / name / 'final'}" for name in NAMES)]) == 0
    assert "F1 / full (tuned)" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = {row["method"]: row for row in metrics["rows"]}
    assert list(found) == ["kv", "full", "none", *NAMES]
    assert (found["full-tuned"]["tokens"], found["full-tuned"]["normalised_nats_tuned"]) == (None, 1)
    assert found["none-tuned"]["normalised_nats_tuned"] == 0
    mine, most, least = (found[name]["answer_nats"] for name in ("kv", "full-tuned", "none-tuned"))
    assert found["kv"]["normalised_nats_tuned"] == pytest.approx((mine - least) / (most - least))
    for name in ("f1", "em"):
        whole = found["full-tuned"][name]
        assert found["kv"][f"retention_{name}_tuned"] == (pytest.approx(found["kv"][name] / whole) if whole else None)


def test_recited_texts_are_read_after_the_cartridge_that_ships(
    make_tiny_compressor: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `full-tuned` reads the same tokens; a base without a cartridge reads texts plainly."""
    bound = make_tiny_compressor(method="full-tuned")
    with torch.no_grad():
        bound.encoder.cartridge.weight.add_(0.1)
    bound.save_pretrained(tmp_path / "full-tuned")
    model = make_tiny_compressor()
    rows = [list(range(20, 50)), [7, 8]]
    assert torch.equal(text_prefix(model.base, rows).keys[0], token_prefix(model.base, rows).keys[0])
    with pytest.raises(CompressorError, match=r"none ships for .*: leave it out"):
        memory_method("recite-tuned")(model)

    named = replace(NAMED[FLAGSHIP_BASE], cartridge=str(tmp_path / "full-tuned"))
    monkeypatch.setitem(NAMED, FLAGSHIP_BASE, named)
    (contexts,) = memory_method("full-tuned")(bound).compress(rows, [16])
    wanted = memory_method("full-tuned")(bound).prefix(contexts)
    found = text_prefix(model.base, rows)
    assert torch.equal(found.start, wanted.start)
    torch.testing.assert_close(found.keys, wanted.keys)
    torch.testing.assert_close(found.values, wanted.values)
    method = memory_method("recite-tuned")(model)
    (recited,) = method.compress(rows, [8])
    read = method.prefix(recited)
    assert [method.reach(pieces) for pieces in recited] == read.start.tolist()
    texts = [[token for piece in pieces for token in piece.held] for pieces in recited]
    torch.testing.assert_close(read.keys, text_prefix(model.base, texts).keys)
    memories = model.compress_ids(rows)
    plain = answer(model.base, recited_prefix(model.base, memories), ["Why?"] * 2, model.config.question_template)
    assert model.answer(memories, ["Why?"] * 2, recite=True) == [one.text for one in plain]

    weights = tmp_path / "full-tuned" / "memory_tokens.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(CompressorError, match="is damaged: its checksum differs"):
        text_prefix(model.base, rows)
