"""A layout, a method, a codec, a text codec and a task of a module outside the package, each by one line in a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.commands.cli import evaluate_main
from compressor.evaluation.settings import RegenerationSettings
from compressor.evaluation.table import TASKS, Entry
from compressor.model.memory import Memory
from compressor.model.table import LAYOUTS, METHODS, LayoutEntry, MethodEntry
from compressor.packing.table import TEXT_CODECS, TextCodec
from compressor.packing.text_codecs import Options, pack_text, text_codec, unpack_text
from compressor.storage.table import CODECS

THINGS = """
import torch

from compressor.evaluation.tasks.regeneration import Regeneration
from compressor.methods.kv import KVEncoder
from compressor.methods.bounds import Truncate
from compressor.model.layouts import Placing
from compressor.packing.text_codecs import Words, Writer
from compressor.storage.codec import Codec


class Sparse(Placing):
    def positions(self, lengths, slots, tokens, most):
        return lengths + 2 * slots

    def start(self, lengths, tokens):
        return lengths + 2 * tokens


class Shifted(KVEncoder):
    def encode(self, model, passages, lengths, tokens):
        keys, values = super().encode(model, passages, lengths, tokens)
        return keys, values + 1


class Shouted(Regeneration):
    def note(self):
        return "LOUD"


class Double(Codec):
    def _encode(self, pair, memory):
        return {"pair": pair.double()}, {}

    def _decode(self, tensors, details, full):
        return tensors["pair"].float()


def beginning(options):
    return Words(Writer.load(options.base), 4, Truncate)
"""
TEXT = "We measure the mass of dust in galaxies, and find that it is small."


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the module with the things."""
    folder = tmp_path / "added_things"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "new.py").write_text(THINGS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "added_things.new"
    for name in [name for name in sys.modules if name.startswith("added_things")]:
        del sys.modules[name]


def check(model: Any, path: Path, codec: str | None = None) -> None:
    """What holds of every layout, method and codec: smaller memories, the way through a file, back to text."""
    memory = model.compress(TEXT)
    smaller = model.compress(TEXT, tokens=2)
    torch.testing.assert_close(memory.truncate(2).keys, smaller.keys, atol=1e-5, rtol=1e-4)
    memory.save(path, codec)
    read = Memory.load(path)
    assert torch.equal(read.keys, memory.keys)
    assert torch.equal(read.values, memory.values)
    assert read.layout == model.encoder.memory_layout
    assert model.regenerate(read) == model.regenerate(memory)


def test_a_layout(things: str, make_tiny_compressor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "sparse", LayoutEntry(f"{things}:Sparse", truncatable=True))
    model = make_tiny_compressor(layout="sparse")
    placed, start = model.compress(TEXT).positions()
    assert placed.diff().tolist() == [2] * 7
    assert int(start) == int(placed[-1]) + 2
    check(model, tmp_path / "m")


def test_a_method(things: str, make_tiny_compressor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shifted", MethodEntry(f"{things}:Shifted"))
    model, plain = make_tiny_compressor(method="shifted"), make_tiny_compressor()
    torch.testing.assert_close(model.compress(TEXT).values, plain.compress(TEXT).values + 1)
    check(model, tmp_path / "m")
    model.save_pretrained(tmp_path / "checkpoint")
    again = type(model).from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(again.compress(TEXT).keys, model.compress(TEXT).keys)


def test_a_codec(things: str, make_tiny_compressor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "double", f"{things}:Double")
    check(make_tiny_compressor(), tmp_path / "m", "double")


def test_a_text_codec(things: str, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXT_CODECS, "beginning", TextCodec(200, f"{things}:beginning"))
    codec = text_codec("beginning", Options(str(tiny_base_folder), load=lambda: pytest.fail("it needs no compressor")))
    blob, written = pack_text(TEXT, "beginning", codec)
    assert written.startswith("We meas")
    assert blob[2] == 200
    assert unpack_text(blob, lambda name: codec) == written


def test_a_task(
    things: str,
    make_tiny_compressor: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(TASKS, "shouted", Entry(f"{things}:Shouted", RegenerationSettings))
    make_tiny_compressor().save_pretrained(tmp_path / "checkpoint")
    argv = ["--checkpoint", str(tmp_path / "checkpoint"), "--task", "shouted", "--lengths", "16", "--limit", "2"]
    assert evaluate_main([*argv, "--tokens", "4", "--resamples", "5", "--output", str(tmp_path / "out")]) == 0
    assert "LOUD" in capsys.readouterr().out
    assert evaluate_main([*argv, "--candidates", "4"]) == 2
    assert "candidates means nothing to --task shouted" in capsys.readouterr().err
