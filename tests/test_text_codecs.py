"""Text codecs: a file stands for one text, from which the same base writes the same."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import compressor.packing.text_codecs
from compressor.api import Compressor
from compressor.commands.cli import main
from compressor.errors import CompressorError
from compressor.methods.summary import load_summariser
from compressor.model.generation import Sampling
from compressor.model.text_encoder import load_text_encoder
from compressor.packing.table import TEXT_CODECS
from compressor.packing.text_codecs import (
    Embedding,
    Options,
    Words,
    Writer,
    fitting,
    pack_text,
    text_codec,
    unpack_text,
)

pytest.importorskip("yake")
Load = Callable[..., Words | Embedding]


@pytest.fixture(scope="module")
def text(texts: list[str]) -> str:
    return texts[0][:130]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_tiny_compressor: Callable[..., Compressor]) -> str:
    folder = tmp_path_factory.mktemp("embedding") / "checkpoint"
    model = make_tiny_compressor(method="sentence-embedding", layout="front", memory_tokens=4, max_passage_tokens=48)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def load(tiny_base_folder: Path, checkpoint: str) -> Load:
    """Codecs by name, each loaded once."""
    made: dict[Any, Words | Embedding] = {}

    def get(name: str, **settings: Any) -> Words | Embedding:
        key = (name, *settings.items())
        if key not in made:
            made[key] = text_codec(
                name,
                Options(
                    str(tiny_base_folder),
                    partial(Compressor.from_pretrained, checkpoint),
                    **{"tokens": 4, **settings},
                ),
            )
        return made[key]

    return get


def test_names_are_those_of_the_command() -> None:
    assert len({one.number for one in TEXT_CODECS.values()}) == len(TEXT_CODECS)


@pytest.mark.parametrize("name", list(TEXT_CODECS))
def test_a_file_stands_for_one_text(name: str, text: str, load: Load) -> None:
    blob, written = pack_text(text, name, load(name))
    assert unpack_text(blob, load) == written
    assert pack_text(text, name, load(name))[0] == blob
    assert pack_text(text[30:], name, load(name))[0] != blob
    # No greater than it has to be: a prompt of four tokens takes a few bytes.
    if name != "sentence-embedding":
        assert len(blob) < 40
    with pytest.raises(CompressorError, match="takes text"):
        pack_text(" \n", name, load(name))


def test_long_texts_are_sent_in_pieces(load: Load, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressor.packing.text_codecs, "PIECE", 40)
    long = texts[0][:320]
    for name in ("summary", "sentence-embedding"):
        blob, written = pack_text(long, name, load(name))
        assert unpack_text(blob, load) == written
        assert len(blob) > 1.5 * len(pack_text(long[:60], name, load(name))[0])


def test_the_sampling_is_in_the_file(text: str, load: Load) -> None:
    codec = load("keywords")
    greedy = pack_text(text, "keywords", codec, Sampling())
    first, again, other = (pack_text(text, "keywords", codec, Sampling(1.5, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert len({greedy[1], first[1], other[1]}) == 3
    assert unpack_text(other[0], load) == other[1]
    for wrong in (Sampling(3.0), Sampling(1.0, seed=-1), Sampling(1.0, top_k=5)):
        with pytest.raises(CompressorError, match="cannot be stored"):
            pack_text(text, "keywords", codec, wrong)


def test_any_causal_model_writes(text: str, tiny_base_folder: Path, tmp_path: Path) -> None:
    """GPT-2's positions are learned: no memory can be placed among its keys."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=2)
    ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    codec = Words(Writer.load(str(tmp_path / "gpt2")))
    blob, written = pack_text(text, "keywords", codec)
    assert unpack_text(blob, lambda name: codec) == written
    with pytest.raises(CompressorError, match="another base"):
        unpack_text(blob, lambda name: Words(Writer.load(str(tiny_base_folder))))
    with pytest.raises(CompressorError, match="cannot load the base"):
        Writer.load(str(tmp_path / "none"))


def test_embeddings_need_their_checkpoint(
    text: str, load: Load, make_tiny_compressor: Callable[..., Compressor]
) -> None:
    name = "sentence-embedding"
    sizes = [len(pack_text(text, name, load(name, bits=bits))[0]) for bits in (8, 4, 2)]
    assert sizes[0] > sizes[1] > sizes[2]
    blob = pack_text(text, name, load(name))[0]
    settings = {"method": name, "layout": "front", "memory_tokens": 4, "max_passage_tokens": 48}
    other = make_tiny_compressor(seed=5, **settings)
    with pytest.raises(CompressorError, match="another checkpoint"):
        unpack_text(blob, lambda name: Embedding(other))
    with pytest.raises(CompressorError, match="this one is of kv"):
        Embedding(make_tiny_compressor())
    for wrong in ({"bits": 5}, {"tokens": 9}):
        with pytest.raises(CompressorError, match="bits are 8, 4, 3 or 2"):
            Embedding(other, **wrong)


def test_prompts_are_whole(tiny_base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)

    def kept(text: str, most: int) -> str:
        ids = fitting(tokenizer, text, most)
        assert len(ids) <= most
        return tokenizer.decode(ids)

    text = "We study heat. A new model is proposed, and tested."
    sentence, both = (len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text[:14], text))
    assert kept(text, both) == text
    for most in range(sentence, both):
        assert kept(text, most) == text[:14]
    assert text.startswith(kept(text, sentence - 1) + " ")
    assert kept("graphene ribbons, heat transport", 10) in ("graphene ribbons", "graphene")
    assert kept("x" * 40, 3)


@pytest.mark.parametrize("name", ["keywords", "sentence-embedding"])
def test_damaged_files_are_refused(name: str, text: str, load: Load) -> None:
    blob, expected = pack_text(text[:80], name, load(name))
    rng = random.Random(1)
    for case in range(40):
        data = bytearray(blob)
        data[case if case < 16 else rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(CompressorError):
            unpack_text(bytes(data), load)
    for size in (0, 1, 9, 13, len(blob) - 1):
        with pytest.raises(CompressorError):
            unpack_text(blob[:size], load)
    # With a checksum that fits, as someone could write it, still no crash and no other text.
    for case in range(10):
        data = bytearray(blob[:-4])
        place = case + 10 if case < 7 else rng.randrange(10, len(data))
        data[place] ^= 1 << rng.randrange(8)
        try:
            assert unpack_text(bytes(data) + zlib.crc32(data).to_bytes(4, "little"), load) == expected
        except CompressorError:
            continue


def test_foreign_files_are_refused(text: str, load: Load) -> None:
    blob = pack_text(text, "keywords", load("keywords"))[0]

    def signed(data: bytes) -> bytes:
        return data + zlib.crc32(data).to_bytes(4, "little")

    with pytest.raises(CompressorError, match="not a file of a text codec"):
        unpack_text(b"PK\x03\x04 something else entirely", load)
    with pytest.raises(CompressorError, match="version 1"):
        unpack_text(signed(bytes([blob[0], 0x10]) + blob[2:-4]), load)
    with pytest.raises(CompressorError, match="number 99"):
        unpack_text(signed(blob[:2] + bytes([99]) + blob[3:-4]), load)
    # A base that writes something else here: an error, no other text.
    with pytest.raises(CompressorError, match="does not write here"):
        unpack_text(signed(blob[:6] + bytes(4) + blob[10:-4]), load)


def test_models_are_loaded_without_a_word(
    tiny_base_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 1)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=512, d_model=16, decoder_attention_heads=1, **sizes))
    for name, model in ("bart", bart), ("bert", BertForMaskedLM(BertConfig(vocab_size=512, **size))):
        model.save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast.from_pretrained(tiny_base_folder).save_pretrained(tmp_path / name)
    logging.enable_progress_bar()  # an earlier test may have turned them off
    capfd.readouterr()
    Writer.load(str(tiny_base_folder))
    load_summariser(str(tmp_path / "bart"), torch.device("cpu"))
    load_text_encoder(str(tmp_path / "bert"))  # whose file has a head besides
    assert capfd.readouterr() == ("", "")


def test_commands(text: str, checkpoint: str, tiny_base_folder: Path, tmp_path: Path, capsysbinary: Any) -> None:
    base = ["--base", str(tiny_base_folder)]
    source, packed = tmp_path / "text.txt", tmp_path / "text.txt.cz"
    source.write_text(text)
    assert main(["pack", str(source), "--codec", "keywords", "--tokens", "6", "--seed", "3", *base]) == 0
    assert source.exists()  # it is the only copy
    assert len(packed.read_bytes()) < 60
    assert main(["unpack", "-c", str(packed), *base]) == 0
    first = capsysbinary.readouterr().out
    assert main(["unpack", "-c", str(packed), *base]) == 0
    assert capsysbinary.readouterr().out == first != text.encode()
    assert main(["pack", str(source), "--codec", "summary", *base]) == 2  # gzip's way: what exists is left alone
    assert main(["pack", "-c", "--hex", "--codec", "keywords", "--tokens", "6", "--seed", "3", str(source), *base]) == 0
    (tmp_path / "digits.txt").write_bytes(digits := capsysbinary.readouterr().out)
    assert bytes.fromhex(digits.decode()) == packed.read_bytes()
    assert main(["unpack", "-c", "--hex", str(tmp_path / "digits.txt"), *base]) == 0
    assert capsysbinary.readouterr().out == first
    assert main(["unpack", "-c", "--hex", str(packed), *base]) == 1
    assert b"not hexadecimal" in capsysbinary.readouterr().err
    embedding = ["--codec", "sentence-embedding", "--checkpoint", checkpoint]
    assert main(["pack", str(source), "-f", *embedding]) == 0
    assert main(["unpack", "-t", str(packed), *embedding[2:]]) == 0
    packed.unlink()
    source.write_bytes(b"\xff\xfe\x00")
    assert main(["pack", str(source), "--codec", "summary", *base]) == 1
    assert b"not UTF-8" in capsysbinary.readouterr().err
    assert not packed.exists()
