"""Text codecs: a file stands for one text, whatever is damaged or missing is refused."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.base import load_base
from compressor.cli import main
from compressor.codecs.exact import ExactBase
from compressor.codecs.fitting import calibrate
from compressor.codecs.text import TEXT_CODECS, Needs, is_text_file, pack_texts, text_codec, unpack_text
from compressor.errors import CompressorError
from compressor.generation import Sampling
from compressor.model import Compressor
from compressor.model_config import BaseConfig, CompressorConfig

pytest.importorskip("zstandard")
pytest.importorskip("constriction")
pytest.importorskip("yake")


@pytest.fixture(scope="module")
def text(texts: list[str]) -> str:
    return texts[0][:130]


@pytest.fixture(scope="module")
def load(tiny_base_folder: Path) -> Callable[[], Any]:
    return lambda: load_base(BaseConfig(path=str(tiny_base_folder)))


@pytest.fixture(scope="module")
def models(load: Callable[[], Any]) -> dict[str, Compressor]:
    """A compressor for each codec that needs one, with 4 memory tokens."""
    settings = {"memory_tokens": 4, "lora_rank": 4, "lora_alpha": 8.0, "max_passage_tokens": 48}
    kv = Compressor(load(), CompressorConfig(**settings)).eval()
    embedding = Compressor(load(), CompressorConfig(method="sentence-embedding", layout="front", **settings)).eval()
    return {"memory": kv, "sentence-embedding": embedding}


@pytest.fixture(scope="module")
def needs(load: Callable[[], Any], models: dict[str, Compressor]) -> Callable[..., Needs]:
    exact = ExactBase(load())

    def make(name: str, **settings: Any) -> Needs:
        return Needs(lambda: exact, lambda: models[name], tokens=settings.pop("tokens", 4), **settings)

    return make


@pytest.mark.parametrize("name", list(TEXT_CODECS))
def test_a_file_stands_for_one_text(name: str, text: str, needs: Callable[..., Needs], texts: list[str]) -> None:
    two = pack_texts([text, texts[1][:60]], text_codec(name, needs(name)))
    alone = pack_texts([text], text_codec(name, needs(name, batch=1)))[0]
    assert alone == two[0]  # the company does not matter
    assert is_text_file(alone.blob)
    assert alone.blob != two[1].blob
    for batch in (1, 7):
        assert unpack_text(alone.blob, needs(name, batch=batch, tokens=None)) == alone.text
    assert 0 < alone.decoder_tokens <= 4 * len(text) / 10
    # No greater than it has to be: a prompt of four tokens takes a few bytes.
    if name in ("keywords", "summary"):
        assert len(alone.blob) < 40
    with pytest.raises(CompressorError, match="takes text"):
        pack_texts([" \n"], text_codec(name, needs(name)))


def test_sampling_is_in_the_file(text: str, needs: Callable[..., Needs]) -> None:
    codec = text_codec("keywords", needs("keywords"))
    found = [pack_texts([text], codec, Sampling(0.9, 40, 0.95, seed))[0] for seed in (0, 0, 70_000)]
    assert found[0] == found[1]
    assert found[0].text != found[2].text
    assert unpack_text(found[2].blob, needs("keywords")) == found[2].text
    greedy = pack_texts([text], codec, Sampling())[0]
    assert len(greedy.blob) < len(found[0].blob)
    assert unpack_text(greedy.blob, needs("keywords")) == greedy.text
    for wrong in (Sampling(3.0), Sampling(0.001), Sampling(seed=-1)):
        with pytest.raises(CompressorError):
            pack_texts([text], codec, wrong)


def test_a_template_is_in_the_file(text: str, needs: Callable[..., Needs]) -> None:
    own = pack_texts([text], text_codec("summary", needs("summary")))[0]
    other = pack_texts([text], text_codec("summary", needs("summary", template="About {prompt}: ")))[0]
    assert other.text != own.text
    assert unpack_text(other.blob, needs("summary")) == other.text
    with pytest.raises(CompressorError, match=r"\{prompt\}"):
        pack_texts([text], text_codec("summary", needs("summary", template="no place")))


def test_memory_codecs(text: str, needs: Callable[..., Needs], models: dict[str, Compressor], texts: list[str]) -> None:
    model = models["memory"]
    ids = model.base.tokenizer([one[:150] for one in texts[5:25]], add_special_tokens=False)["input_ids"]
    calibration = calibrate(model, ids, sensitivity_passages=0, rank=16)
    sizes = {}
    for name in ("bf16", "int8", "int4+ans", "lowrank:0.5", "int3+range"):
        fitted = {"load_calibration": lambda: calibration} if name in ("lowrank:0.5", "int3+range") else {}
        packed = pack_texts([text], text_codec("memory", needs("memory", memory_codec=name, **fitted)))[0]
        assert unpack_text(packed.blob, needs("memory", **fitted)) == packed.text
        sizes[name] = len(packed.blob)
    assert sizes["bf16"] > sizes["int8"] > sizes["lowrank:0.5"]
    made = needs("memory", memory_codec="lowrank:0.5", load_calibration=lambda: calibration)
    blob = pack_texts([text], text_codec("memory", made))[0].blob
    with pytest.raises(CompressorError, match=r"needs the calibration .* none was given"):
        unpack_text(blob, needs("memory"))


def test_embeddings_need_their_checkpoint(text: str, needs: Callable[..., Needs], load: Callable[[], Any]) -> None:
    name = "sentence-embedding"
    sizes = [len(pack_texts([text], text_codec(name, needs(name, bits=bits)))[0].blob) for bits in (8, 4, 2)]
    assert sizes[0] > sizes[1] > sizes[2]
    blob = pack_texts([text], text_codec(name, needs(name)))[0].blob
    settings = CompressorConfig(method=name, layout="front", memory_tokens=4, max_passage_tokens=48)
    other = Compressor(load(), settings, seed=5).eval()
    with pytest.raises(CompressorError, match="another checkpoint"):
        unpack_text(blob, Needs(load, lambda: other))
    with pytest.raises(CompressorError, match="this one is of kv"):
        unpack_text(blob, Needs(load, needs("memory").load_model))
    with pytest.raises(CompressorError, match="needs a compressor's checkpoint"):
        unpack_text(blob, Needs(load))
    for wrong in ({"bits": 5}, {"tokens": 9}):
        with pytest.raises(CompressorError, match="bits are 8, 4, 3 or 2"):
            pack_texts([text], text_codec(name, needs(name, **wrong)))


@pytest.mark.parametrize("name", ["keywords", "memory", "sentence-embedding"])
def test_damaged_files_are_refused(name: str, text: str, needs: Callable[..., Needs]) -> None:
    made = needs(name)
    blob = pack_texts([text[:80]], text_codec(name, made))[0].blob
    rng = random.Random(1)
    for case in range(40):
        data = bytearray(blob)
        data[case if case < 16 else rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(CompressorError):
            unpack_text(bytes(data), made)
    for size in (0, 1, 9, 13, len(blob) - 1):
        with pytest.raises(CompressorError):
            unpack_text(blob[:size], made)
    # With a checksum that fits, as someone could write it, still no crash and no other text.
    expected = unpack_text(blob, made)
    for case in range(10):
        data = bytearray(blob[:-4])
        place = case + 10 if case < 7 else rng.randrange(10, len(data))
        data[place] ^= 1 << rng.randrange(8)
        signed = bytes(data) + zlib.crc32(data).to_bytes(4, "little")
        try:
            assert unpack_text(signed, made) == expected
        except CompressorError:
            continue


def test_foreign_files_are_refused(text: str, needs: Callable[..., Needs], load: Callable[[], Any]) -> None:
    made = needs("keywords")
    blob = pack_texts([text], text_codec("keywords", made))[0].blob

    def signed(data: bytes) -> bytes:
        return data + zlib.crc32(data).to_bytes(4, "little")

    with pytest.raises(CompressorError, match="not a file of a text codec"):
        unpack_text(b"PK\x03\x04 something else entirely", made)
    with pytest.raises(CompressorError, match="version 2"):
        unpack_text(signed(bytes([blob[0], 0x20]) + blob[2:-4]), made)
    with pytest.raises(CompressorError, match="number 99"):
        unpack_text(signed(blob[:2] + bytes([99]) + blob[3:-4]), made)
    other = load()
    with torch.no_grad():
        other.embeddings.weight.add_(0.01)
    with pytest.raises(CompressorError, match="another base"):
        unpack_text(blob, Needs(lambda: other))
    # A base that writes something else here: an error, no other text.
    with pytest.raises(CompressorError, match="does not write here"):
        unpack_text(signed(blob[:6] + bytes(4) + blob[10:-4]), made)


def test_commands(
    text: str, models: dict[str, Compressor], tiny_base_folder: Path, tmp_path: Path, capsysbinary: Any
) -> None:
    base = ["--base", str(tiny_base_folder)]
    models["memory"].save_pretrained(tmp_path / "kv")
    with_model = [*base, "--checkpoint", str(tmp_path / "kv")]
    source = tmp_path / "text.txt"
    source.write_text(text)
    packed = tmp_path / "text.txt.cz"
    assert main(["pack", str(source), "--codec", "keywords", "--tokens", "6", "--seed", "3", *base]) == 0
    assert source.exists()  # it is the only copy
    assert len(packed.read_bytes()) < 60
    assert main(["unpack", "-c", str(packed), *base]) == 0
    first = capsysbinary.readouterr().out
    assert main(["unpack", "-c", str(packed), *base]) == 0
    assert capsysbinary.readouterr().out == first != text.encode()
    assert main(["pack", str(source), "--codec", "summary", *base]) == 2  # gzip's way: what exists is left alone
    assert main(["pack", str(source), "-f", "--codec", "memory", "--memory-codec", "int4+ans", *with_model]) == 0
    assert main(["unpack", "-t", str(packed), *base]) == 0
    packed.unlink()
    source.write_bytes(b"\xff\xfe\x00")
    assert main(["pack", str(source), "--codec", "summary", *base]) == 1
    assert b"not UTF-8" in capsysbinary.readouterr().err
    assert not packed.exists()
