"""Every command of docs/tasks.md runs, in its order, on small models."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compressor.commands.cli import evaluate_main
from compressor.commands.cli import main as cli
from compressor.data import speech
from compressor.data.instructions import preset_names
from compressor.methods import summary

TEXT = "Ada Lovelace met Charles Babbage in London. A new engine is proposed. It was tested on data of two kinds."


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Path) -> Path:
    """The files that the page names; what is said in a WAV file is heard without a recogniser."""

    def write(name: str, *rows: dict[str, Any]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("tldr.jsonl", {"text": TEXT, "targets": ["An engine."]}, {"text": TEXT[::-1], "targets": ["Nothing."]})
    write("pairs.jsonl", {"text": TEXT, "text2": "b", "label": 1}, {"text": "a b", "text2": "c", "label": 0})
    write("instructions.jsonl", {"passage": TEXT, "instruction": "List the people.", "answer": "Ada; Charles"})
    write("corpus.jsonl", {"text": TEXT})
    write("spans.jsonl", {"text": TEXT, "entities": [[0, 12, "PERSON"]]})
    write("questions.jsonl", {"id": "1", "context": TEXT, "question": "Who?", "answers": ["Ada Lovelace"]})
    (tmp_path / "conll.txt").write_text("Ada B-PER\nmet O\n")
    (tmp_path / "notes.txt").write_text(TEXT)
    for name in ("talk.wav", "question.wav"):
        (tmp_path / name).write_bytes(b"RIFF")
    (tmp_path / "configs").symlink_to(project / "configs")
    # Of packages and models that are not here: a pipeline's entities, and a summariser's words.
    spacy: Any = ModuleType("spacy")
    labelled = SimpleNamespace(ents=[SimpleNamespace(text="Ada Lovelace", label_="PERSON")])
    spacy.load = lambda name, exclude: SimpleNamespace(pipe=lambda texts: (labelled for _ in texts))
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setattr(summary, "load_summariser", lambda name, device: (None, None))
    monkeypatch.setattr(summary.Summary, "_written", lambda self, text: "An engine is proposed.")
    monkeypatch.setattr(speech, "transcribe", lambda path, named, device: f"{Path(path).stem} by {named}")
    return tmp_path


def test_the_page_names_every_preset(project: Path) -> None:
    page = (project / "docs" / "tasks.md").read_text()
    assert set(preset_names()) <= set(re.findall(r"`(\w+)`", page))


def test_commands_of_the_page_run(
    files: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base_folder: Path,
    make_tiny_compressor: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    make_tiny_compressor().save_pretrained(files / "checkpoint")
    make_tiny_compressor(method="sentence-embedding", layout="front", memory_tokens=4).save_pretrained(files / "se")
    small = ["--checkpoint", "checkpoint"]
    page = (project / "docs" / "tasks.md").read_text()
    lines = [line for block in re.findall(r"^```\n(.*?)^```", page, re.S | re.M) for line in block.splitlines()]
    base = ["--base", str(tiny_base_folder)]
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "python":
            sizes = [] if "--tokens" in arguments else ["--tokens", "4"]
            sizes = [one if one != "16" else "8" for one in [*arguments[1:], *sizes]]
            assert evaluate_main([*sizes, *small, "--limit", "2", "--resamples", "5"]) == 0, line
            continue
        assert program == "compressor"
        command = arguments[0]
        if command == "compress":
            arguments = [one if one != "16" else "8" for one in arguments] + [*small, "--no-measure"]
        elif command == "ask" or (command in ("pack", "unpack") and "embedding" not in line):
            arguments += base
        elif command in ("pack", "unpack"):
            arguments += ["--checkpoint", "se"]
        assert cli(arguments) == 0, (line, capsys.readouterr().err)
    sent = bytes.fromhex((files / "summary.hex").read_text())
    assert sent[0] == 0xCD
    assert (files / "summary.txt").read_text().startswith("Ada Lovelace met Charles Babbage in London.")
    assert (files / "seq2seq.txt").read_text().startswith("An engine is proposed.")
    assert (files / "talk.txt").read_text() == "talk by whisper-tiny.en\n"
