"""Collections of memories: built, killed, resumed, appended to, read one at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.commands.cli import main as cli
from compressor.errors import CompressorError
from compressor.model.memory import Memory, Segment
from compressor.storage.codec import Codec
from compressor.storage.collection import Collection, CollectionWriter, missing
from compressor.storage.fitting import calibrate

# `compressor`, which is killed while the second shard has its temporary name.
_DYING = """
import os, signal, sys
sys.path.insert(0, {project!r})
from compressor.commands.cli import main
honest, written = os.replace, []
def replace(source, target):
    if "shard-" in str(target):
        written.append(target)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    honest(source, target)
os.replace = replace
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny compressor on disk."""
    from compressor.api import Compressor
    from compressor.model.base import load_base
    from compressor.model.config import BaseConfig, CompressorConfig

    base = load_base(BaseConfig(path=str(tiny_base_folder)))
    settings = CompressorConfig(memory_tokens=4, lora_rank=2, lora_alpha=4.0, max_passage_tokens=64)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    Compressor(base, settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def passages(texts: list[str]) -> list[dict[str, str]]:
    return [{"id": f"paper/{i}", "text": text[:200]} for i, text in enumerate(texts[:12])]


def write_corpus(path: Path, passages: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    return str(path)


def made(seed: int) -> Memory:
    pair = torch.randn(2, 2, 2, 3, 4, generator=torch.Generator().manual_seed(seed))
    return Memory(pair[0], pair[1], (Segment(3, 20),), "nested", 4, "a" * 64)


def small(folder: Path, count: int = 5, codec: str = "int8") -> Collection:
    """A collection of `count` memories in shards of two."""
    writer = CollectionWriter(folder, Codec.parse(codec))
    writer.begin(made(0))
    for start in range(0, count, 2):
        numbers = range(start, min(start + 2, count))
        writer.write([f"n{i}" for i in numbers], [f"text {i}" for i in numbers], [made(i) for i in numbers])
    return Collection(folder)


@pytest.mark.parametrize("codec", ["float32", "int8", "int4+ans"])
def test_a_memory_by_its_id(codec: str, tmp_path: Path) -> None:
    collection = small(tmp_path / "c", codec=codec)
    assert (len(collection), list(collection)) == (5, ["n0", "n1", "n2", "n3", "n4"])
    assert "n3" in collection
    assert "n5" not in collection
    for i in (3, 0, 4):
        made(i).save(tmp_path / "alone", codec)
        alone, found = Memory.load(tmp_path / "alone"), collection.load(f"n{i}")
        assert torch.equal(found.keys, alone.keys)
        assert torch.equal(found.values, alone.values)
        assert (found.segments, found.base, found.most) == (alone.segments, alone.base, alone.most)
    with pytest.raises(CompressorError, match=r"no memory 'n9' among 5 \(n0, n1, n2"):
        collection.load("n9")


def test_one_memory_is_loaded_without_reading_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CollectionWriter(tmp_path / "c", Codec.parse("float32"))
    writer.begin(made(0))
    shard = writer.write([str(i) for i in range(40)], ["x"] * 40, [made(i) for i in range(40)])
    collection = Collection(tmp_path / "c")
    read = []

    class Counting:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def read(self, count: int) -> bytes:
            read.append(count)
            return self.file.read(count)

    import compressor.storage.collection as module

    monkeypatch.setattr(
        module,
        "open",
        lambda *arguments: Counting(open(*arguments)),  # noqa: SIM115
        raising=False,
    )
    found = collection.load("17")
    assert torch.equal(found.keys, made(17).keys)
    assert sum(read) == found.nbytes < shard.stat().st_size / 30


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    collection = small(tmp_path / "c", codec="float32")
    with safe_open(collection.place("n2").shard, framework="pt") as file:
        assert torch.equal(file.get_tensor("0.keys"), made(2).keys)


def test_damage_is_found_where_it_matters(tmp_path: Path) -> None:
    collection = small(tmp_path / "c")
    shard = collection.place("n1").shard
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:header])
    place = header + entries["1.payload"]["data_offsets"][0] + 3
    shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    hurt = Collection(tmp_path / "c")
    assert torch.equal(hurt.load("n0").keys, collection.load("n0").keys)
    with pytest.raises(CompressorError, match="checksum of memory 'n1' does not match"):
        hurt.load("n1")
    for changed in (data[:-1], data[: header // 2], data.replace(b"n1", b"n7"), data[:8], b""):
        shard.write_bytes(changed)
        with pytest.raises(CompressorError, match="damaged"):
            Collection(tmp_path / "c")
    shard.write_bytes(data)
    whole = {name: collection.load(name).keys for name in ("n0", "n1")}
    for place in range(8, header, 5):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        try:
            hurt = Collection(tmp_path / "c")
            same = [torch.equal(hurt.load(name).keys, keys) for name, keys in whole.items()]
        except CompressorError:
            continue
        assert all(same)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="not a collection"):
        Collection(tmp_path)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CompressorError, match="holds other files"):
        CollectionWriter(tmp_path, Codec.parse("int8")).begin(made(0))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    small(tmp_path / "c")
    for example, codec, what in (
        (made(0), "int4", "codec.name: int8, now int4"),
        (replace(made(0), base="b" * 64), "int8", "base.weights: aaaaaaaaaaaa, now bbbbbbbbbbbb"),
        (replace(made(0), compressor="other@1"), "int8", "compressor: , now 1"),
        (replace(made(0), made={"refine_steps": 10}), "int8", "made.refine_steps: not recorded, now 10"),
    ):
        with pytest.raises(CompressorError, match=rf"a collection made with other settings \({what}\)"):
            CollectionWriter(tmp_path / "c", Codec.parse(codec)).begin(example)
    # Other names of the same base and compressor are no other settings.
    named = replace(made(0), base_name="elsewhere", compressor="renamed@")
    CollectionWriter(tmp_path / "c", Codec.parse("int8")).begin(named)


def test_ids_name_one_text_each(tmp_path: Path) -> None:
    collection = small(tmp_path / "c", count=2)
    assert missing(collection, ["n0", "n1", "n2"], ["text 0", "text 1", "text 2"]) == [2]
    with pytest.raises(CompressorError, match="'n1' that was made from another text"):
        missing(collection, ["n1"], ["text 3"])
    with pytest.raises(CompressorError, match="'n5' occurs twice"):
        missing(collection, ["n5", "n5"], ["a", "b"])


def test_the_command_resumes_after_sigkill_and_appends(
    checkpoint: Path, passages: list[dict[str, str]], tmp_path: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, folder = write_corpus(tmp_path / "corpus.jsonl", passages[:9]), tmp_path / "memories"
    script = tmp_path / "dying.py"
    script.write_text(_DYING.format(project=str(project)))
    options = [corpus, "-o", str(folder), "--checkpoint", str(checkpoint), "--codec", "int8", "--shard_size", "2"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    died = subprocess.run(
        [sys.executable, str(script), "compress", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    before = Collection(folder)
    assert len(before) == 2
    assert any(path.name.startswith(".shard-") for path in folder.iterdir())  # what it was writing
    kept = before.place("paper/0").shard.read_bytes()

    assert cli(["compress", *options]) == 0
    assert "compressed 7 passages, 2 were there already" in capsys.readouterr().out
    after = Collection(folder)
    assert sorted(after) == sorted(passage["id"] for passage in passages[:9])
    assert after.place("paper/0").shard.read_bytes() == kept
    assert not any(path.name.startswith(".") for path in folder.iterdir())

    from compressor.api import Compressor

    model = Compressor.from_pretrained(checkpoint)
    for passage in passages[:9]:
        wanted, found = model.compress(passage["text"]), after.load(passage["id"])
        assert found.segments == wanted.segments
        assert found.compressor.startswith("tiny@")
        error = (found.values - wanted.values).square().mean() / wanted.values.square().mean()
        assert float(error) < 1e-3

    corpus = write_corpus(tmp_path / "longer.jsonl", passages)
    assert cli(["compress", corpus, *options[1:]]) == 0
    assert "compressed 3 passages, 9 were there already" in capsys.readouterr().out
    assert len(Collection(folder)) == 12
    assert cli(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "collection of 12 memories in 7 shards" in printed
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert f"{total:,}" in printed

    text = ["regenerate", "--memory", str(folder), "--base", model.base.name]
    assert cli(text) == 2
    assert "say which memory with --id" in capsys.readouterr().err
    assert cli([*text, "--id", "paper/11"]) == 0


def test_a_calibrated_collection_carries_its_calibration(
    checkpoint: Path, passages: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compressor.api import Compressor
    from compressor.model.checkpoint import compressor_name

    model = Compressor.from_pretrained(checkpoint)
    ids = model.base.tokenizer([passage["text"] for passage in passages], add_special_tokens=False)["input_ids"]
    fitted = calibrate(model, ids, sensitivity_passages=4, compressor_name=compressor_name(model, str(checkpoint)))
    fitted.save(tmp_path / "fitted.safetensors")
    corpus, folder = write_corpus(tmp_path / "corpus.jsonl", passages[:3]), tmp_path / "memories"
    options = ["--checkpoint", str(checkpoint), "--codec", "lowrank:2"]
    options += ["--calibration", str(tmp_path / "fitted.safetensors")]
    assert cli(["compress", corpus, "-o", str(folder), *options]) == 0
    (tmp_path / "fitted.safetensors").unlink()
    found, wanted = Collection(folder).load("paper/1"), model.compress(passages[1]["text"])
    error = (found.values - wanted.values).square().mean() / wanted.values.square().mean()
    assert float(error) < 0.05
    assert f"calibration {fitted.digest[:12]}" in capsys.readouterr().out


def test_calibrate_and_a_single_text(
    checkpoint: Path, passages: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, fitted = write_corpus(tmp_path / "corpus.jsonl", passages), tmp_path / "fitted.safetensors"
    mine = ["--checkpoint", str(checkpoint)]
    assert cli(["calibrate", corpus, "-o", str(fitted), "--sensitivity", "4", "--lengths", "16", "40", *mine]) == 0
    assert "fitted on 12 passages" in capsys.readouterr().out
    note, memory = tmp_path / "note.txt", tmp_path / "note.memory"
    note.write_text(passages[0]["text"])
    given = ["--codec", "lowrank:1+range", "--calibration", str(fitted), *mine]
    assert cli(["compress", str(note), "-o", str(memory), *given]) == 0
    assert cli(["inspect", str(memory)]) == 0
    printed = capsys.readouterr().out
    assert "lowrank+range" in printed
    assert f"{len(passages[0]['text'].encode()):,}" in printed
    assert cli(["compress", str(note), "-o", str(memory), *given]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli(["compress", corpus, "-o", str(memory), *given]) == 2
    assert "is a file" in capsys.readouterr().err
    base = json.loads((checkpoint / "compressor.json").read_text())["base"]["path"]
    assert cli(["regenerate", "--memory", str(memory), "--calibration", str(fitted), "--base", base]) == 0
    assert cli(["regenerate", "--memory", str(memory), "--base", base]) == 2
    assert "needs the calibration" in capsys.readouterr().err


@pytest.fixture(scope="module")
def built(checkpoint: Path, passages: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a collection of it, made with 4 memory tokens, a refinement step and segments of at most 32."""
    folder = tmp_path_factory.mktemp("built")
    write_corpus(folder / "corpus.jsonl", passages[:3])
    assert cli(["compress", *_compressed(folder, checkpoint)]) == 0
    return folder


def _compressed(folder: Path, checkpoint: Path, **changed: Any) -> list[str]:
    settings = {"refine_steps": 1, "segment_tokens": 32, "codec": "int8", "checkpoint": checkpoint} | changed
    return [str(folder / "corpus.jsonl"), f"--output={folder / 'c'}", *(f"--{k}={v}" for k, v in settings.items())]


OTHERWISE = {
    "fewer tokens": ({"tokens": 2}, "made.tokens: 4, now 2"),
    "more refinement": ({"refine_steps": 3}, "made.refine_steps: 1, now 3"),
    "no refinement": ({"refine_steps": 0}, "made.refine_steps: 1, now 0"),
    "shorter segments": ({"segment_tokens": 8}, "made.segment_tokens: 32, now 8"),
    "a fidelity": ({"target_fidelity": 0.5}, "made.target_fidelity: not recorded, now 0.5"),
    "kept texts": ({"keep_text": True}, "made.keep_text: not recorded, now 1"),
    "another codec": ({"codec": "int4+ans"}, "codec.coder: none, now ans, codec.name: int8, now int4"),
    "a dropped layer": ({"drop_layers": "[1]"}, r"codec.drop_layers: \[\], now \[1\]"),
}


@pytest.mark.parametrize("what", list(OTHERWISE))
def test_a_collection_goes_on_only_as_it_was_made(
    built: Path, checkpoint: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, message = OTHERWISE[what]
    before = {path.name: path.read_bytes() for path in (built / "c").iterdir()}
    assert cli(["compress", *_compressed(built, checkpoint, **changed)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert before == {path.name: path.read_bytes() for path in (built / "c").iterdir()}


def test_a_collection_says_how_and_from_what_it_was_made(
    built: Path, checkpoint: Path, passages: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built, folder)
    write_corpus(folder / "corpus.jsonl", passages[:4])
    assert cli(["compress", *_compressed(folder, checkpoint, no_measure=True)]) == 0
    printed = capsys.readouterr().out
    assert "compressed 1 passages, 3 were there already" in printed
    assert "tokens 4, segment_tokens 32, refine_steps 1" in printed
    assert re.search(r"from corpus.jsonl *3 records \w{12}; 4 records", printed)
    collection = Collection(folder / "c")
    assert set(collection.fidelities()) == {passage["id"] for passage in passages[:3]}
    memory = collection.load("paper/0")
    assert memory.made == {"tokens": 4, "segment_tokens": 32, "refine_steps": 1}
    assert memory.fidelity == collection.fidelities()["paper/0"]


@pytest.mark.slow
def test_two_processes_share_the_work(
    checkpoint: Path, passages: list[dict[str, str]], tmp_path: Path, project: Path
) -> None:
    corpus, folder = write_corpus(tmp_path / "corpus.jsonl", passages), tmp_path / "memories"
    launcher = (
        "-m accelerate.commands.accelerate_cli launch --config_file configs/accelerate/cpu.yaml --num_processes 2"
    )
    command = [
        sys.executable,
        *launcher.split(),
        "--main_process_port",
        "0",
        "-m",
        "compressor",
        "compress",
        corpus,
    ]
    options = ["-o", str(folder), "--checkpoint", str(checkpoint), "--codec", "int8", "--shard_size", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *options], cwd=project, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compressed 12 passages, 0 were there already") == 1
    collection = Collection(folder)
    assert len(collection) == 12
    writers = {name.stem.split("-")[-1] for name in folder.glob("shard-*")}
    assert writers == {"00", "01"}
