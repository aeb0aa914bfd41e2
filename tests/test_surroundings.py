"""What the environment must not decide: settings, encodings, proxies, a home without room."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.api import Compressor
from compressor.commands.cli import train_main
from compressor.errors import CompressorError
from compressor.model.memory import Memory
from compressor.model.refinement import refine
from compressor.processes import make_accelerator


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "eager"),
    ],
)
def test_accelerates_variables_decide_nothing(
    name: str,
    value: str,
    tmp_path: Path,
    training_options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    options = [
        *training_options,
        "--training.steps=1",
        "--training.gradient_accumulation_steps=2",
        "--training.log_every=1",
    ]
    assert train_main([*options, f"--output={tmp_path / 'with'}"]) == 0
    assert f"note: {name}={value} is ignored" in capsys.readouterr().err
    assert os.environ[name] == value
    monkeypatch.delenv(name)
    assert train_main([*options, f"--output={tmp_path / 'without'}"]) == 0
    assert "ignored" not in capsys.readouterr().err

    def figures(run: str) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert figures("with") == figures("without")


def test_other_ways_of_sharing_a_model_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(CompressorError, match=r"ACCELERATE_USE_DEEPSPEED is set.*ZeRO-3 shares out what fsdp2\.yaml"):
        make_accelerator()


def test_text_files_are_opened_with_their_encoding(project: Path) -> None:
    sources = [path for folder in ("compressor", "runs", "benchmarks") for path in (project / folder).rglob("*.py")]
    without = []
    for path in sources:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
                continue
            name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
            module = getattr(getattr(call.func, "value", None), "id", "")
            if name not in ("open", "read_text", "write_text", "fdopen") or (
                name == "open" and module in ("os", "gzip", "Store", "self", "wave", "zipfile")
            ):
                continue
            if name == "read_text" and isinstance(call.func, ast.Name):  # a reader of our own
                continue
            constants = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            binary = any(isinstance(value, str) and "b" in value and len(value) < 4 for value in constants)
            if not binary and not any(keyword.arg == "encoding" for keyword in call.keywords):
                without.append(f"{path.relative_to(project)}:{call.lineno}")
    assert not without


def test_records_are_utf_8_in_a_locale_without_it(project: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from compressor.files import read_json, write_json; from compressor.provenance import run_record\n"
        "record = run_record(0) | {'name': '\\u0141\\xf3d\\u017a'}\n"
        "write_json(sys.argv[1], record); assert read_json(sys.argv[1]) == record"
    )
    environment = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONPATH": str(project)}
    target = tmp_path / "run.json"
    command = [sys.executable, "-c", code, str(target), "--data.train=Łódź.jsonl"]
    subprocess.run(command, env=os.environ | environment, check=True, timeout=120)
    written = json.loads(target.read_bytes().decode("utf-8"))
    assert written["name"] == "Łódź"
    assert written["command"][-1] == "--data.train=Łódź.jsonl"


def test_the_commit_is_this_checkouts_in_a_hook_of_another(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.provenance import commit

    before = commit()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert commit() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that nobody may write to")
def test_a_home_that_cannot_be_written_is_worked_around(project: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "We study thin films."}\n', encoding="utf-8")
    code = (
        "import sys; from compressor.streams import exits_cleanly\n"
        "@exits_cleanly\n"
        "def main():\n"
        "    from compressor.data.records import load_texts\n"
        "    print(len(load_texts(sys.argv[1])))\n"
        "sys.exit(main())"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": "/proc/self", "TMPDIR": str(tmp_path), "PYTHONPATH": str(project)}
    command = [sys.executable, "-c", code, str(tmp_path / "corpus.jsonl")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert done.stderr.startswith("note: /proc/self/.cache/huggingface cannot be written: caches are in ")
    assert done.stderr.count("note: ") == 1
    assert str(tmp_path) in done.stderr


def test_the_page_asks_itself_without_the_proxy(
    make_tiny_compressor: Callable[..., Any], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2

    from compressor.commands.web import page, reach_this_machine

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    reach_this_machine()
    assert os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    made = page(make_tiny_compressor(), tmp_path, texts[0][:100])
    _, url, _ = made.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, inbrowser=False)
    try:
        assert httpx2.get(url, timeout=30).status_code == 200
    finally:
        made.close()
        monkeypatch.delenv("no_proxy", raising=False)


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(
    make_tiny_compressor: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_compressor()
    model.save_pretrained(tmp_path / "checkpoint")
    model.compress("We study thin films.").save(tmp_path / "memory")

    def denied(path: Any, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    for name in (
        "compressor.model.checkpoint.sha256",
        "compressor.storage.container.open",
        "compressor.files.Path.read_text",
    ):
        with monkeypatch.context() as patched:
            patched.setattr(name, denied, raising=False)
            with pytest.raises(
                CompressorError, match=r"cannot be opened \(Permission denied\): it may be whole"
            ) as raised:
                Memory.load(tmp_path / "memory") if "open" in name else model.load_trainable(tmp_path / "checkpoint")
            assert "damaged" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passages": None}, "the passage is NoneType, not text"),
        ({"passages": Path("notes.txt")}, "the passage is a path"),
        ({"passages": ["a", Path("notes.txt")]}, "the passage 1 is a path"),
        ({"passages": [None]}, "the passage is NoneType, not text"),
        ({"passages": b"bytes"}, "not text"),
        ({"passages": "a \ud83d b"}, "holds half of a surrogate pair at character 2"),
        ({"passages": "a", "tokens": 4.0}, "tokens = 4.0 is not a whole number"),
        ({"passages": "a", "tokens": True}, "tokens = True is not a whole number"),
        ({"passages": "a", "tokens": 0}, "0 memory tokens"),
        ({"passages": "a", "batch_size": 0}, "batch_size = 0 is out of range: it must be at least 1"),
        ({"passages": "a", "segment_tokens": 2.5}, "segment_tokens = 2.5 is not a whole number"),
        ({"passages": "a", "refine_steps": -1}, "refine_steps = -1 is out of range"),
        ({"passages": "a", "target_fidelity": "0.5"}, "target_fidelity = '0.5' is out of range"),
    ],
)
def test_what_the_api_cannot_take_is_told_in_its_own_words(
    tiny_compressor: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompressorError, match=message):
        tiny_compressor.compress(**arguments)


def test_what_the_api_cannot_take_of_a_memory(tiny_compressor: Any, tmp_path: Path) -> None:
    from compressor.model import generation
    from compressor.storage.codec import Codec

    model, file = tiny_compressor, tmp_path / "a.memory"
    memory = model.compress("We study thin films.")
    memory.save(file)
    written = file.read_bytes()
    ids = model.base.tokenizer("We study thin films.")["input_ids"]
    for wrong, message in (
        (lambda: memory.truncate(2.0), "tokens = 2.0 is not a whole number"),
        (lambda: model.regenerate(memory, batch_size=0), "batch_size = 0"),
        (lambda: model.regenerate(None), "got NoneType, not a memory"),
        (lambda: model.regenerate("notes.memory"), "got str, not a memory"),
        (lambda: model.regenerate(memory, sampling=0.5), "sampling is float: give a Sampling"),
        (lambda: model.answer(["a.memory"], ["What?"]), "got str, not a memory"),
        (lambda: model.answer(memory, None), "the question is NoneType, not text"),
        (lambda: model.answer(memory, "\udc80?"), "the question holds half of a surrogate pair"),
        (lambda: model.answer(memory, "What?", limit="3"), "limit = '3' is not a whole number"),
        (lambda: model.answer(memory, "What?", limit=0), "limit = 0 is out of range"),
        (lambda: model.answer(memory, "What?", template=None), "question template is NoneType, not text"),
        (lambda: refine(model.base, [memory], [], 1), "got 1 memories and 0 passages"),
        (lambda: model.compress_ids(None), "passages is NoneType"),
        (lambda: model.compress_ids(ids), "passage 0 is int"),
        (lambda: model.compress_ids(["We study"]), "a token of passage 0 = 'W' is not a whole number"),
        (lambda: model.compress_ids([[1.5]]), "a token of passage 0 = 1.5 is not a whole number"),
        (lambda: model.compress_ids([ids, [512]]), "a token of passage 1 = 512 is out of range: it must be 0 to 511"),
        (lambda: model.compress_ids([[-1]]), "a token of passage 0 = -1 is out of range"),
        *((lambda path=path: memory.save(path), r"is NoneType|is int|is bytes") for path in (None, 3, b"a")),
        *((lambda path=path: Memory.load(path), r"is NoneType|is int|is Memory") for path in (None, 3, memory)),
        *((lambda use=use: use("a\0b"), "holds a NUL") for use in (memory.save, Memory.load, model.save_pretrained)),
        (lambda: model.save_pretrained(None), "the path is NoneType"),
        (lambda: model.load_trainable(None), "the path is NoneType"),
        (lambda: Compressor.from_pretrained(3), "the path is int"),
        (lambda: model.save_pretrained(tmp_path / "c", dtype="bfloat16"), "dtype = 'bfloat16' is out of range"),
        (lambda: model.save_pretrained(tmp_path / "c", dtype=torch.int8), "dtype = torch.int8 is out of range"),
        (lambda: Compressor.from_pretrained(file.parent, base=3), "is not a compressor checkpoint"),
        *(
            (lambda codec=codec: memory.save(file, codec), "codec is")
            for codec in (8, 0.25, True, torch.bfloat16, ["a"])
        ),
        (lambda: Codec.parse(None), "codec is NoneType, not text"),
        (lambda: Codec.parse("int4", 3), "the path is int"),
        (lambda: memory.save(file, passage_bytes=-1), "passage_bytes = -1 is out of range"),
        (lambda: memory.to("bogus"), "device 'bogus' cannot be used here"),
        (lambda: memory.to(dtype="bfloat16"), "dtype = 'bfloat16' is out of range: it must be a floating-point"),
        (lambda: memory.to(dtype=torch.int8), "dtype = torch.int8 is out of range"),
        (lambda: memory.to([1]), "device .* cannot be used here"),
        (lambda: memory.to_cache(None), "the base is NoneType: give the Base"),
        (lambda: memory.to_cache(model), "the base is .*: give the Base"),
        (lambda: Memory.concatenate("ab"), "got str, not a memory"),
        (lambda: Memory.concatenate(memory), "got one memory"),
        (lambda: Memory(None, None, (), "nested", 8, ""), "keys are NoneType"),
        (lambda: generation.Sampling("warm"), "temperature = 'warm'"),
        (lambda: generation.Sampling(seed=None), "seed = None"),
        (lambda: generation.Sampling(top_k=1.5), "top_k = 1.5"),
    ):
        with pytest.raises(CompressorError, match=message):
            wrong()
    assert file.read_bytes() == written
    # What numpy counts with, and paths, are as good as int and str.
    model.compress("We study thin films.", np.int64(4)).save(str(file))
    assert Memory.load(str(file)).tokens == 4


def test_a_table_says_that_its_tokens_are_of_each_segment() -> None:
    from compressor.evaluation.items import Item
    from compressor.evaluation.notes import segment_notes

    items = [Item("a", [1] * 90), Item("b", [1] * 100), Item("c", [1] * 101), Item("d", [1] * 250)]
    (note,) = segment_notes(items, 100)
    assert note.startswith("tokens: of each segment. 2 of 4 passages have more than the 100 tokens of a segment")
    assert "compressed in 2.5 on average" in note
    assert segment_notes(items[:2], 100) == segment_notes(items, None) == []
