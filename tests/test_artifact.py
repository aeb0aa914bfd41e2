"""Memory files: what is written, what is refused, `compressor inspect`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scripts import load_script

from compressor.api import Compressor
from compressor.commands.cli import main as cli
from compressor.errors import CompressorError
from compressor.model import checkpoint, fingerprints
from compressor.model.memory import Memory, check_base, signed
from compressor.storage import container
from compressor.storage import memory_file as artifact
from compressor.storage.calibration import Calibration
from compressor.storage.codec import Codec
from compressor.storage.inspection import byte_ledger


@pytest.fixture(scope="module")
def fuzzing(project: Path) -> ModuleType:
    """`benchmarks/fuzz_memory.py`, which makes small memories and damages their files."""
    return load_script(project / "benchmarks" / "fuzz_memory.py")


@pytest.fixture(scope="module")
def originals(fuzzing: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Calibration]:
    """A file of every codec, and their calibration."""
    folder = tmp_path_factory.mktemp("originals")
    files, calibration = fuzzing.originals(folder)
    return [folder / f"original-{number}" for number in range(len(files))], calibration


def settings_in(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["memory"])


def edited(path: Path, target: Path, **changes: Any) -> Path:
    """A copy with other settings and a checksum that fits."""
    content = container.read(path, "memory", "a memory file", 2)
    settings = {**content.settings, **changes}
    del settings["sha256"]
    target.write_bytes(container.serialise("memory", settings, content.tensors)[0])
    return target


def test_every_codec_comes_back_with_its_origin(fuzzing: ModuleType, originals: Any) -> None:
    files, calibration = originals
    for number, path in enumerate(files):
        found = Memory.load(path, calibration)
        first = fuzzing.make_memory(number)
        assert (found.base, found.compressor, found.tokenizer, found.base_name) == (
            first.base,
            first.compressor,
            first.tokenizer,
            first.base_name,
        )
        assert found.segments[0] == first.segments[0]
        wanted = torch.cat([first.keys, first.values])
        back = torch.cat([found.keys[:, :, :4], found.values[:, :, :4]]).float()
        assert float((back - wanted).square().mean() / wanted.square().mean()) < 0.2, fuzzing.CODECS[number]


def test_the_default_is_exact(fuzzing: ModuleType, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        memory = fuzzing.make_memory(0).to(dtype=dtype)
        memory.save(tmp_path / "x.memory")
        found = Memory.load(tmp_path / "x.memory")
        assert found.keys.dtype == dtype
        assert torch.equal(found.keys, memory.keys)
        assert torch.equal(found.values, memory.values)
        assert replace(found, keys=memory.keys, values=memory.values) == memory


def test_plain_safetensors_tools_read_it(originals: Any) -> None:
    for path in originals[0]:
        with safe_open(path, framework="pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) > 0  # noqa: SIM118
        settings = settings_in(path)
        assert settings["format"] == artifact.FORMAT
        assert {"version", "base", "tokenizer", "compressor", "layout", "segments", "dtype", "codec", "sha256"} <= set(
            settings
        )


def test_the_same_memory_gives_the_same_bytes(fuzzing: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fuzzing.make_memory(3).save(tmp_path / name, "int4+ans")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(tmp_path.glob(".*")) == []


def test_every_flipped_bit_and_every_truncation_is_refused(originals: Any, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    for original in (originals[0][4], originals[0][10]):
        data = original.read_bytes()
        for place in range(len(data)):
            changed = bytearray(data)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            with pytest.raises(CompressorError):
                Memory.load(path, originals[1])
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            with pytest.raises(CompressorError, match="damaged"):
                Memory.load(path, originals[1])
        path.write_bytes(data + b"\0")
        with pytest.raises(CompressorError, match="checksum"):
            Memory.load(path, originals[1])


def test_thousands_of_mutants(fuzzing: ModuleType, tmp_path: Path) -> None:
    counts = fuzzing.fuzz(3000, 1, tmp_path)
    assert counts["damaged, refused"] > 1300
    assert "damaged, accepted" not in counts
    assert counts["signed again, refused"] > 800
    assert counts["signed again, accepted"] > 50  # the mutants are not all nonsense


HEADERS = {
    "most": (0, 10**12, "16", None),
    "shape": ([1 << 20, 2, 8], [1 << 20, 1 << 20, 1 << 20], [2, 2], [2, 2, -8], [2, 2, 1 << 62], "x"),
    "segments": ([], [[4, 0]], [[1 << 30, 5]], [[4, 5, 6]], [["4", 5]], None, {"a": 1}),
    "layout": ("sideways", None, 3),
    "codec": ({}, None, {"name": "int4"}),
    "base": ("x", None, {"name": 1, "weights": "a"}),
    "compressor": (3,),
    "format": (0, "2", True, 2.0, None),
}


@pytest.mark.parametrize("name", list(HEADERS))
def test_absurd_headers_are_refused_before_anything_is_allocated(
    name: str, originals: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in HEADERS[name]:
        path = edited(originals[0][4], tmp_path / "edited", **{name: value})
        with pytest.raises(CompressorError, match=r"damaged|layout|cannot hold"):
            Memory.load(path)


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    for length in (10**18, 200, 1):
        (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}" * 20)
        with pytest.raises(CompressorError, match="not a memory file"):
            Memory.load(tmp_path / "x")


def test_foreign_files_are_refused(tmp_path: Path, project: Path) -> None:
    with pytest.raises(CompressorError, match="does not exist"):
        Memory.load(tmp_path / "none")
    with pytest.raises(CompressorError, match="is a folder"):
        Memory.load(tmp_path)
    (tmp_path / "text").write_text("hello, this is no memory at all")
    with pytest.raises(CompressorError, match="not a memory file"):
        Memory.load(tmp_path / "text")
    save_file({"keys": torch.zeros(2), "values": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CompressorError, match="written by something else"):
        Memory.load(tmp_path / "other.safetensors")
    with pytest.raises(CompressorError, match="written by something else"):
        Memory.load(project / "models/arxiv-mini/compressor/adapter_model.safetensors")


def test_a_newer_format_says_to_update(originals: Any, tmp_path: Path) -> None:
    path = edited(originals[0][0], tmp_path / "x", format=artifact.FORMAT + 1)
    with pytest.raises(CompressorError, match=r"format 3, this version reads up to 2: update"):
        Memory.load(path)


def test_the_calibration_is_found_beside_the_memory_or_asked_for(originals: Any, tmp_path: Path) -> None:
    files, calibration = originals
    coded = shutil.copy(files[-1], tmp_path / "x.memory")
    with pytest.raises(CompressorError, match=rf"needs the calibration {calibration.digest[:12]}.*none was given"):
        Memory.load(coded)
    calibration.save(tmp_path / "calibration.safetensors")
    beside = Memory.load(coded)
    given = Memory.load(coded, tmp_path / "calibration.safetensors")
    assert torch.equal(beside.keys, given.keys)
    other = replace(calibration, passages=1)
    with pytest.raises(CompressorError, match="another was given"):
        Memory.load(coded, other)


def test_what_could_not_be_read_again_is_not_written(fuzzing: ModuleType, tmp_path: Path) -> None:
    wide = replace(fuzzing.make_memory(0), most=10**6)
    with pytest.raises(CompressorError, match="too large for a file"):
        wide.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_ledger_adds_up(originals: Any, fuzzing: ModuleType) -> None:
    for path, name in zip(originals[0], fuzzing.CODECS, strict=True):
        ledger = byte_ledger(path)
        assert sum(ledger.values()) == path.stat().st_size, name
        assert list(ledger) == ["header", "memory", "text"]
        assert ledger["memory"] > ledger["text"] == 0


def test_inspect(originals: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, calibration = originals
    assert cli(["inspect", str(files[5])]) == 0
    printed = capsys.readouterr().out
    for part in ("format 2", "tiny (weights aaaaaaaaaaaa)", "codec       int3+ans", "memory tokens", "123 bytes"):
        assert part in printed
    assert f"{files[5].stat().st_size:,}" in printed
    assert f"{files[5].stat().st_size / 123:.3f} bytes a byte of text" in printed
    calibration.save(tmp_path / "c.safetensors")
    assert cli(["inspect", str(tmp_path / "c.safetensors")]) == 0
    assert f"calibration {calibration.digest[:12]}, fitted on 64 passages" in capsys.readouterr().out
    (tmp_path / "text").write_text("no memory")
    assert cli(["inspect", "--file", str(tmp_path / "text")]) == 2
    assert "not a memory file (`compressor compress` writes one)" in capsys.readouterr().err
    assert cli(["inspect", str(tmp_path)]) == 2
    assert "is a folder and no store" in capsys.readouterr().err


def test_another_base_or_tokenizer_is_refused(
    tiny_compressor: Any, tiny_base_folder: Path, texts: list[str], from_scratch: Any
) -> None:
    base = tiny_compressor.base
    memory = signed(tiny_compressor.compress("We measure dust."), base, "tiny@1")
    check_base(memory, base)
    assert memory.base_name == tiny_base_folder.name
    with pytest.raises(CompressorError, match=r"another base \(tiny-base, weights"):
        check_base(replace(memory, base="f" * 64), base)

    class Other:
        name, fingerprint, tokenizer = base.name, base.fingerprint, from_scratch.train_tokenizer(texts[:50], 512)

    with pytest.raises(CompressorError, match="another tokenizer"):
        check_base(memory, Other())  # type: ignore[arg-type]


def test_memories_of_the_python_api_name_their_base_and_compressor(
    make_tiny_compressor: Any, tiny_base_folder: Path, make_family_base: Any, tmp_path: Path
) -> None:
    model = make_tiny_compressor()
    model.save_pretrained(tmp_path / "mine")
    model = Compressor.from_pretrained(tmp_path / "mine", base=model.base.name)
    sized = model.compress(["Dust."], target_fidelity=1e-9)
    for number, memory in enumerate([model.compress("We measure dust.", measure=False), *sized]):
        memory.save(tmp_path / f"{number}.memory")
        settings = settings_in(tmp_path / f"{number}.memory")
        assert settings["base"] == {"name": tiny_base_folder.name, "weights": model.base.fingerprint}
        assert settings["compressor"] == checkpoint.compressor_name(model, "mine")
        assert settings["tokenizer"] == fingerprints.tokenizer_fingerprint(model.base.tokenizer)
    with pytest.raises(CompressorError, match=r"another base \(tiny-base, weights"):
        Memory.load(tmp_path / "0.memory").to_cache(make_family_base("llama"))
    with torch.no_grad():
        model.encoder.memory_embeddings += 1  # trained on from Python: no longer the compressor that was loaded
    found = model.compress("We measure dust.", measure=False).compressor
    assert found == checkpoint.compressor_name(model, "mine") != memory.compressor


def test_fingerprints(make_tiny_compressor: Any, tiny_base_folder: Path) -> None:
    first, second = make_tiny_compressor(), make_tiny_compressor()
    other = make_tiny_compressor(seed=1)
    assert checkpoint.compressor_name(first, "/some/where/mini") == checkpoint.compressor_name(second, "mini")
    assert checkpoint.compressor_fingerprint(first) != checkpoint.compressor_fingerprint(other)
    tokenizer = first.base.tokenizer
    before = fingerprints.tokenizer_fingerprint(tokenizer)
    assert before == fingerprints.tokenizer_fingerprint(second.base.tokenizer)
    tokenizer.add_tokens(["naïve"])
    assert fingerprints.tokenizer_fingerprint(tokenizer) != before


def test_a_codec_object_and_its_name_write_the_same(fuzzing: ModuleType, tmp_path: Path) -> None:
    memory = fuzzing.make_memory(1)
    memory.save(tmp_path / "a", "int8")
    memory.save(tmp_path / "b", Codec.parse("int8"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
