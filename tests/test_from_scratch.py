"""The example that makes a base from text, run short."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.commands.cli import train_main
from compressor.model.config import BaseConfig
from compressor.model.load import load_base

SMALL = ["--limit", "150", "--vocabulary", "400", "--hidden", "32", "--layers", "2", "--heads", "4", "--width", "64"]


def test_rows_hold_texts_and_passages_twice(from_scratch: Any) -> None:
    texts = ["abcdefgh" * 9, "12 + 34 = 46", "ünïcode, 𝛼≤β </s>"]
    tokenizer = from_scratch.train_tokenizer(texts, 300)
    encoded = from_scratch.encode(tokenizer, texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    rows = list(islice(from_scratch.rows(encoded, tokenizer, 40, 0), 60))
    assert {len(row) for row in rows} == {40}
    assert {token for row in rows for token in row} <= {token for ids in encoded for token in ids} | {1, 2}
    twice = 0
    for row in rows:
        parts = "".join(f" {token}" for token in row).split(" 1 ")[1:]
        twice += any(first and second.startswith(f"{first} 2") for first, second in pairwise(parts))
    assert 10 <= twice <= 40
    inputs, targets = from_scratch.pairs(torch.tensor(rows))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_what_it_makes_is_a_base_that_a_compressor_is_trained_for(
    from_scratch: Any, training_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, "--steps", "30", "--batch", "4", "--output", str(tmp_path / "base"), "--device", "cpu"]
    assert from_scratch.main(argv) == 0
    printed = capsys.readouterr().out
    losses = [float(line.split(": ")[1].split()[0]) for line in printed.splitlines() if "nats a token" in line]
    assert losses[-1] < losses[0] - 0.3
    assert "sample: We study" in printed
    base = load_base(BaseConfig(path=str(tmp_path / "base")))
    assert (base.layers, base.hidden, base.bos, base.eos) == (2, 32, 1, 2)
    options = [*training_options, f"--base.path={tmp_path / 'base'}", f"--output={tmp_path / 'run'}"]
    assert train_main([*options, "--training.steps=2"]) == 0
    capsys.readouterr()
    for wrong, message in (
        (["--hidden", "30"], "must be a whole, even number"),
        (["--vocabulary", "100"], "--vocabulary = 100 is out of range"),
        (["--learning-rate", "1e30"], "give a lower --learning-rate"),
    ):
        assert from_scratch.main([*argv[:-4], "--output", str(tmp_path / "other"), *wrong]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
