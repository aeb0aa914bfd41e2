"""The study `rate-distortion`: every codec on the same passages, in one table and one chart."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.base import load_base
from compressor.codecs.text import Needs, pack_texts, text_codec
from compressor.evaluation.command import evaluate_main
from compressor.evaluation.studies import rate_distortion
from compressor.model import Compressor
from compressor.model_config import BaseConfig, CompressorConfig

pytest.importorskip("zstandard")
pytest.importorskip("constriction")
pytest.importorskip("yake")

LOSSLESS = {"lossless", "gzip -9", "xz -9e", "zstd -19"}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, texts: list[str]
) -> tuple[Path, dict[str, Any]]:
    """The study over two passages and three questions."""
    folder = tmp_path_factory.mktemp("study")
    base = {"base": str(tiny_base_folder)}
    settings = {"memory_tokens": 4, "lora_rank": 4, "lora_alpha": 8.0, "max_passage_tokens": 64}
    for place, more in (
        ("compressor", {"layout": "nested"}),
        ("methods/sentence-embedding", {"method": "sentence-embedding", "layout": "front"}),
    ):
        tiny = load_base(BaseConfig(path=str(tiny_base_folder)))
        Compressor(tiny, CompressorConfig(**settings, **more)).save_pretrained(folder / place)
    passages, questions = folder / "passages.jsonl", folder / "questions.jsonl"
    chosen = [text[:120] for text in texts[:2]] + ["too short"]
    passages.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(chosen)))
    asked = [
        {"id": str(i), "context": chosen[i // 2], "question": "What?", "answers": [chosen[i // 2].split()[i]]}
        for i in range(3)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in asked))
    options = ["--checkpoint", str(folder / "compressor"), "--base", base["base"], "--task", "rate-distortion"]
    options += ["--data", str(passages), "--questions", str(questions), "--tokens", "4", "1", "--lengths", "24"]
    options += ["--codecs", "bf16", "lowrank:0.5", "--resamples", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_distortion, "CALIBRATED_ON", 12)
        assert evaluate_main([*options, "--output", str(folder / "out")]) == 0
    return folder, json.loads((folder / "out" / "metrics.json").read_text())


def test_every_codec_is_a_row(run: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = run
    assert metrics["figures"] == ["bytes_per_byte", "decoder_ratio", "bleu", "rouge_l", "exact_match", "f1", "text_f1"]
    rows = {(row["dataset"], row["codec"], row["tokens"]): row for row in metrics["rows"]}
    assert len(rows) == len(metrics["rows"]) == 2 * (2 * 2 + 2 * 2 + 3 + 4)
    codecs = {codec for _, codec, _ in rows}
    assert {"memory, bf16", "memory, lowrank:0.5", "keywords", "summary"} <= codecs
    assert {f"sentence-embedding, int{bits}" for bits in (8, 4, 2)} | LOSSLESS <= codecs
    for (dataset, codec, tokens), row in rows.items():
        exact = codec in LOSSLESS
        assert row["exact_match"] == 1 if exact else row["exact_match"] < 1
        assert (row["rouge_l"] == 1) == exact
        assert row["n"] == 2
        assert ("f1" in row) == ("text_f1" in row) == (dataset == "questions")
        if codec in LOSSLESS:
            assert row["decoder_ratio"] == 1
            assert tokens is None
        elif dataset == "passages" and codec not in ("keywords", "summary"):
            assert row["decoder_ratio"] == tokens / 24
    # With four times as many tokens there are about four times as many bytes; coding takes fewer.
    passages = {key[1:]: row for key, row in rows.items() if key[0] == "passages"}
    assert passages["memory, bf16", 4]["bytes"] > 3 * passages["memory, bf16", 1]["bytes"]
    assert passages["memory, bf16", 4]["bytes"] > 10 * passages["memory, lowrank:0.5", 4]["bytes"]
    assert passages["sentence-embedding, int8", 4]["bytes"] > passages["sentence-embedding, int2", 4]["bytes"]
    # What reads the whole text answers alike, whoever packed it.
    answers = {rows["questions", codec, None]["f1"] for codec in LOSSLESS}
    assert len(answers) == 1
    assert (folder / "out" / "rate-distortion.png").read_bytes()[:4] == b"\x89PNG"
    assert "keywords" in (folder / "out" / "table.md").read_text()


def test_bytes_are_those_of_the_files(run: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = run
    rows = {(row["dataset"], row["codec"], row["tokens"]): row for row in metrics["rows"]}
    model = Compressor.from_pretrained(folder / "compressor", base=metrics["base"]["path"])
    tokenizer = model.base.tokenizer
    records = [json.loads(line)["text"] for line in (folder / "passages.jsonl").read_text().splitlines()]
    cut = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:24]) for text in records[:2]]
    size = sum(len(text.encode()) for text in cut)
    zipped = sum(len(gzip.compress(text.encode(), 9, mtime=0)) for text in cut)
    assert rows["passages", "gzip -9", None]["bytes_per_byte"] == pytest.approx(zipped / size)
    needs = Needs(lambda: model.base, lambda: model, tokens=4)
    packed = pack_texts(cut, text_codec("memory", needs))
    assert rows["passages", "memory, bf16", 4]["bytes"] == np.mean([len(one.blob) for one in packed])


def test_settings_that_mean_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "rate-distortion", "--output", str(tmp_path / "out")]
    for more, reason in (
        (["--methods", "full"], "takes only the checkpoint"),
        (["--methods", "sentence-embedding"], "sentence-embedding=CHECKPOINT"),
        (["--split_date", "2020-01-01"], "split_date cannot be used"),
    ):
        assert evaluate_main([*options, *more]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
