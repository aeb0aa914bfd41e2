"""Every writer against every obstacle: what it may replace, and what it says of what it cannot write."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.commands.cli import main as cli
from compressor.commands.pack import run as pack
from compressor.data.builders.arxivqa import ArxivQAConfig, build_questions
from compressor.data.builders.choice import CorpusConfig
from compressor.data.builders.corpora import build_corpus
from compressor.errors import CompressorError
from compressor.evaluation.report import loss_curve
from compressor.evaluation.runner import output_folder
from compressor.evaluation.settings import RegenerationSettings
from compressor.files import atomic_file, atomic_folder, write_json
from compressor.model.checkpoint import CHECKPOINT
from compressor.storage import container

PASSAGE = "We study the conductivity of thin films at low temperature."
Write = Callable[[Path], None]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of the writers."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "a.txt").write_text(PASSAGE)
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 3.0, "passages": 8}\n')
    abstract = (
        "In paper {0} we propose Method{0}X, a framework for nothing in particular, and we show that it is 1{0}.5% "
        "better than what was there before it on twelve well known data sets."
    )
    rows = [{"id": f"a{i}", "title": "T", "abstract": abstract.format(i), "date": "2023-12-15"} for i in range(3)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def writers(material: Path, make_tiny_compressor: Callable[..., Any], tiny_base_folder: Path) -> dict[str, Write]:
    """Writers by name; each replaces what it may, and raises a `CompressorError`, or exits with 1 or 2."""

    def run(command: Callable[[list[str]], int], *arguments: str) -> None:
        if status := command([str(argument) for argument in arguments]):
            raise CompressorError(f"status {status}")

    def packed(path: Path) -> None:
        run(lambda argv: pack(argv), "-f", "-o", path, "--base", tiny_base_folder, material / "a.txt")

    def compressed(path: Path) -> None:
        model = ["--checkpoint", checkpoint, "--base", tiny_base_folder, "--tokens", "2", "--no-measure"]
        run(cli, "compress", material / "a.txt", "-o", path, "--overwrite", *model)

    def evaluated(path: Path) -> None:
        config = RegenerationSettings(output=str(path))
        with output_folder(config, {"rows": [], "figures": [], "notes": []}):
            pass

    def corpus(path: Path) -> None:
        build_corpus(CorpusConfig(source=str(material / "corpus.jsonl"), output=str(path)), overwrite=True)

    def questions(path: Path) -> None:
        config = ArxivQAConfig(source=str(material / "corpus.jsonl"), output=str(path))
        build_questions(config, overwrite=True)

    model = make_tiny_compressor()
    memory, checkpoint = model.compress(PASSAGE), material / "checkpoint"
    model.save_pretrained(checkpoint)
    return {
        "json": lambda path: write_json(path, {"a": 1}),
        "container": lambda path: container.write(path, b"bytes"),
        "memory": memory.save,
        "plot": lambda path: loss_curve([material / "log.jsonl"], ["run"], path),
        "pack": packed,
        "compress": compressed,
        "checkpoint": model.save_pretrained,
        "evaluation": evaluated,
        "corpus": corpus,
        "questions": questions,
    }


FILES = ("json", "container", "memory", "plot", "pack", "compress")
FOLDERS = ("checkpoint", "evaluation", "corpus", "questions")


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of the files below a folder, by path; what is temporary has a leading dot."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=FILES)
def write_file(request: pytest.FixtureRequest, writers: dict[str, Write]) -> Write:
    return writers[request.param]


@pytest.fixture(params=FOLDERS)
def write_folder(request: pytest.FixtureRequest, writers: dict[str, Write]) -> Write:
    return writers[request.param]


@pytest.fixture(params=(*FILES, *FOLDERS))
def write(request: pytest.FixtureRequest, writers: dict[str, Write]) -> Write:
    return writers[request.param]


def test_a_file_does_not_replace_a_folder(write_file: Write, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    (target / "below").mkdir(parents=True)
    (target / "below" / "thesis.tex").write_text("...")
    with pytest.raises(CompressorError):
        write_file(target)
    assert tree(tmp_path) == {"out.png/below/thesis.tex": b"..."}
    empty = tmp_path / "empty.png"
    empty.mkdir()
    with pytest.raises(CompressorError):
        write_file(empty)
    assert empty.is_dir()


def test_a_folder_does_not_replace_a_file_or_a_fifo(write_folder: Write, tmp_path: Path) -> None:
    target, pipe = tmp_path / "out", tmp_path / "pipe"
    target.write_text("thesis")
    os.mkfifo(pipe)
    for path in (target, pipe):
        with pytest.raises(CompressorError, match="a folder does not replace it"):
            write_folder(path)
    assert target.read_text() == "thesis"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_with_strangers_files_stays(write_folder: Write, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("...")
    with pytest.raises(CompressorError):
        write_folder(target)
    assert tree(tmp_path) == {"out/thesis.tex": b"..."}


def test_own_output_is_replaced(write: Write, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    write(target)
    before = tree(target) if target.is_dir() else target.read_bytes()
    write(target)
    after = tree(target) if target.is_dir() else target.read_bytes()
    assert len(after) >= len(before) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_own_output_with_a_strangers_file_in_it_stays(write_folder: Write, tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_folder(target)
    (target / "notes").mkdir()
    (target / "notes" / "thesis.tex").write_text("...")
    before = tree(tmp_path)
    with pytest.raises(CompressorError):
        write_folder(target)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before


def test_a_link_is_followed(write: Write, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, real = tmp_path / "link.png", tmp_path / "real" / "file.png"
    link.symlink_to(real)
    for _ in range(2):  # at first it leads to nothing
        write(link)
        assert link.is_symlink()
        assert real.exists()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["file.png"]


def test_a_fifo_is_written_to(write_file: Write, tmp_path: Path) -> None:
    pipe, plain, read = tmp_path / "pipe.png", tmp_path / "plain.png", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_file(pipe)
    reader.join(10)
    write_file(plain)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert read == [plain.read_bytes()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_device_stays_a_device(write_file: Write, tmp_path: Path) -> None:
    write_file(Path("/dev/null"))
    with pytest.raises(CompressorError):
        write_file(Path("/dev/full"))
    for name in ("null", "full"):
        assert stat.S_ISCHR(os.stat(f"/dev/{name}").st_mode)


def test_a_write_protected_file_stays(write_file: Write, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    target.write_text("thesis")
    target.chmod(0o444)
    with pytest.raises(CompressorError):
        write_file(target)
    assert target.read_text() == "thesis"


@pytest.mark.skipif(not Path("/sys").exists(), reason="there is no folder that nobody may write to")
def test_a_folder_that_takes_no_files_is_named(write: Write) -> None:
    with pytest.raises(CompressorError):
        write(Path("/sys/out.png"))


def test_a_missing_parent_is_made_and_a_file_as_parent_named(
    write: Write, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "file").write_text("thesis")
    with pytest.raises(CompressorError, match=r"file|status"):
        write(tmp_path / "file" / "out.png")
    assert (tmp_path / "file").read_text() == "thesis"
    target = tmp_path / "a" / "b" / "out.png"
    if "pack" in request.node.name:  # as gzip does
        with pytest.raises(CompressorError):
            write(target)
    else:
        write(target)
        assert target.exists()


def test_a_private_file_stays_private(write_file: Write, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    target = tmp_path / "out.png"
    target.write_text("old")
    target.chmod(0o600)
    write_file(target)
    if "pack" not in request.node.name:  # which gives its output the input's permissions, as gzip does
        assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_names_are_taken_where_rename_replaces_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On Windows rename() fails where the name is taken; replace() does not, for files.
    rename = os.rename

    def strict(source: Any, target: Any, **options: Any) -> None:
        if os.path.lexists(target):
            raise FileExistsError(17, "File exists", str(source), None, str(target))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", strict)
    for _ in range(2):
        write(tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_what_is_read_is_not_written_over(writers: dict[str, Write], material: Path, tmp_path: Path) -> None:
    before = (material / "a.txt").read_bytes()
    link = tmp_path / "link"
    link.symlink_to(material / "a.txt")
    for name in ("pack", "compress"):
        for path in (material / "a.txt", link):
            with pytest.raises(CompressorError):
                writers[name](path)
    assert (material / "a.txt").read_bytes() == before
    writers["corpus"](tmp_path / "corpus")
    before_tree = tree(tmp_path)
    config = CorpusConfig(source=str(tmp_path / "corpus"), output=str(tmp_path / "corpus"))
    with pytest.raises(CompressorError, match="would be replaced"):
        build_corpus(config, overwrite=True)
    assert tree(tmp_path) == before_tree


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with atomic_folder(target, CHECKPOINT) as path:
        (path / "compressor.json").write_text("old")
    rename = os.rename

    def failing(source: Any, to: Any) -> None:
        if os.fspath(to) == os.fspath(target) and "replaced" not in os.fspath(source):
            raise OSError(5, "Input/output error")
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)

    def replaced() -> None:
        with atomic_folder(target, CHECKPOINT) as path:
            (path / "compressor.json").write_text("new")

    with pytest.raises(CompressorError, match=r"Input/output error\); what was there is unchanged"):
        replaced()
    assert tree(tmp_path) == {"out/compressor.json": b"old"}


def test_a_failed_block_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")

    def failed() -> None:
        with atomic_file(target) as path:
            path.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        failed()
    assert tree(tmp_path) == {"out": b"old"}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_limit_on_sizes_is_told_and_keeps_what_was_there(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    import resource

    target = tmp_path / "out.png"
    write(target)
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(CompressorError) as raised:
            write(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = f"{raised.value}{capsys.readouterr().err}"
    assert f"{target.name} could not be written (File too large)" in said
    assert "what was there is unchanged: free some space" in said
    assert tree(tmp_path) == before


def test_a_run_that_cannot_write_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, training_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    from compressor.commands.cli import train_main

    argv = [*training_options, f"--output={tmp_path}", "--training.checkpoint_every=2"]
    assert train_main([*argv, "--training.steps=2"]) == 0
    before = tree(tmp_path / "checkpoints")
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # the log fits in, a checkpoint does not
    try:
        status = train_main([*argv, "--training.steps=4", "--training.resume=true"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert status == 2
    assert "step-0000004 could not be written (File too large); the checkpoint of step 2 is whole: free some" in said
    assert "then go on with --training.resume" in said
    assert tree(tmp_path / "checkpoints") == before
