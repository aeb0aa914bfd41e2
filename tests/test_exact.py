"""Exact memories: a memory and its residual give the passage back byte for byte, or raise."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import generation
from compressor.base import load_base
from compressor.cli import main
from compressor.codecs.blocks import TEXT
from compressor.codecs.codec import Codec
from compressor.codecs.collection import Collection
from compressor.codecs.exact import ExactBase
from compressor.codecs.fitting import calibrate
from compressor.codecs.inspection import byte_ledger
from compressor.codecs.residual import as_stored, exact_base, make_exact, parts, restore_texts
from compressor.errors import CompressorError
from compressor.memory import Memory
from compressor.model import Compressor
from compressor.model_config import BaseConfig, CompressorConfig

pytest.importorskip("zstandard")


@pytest.fixture(scope="module")
def model(tiny_base_folder: Path) -> Compressor:
    """A tiny compressor on a base that has learned to predict a little: random ones code worse than zstd does."""
    base = load_base(BaseConfig(path=str(tiny_base_folder)))
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.1)
    return Compressor(
        base, CompressorConfig(memory_tokens=8, lora_rank=4, lora_alpha=8.0, max_passage_tokens=64)
    ).eval()


@pytest.fixture(scope="module")
def text(texts: list[str]) -> str:
    """A passage of two segments, with white space that must survive."""
    return f"  {texts[0][:190]} \r\n\n"


def test_regenerate_gives_the_text_back(model: Compressor, text: str, texts: list[str]) -> None:
    passages = [text, texts[1][:60], "naïve 𝛼≤β </s> \t", "x"]
    memories = model.compress(passages, 4, exact=True)
    assert model.regenerate(memories) == passages
    assert model.regenerate(memories[0]) == text
    assert len(memories[0].segments) > 1
    assert parts(memories[0].residual or b"")[0] == TEXT
    # The memory is the one that its file will hold.
    assert memories[0].keys.dtype == torch.bfloat16
    # Whatever else is asked for at the same time.
    mixed = [replace(memories[1], residual=None), memories[0]]
    assert model.regenerate(mixed)[1] == text
    assert model.regenerate(mixed)[0] != passages[1]
    sampled = model.regenerate(memories[1], sampling=generation.Sampling(temperature=1.0))
    assert sampled != passages[1]
    with pytest.raises(CompressorError, match=r"exact=True only"):
        model.compress(text, codec="int8")
    with pytest.raises(CompressorError, match="surrogates"):
        model.compress("\ud800 x", exact=True)


def test_segments_of_any_length_come_back(model: Compressor, text: str) -> None:
    """Each segment's tokens are coded after its own memory, however long the segments were asked to be."""
    memory = model.compress(text, segment_tokens=20, exact=True)
    assert len(memory.segments) > 3
    assert model.regenerate(memory) == text
    stored = make_exact(model, [text], [model.compress(text, segment_tokens=20)])[0]
    with pytest.raises(CompressorError, match="of another text"):
        make_exact(model, [text + " and more"], [stored])


def test_every_codec_keeps_it_exact_on_disk(model: Compressor, text: str, texts: list[str], tmp_path: Path) -> None:
    ids = model.base.tokenizer([one[:200] for one in texts[5:25]], add_special_tokens=False)["input_ids"]
    calibration = calibrate(model, ids, sensitivity_passages=0, rank=16)
    codecs = [Codec.parse(name) for name in ("bf16", "int8", "int4+ans", "int2+ans")]
    codecs += [Codec.parse(name, calibration) for name in ("int3+ans", "lowrank:0.5")]
    codecs += [Codec.parse("int8+ans", calibration, keep_tokens=4), Codec.parse("int4", drop_layers=[1])]
    exact = ExactBase(model.base)  # decoding needs the base alone
    for codec in codecs:
        memory = model.compress(text, exact=True, codec=codec)
        memory.save(tmp_path / "m", codec)
        loaded = Memory.load(tmp_path / "m", calibration)
        assert torch.equal(loaded.keys.float(), memory.keys.float()), codec
        assert loaded.residual == memory.residual
        assert restore_texts(exact, [loaded]) == [text], codec
        # Stored again it is the same, and in the type it is held in too.
        loaded.save(tmp_path / "again", codec)
        assert torch.equal(Memory.load(tmp_path / "again", calibration).values, loaded.values)
        loaded.save(tmp_path / "held")
        assert Memory.load(tmp_path / "held").residual == memory.residual
    assert sum(byte_ledger(tmp_path / "m").values()) == (tmp_path / "m").stat().st_size
    assert byte_ledger(tmp_path / "m")["residual"] == len(loaded.residual)


def test_what_would_not_be_exact_is_refused(model: Compressor, text: str, tmp_path: Path) -> None:
    memory = model.compress(text, exact=True)
    with pytest.raises(CompressorError, match="changes them: save it with"):
        memory.save(tmp_path / "m", "int2")
    assert not (tmp_path / "m").exists()
    with pytest.raises(CompressorError, match=r"exact=True .*or drop the residual"):
        memory.truncate(2)
    assert memory.truncate(8) is memory
    with pytest.raises(CompressorError, match="cannot concatenate exact memories"):
        Memory.concatenate([memory, memory])
    assert Memory.concatenate([memory]).residual == memory.residual
    assert all(part.residual is None for part in memory.split())
    assert replace(memory, residual=None).truncate(2).tokens == 4
    moved = replace(memory, keys=memory.keys + 0.5)
    with pytest.raises(CompressorError, match="not those its residual was made for"):
        model.regenerate(moved)
    with pytest.raises(CompressorError, match="no residual"):
        restore_texts(model.base, [replace(memory, residual=None)])


def test_damaged_residuals_never_give_another_text(model: Compressor, text: str) -> None:
    memory = model.compress(text, exact=True)
    good = memory.residual
    assert good is not None
    rng = random.Random(0)
    for case in range(16):
        data = bytearray(good)
        data[case if case < 14 else rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert restore_texts(model.base, [replace(memory, residual=bytes(data))]) == [text]
        except CompressorError:
            continue
    for cut in (0, 5, 9, 12, len(good) // 2, len(good) - 3):
        with pytest.raises(CompressorError):
            restore_texts(model.base, [replace(memory, residual=good[:cut])])
    with pytest.raises(CompressorError, match="version 3"):
        restore_texts(model.base, [replace(memory, residual=bytes([0x32]) + good[1:])])


def test_another_base_is_refused(model: Compressor, text: str, make_tiny_compressor: Callable[..., Any]) -> None:
    memory = model.compress(text, exact=True)
    other = make_tiny_compressor().base
    with pytest.raises(CompressorError, match="another base"):
        generation.regenerate(other, [memory])


def test_what_does_not_tokenise_back_is_stored_plainly(
    model: Compressor, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = "ab" * 300
    memory = model.compress(repeated, exact=True)
    assert parts(memory.residual or b"")[0] != TEXT  # zstd does better
    assert model.regenerate(memory) == repeated
    from compressor.codecs import residual

    monkeypatch.setattr(residual, "_text", lambda exact, segments: "something else")
    memory = model.compress(text, exact=True)
    assert parts(memory.residual or b"")[0] != TEXT
    assert restore_texts(model.base, [memory]) == [text]
    monkeypatch.setattr(residual, "PLAIN_BLOCK", 100)
    with pytest.raises(CompressorError, match="at most 100"):
        model.compress(text, exact=True)


def test_the_memory_shortens_the_residual(model: Compressor, text: str) -> None:
    """Conditioned on another passage's memory the same tokens take other bytes: the memory is what the coder reads."""
    from compressor.codecs.token_coder import encode_tokens

    exact = exact_base(model.base)
    ids = model.base.tokenizer(text, add_special_tokens=False)["input_ids"][:60]
    stored = as_stored(model.compress_ids([ids])[0], Codec.parse("bf16"))
    coded = {
        name: encode_tokens(exact, prefix, [ids])[0]
        for name, prefix in (("none", None), ("own", exact.memory_prefix([stored])))
    }
    assert coded["none"] != coded["own"]


def test_commands(
    model: Compressor,
    text: str,
    tiny_base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: Any,
) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint"), "--base", str(tiny_base_folder)]
    source, target = tmp_path / "text.txt", str(tmp_path / "m")
    source.write_bytes(text.encode())
    assert main(["compress", str(source), "-o", target, "--exact", "true", "--codec", "int4+ans", *checkpoint]) == 0
    assert b"make it exact" in capsysbinary.readouterr().out
    assert main(["regenerate", "--memory", target, "--base", str(tiny_base_folder)]) == 0
    assert capsysbinary.readouterr().out == source.read_bytes()
    assert main(["inspect", target]) == 0
    assert b"residual" in capsysbinary.readouterr().out
    assert main(["regenerate", "--memory", target, "--base", str(tiny_base_folder), "--tokens", "2"]) == 2
    assert b"--exact" in capsysbinary.readouterr().err

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": " exactly this  "}\n{"id": "b", "text": "and that"}\n')
    assert main(["compress", str(corpus), "-o", str(tmp_path / "many"), "--exact", "true", *checkpoint]) == 0
    kept = Collection(tmp_path / "many").load("b")
    assert restore_texts(model.base, [kept]) == ["and that"]

    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert main(["compress", str(source), "-o", str(tmp_path / "other"), "--exact", "true", *checkpoint]) == 2
    assert b"kv-compressor[codecs]" in capsysbinary.readouterr().err
    assert not (tmp_path / "other").exists()
