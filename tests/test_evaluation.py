"""`evaluate.py` end to end on a tiny random model: figures, files, refusals, processes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compressor.commands.cli import evaluate_main
from compressor.errors import CompressorError
from compressor.evaluation.items import Item, Task
from compressor.evaluation.report import (
    load_published,
    loss_curve,
    markdown_table,
    published_table,
    regeneration_plot,
    text_table,
)
from compressor.evaluation.settings import RegenerationSettings
from compressor.evaluation.tasks import regeneration as tasks_module
from compressor.evaluation.tasks.regeneration import Regeneration
from compressor.files import sha256
from compressor.methods.interface import MemoryMethod
from compressor.model.decoder import label_nats

FIGURES = ("bleu", "rouge_l", "exact_match", "token_accuracy", "nll_per_token", "token_ratio", "byte_ratio")


@pytest.fixture
def checkpoint(tiny_compressor: Any, tmp_path: Path) -> str:
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.fixture
def data(tmp_path: Path, texts: list[str]) -> str:
    """Five abstracts and two short notes, dated from 2017 to 2023."""
    path = tmp_path / "data.jsonl"
    passages = [text[:240] for text in texts[:5]] + ["A short note.", "Another short note, a little longer."]
    records = [{"id": f"r{i}", "abstract": text, "date": f"{2017 + i}-06-01"} for i, text in enumerate(passages)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def _predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_command_end_to_end(checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    argv = ["--checkpoint", checkpoint, "--task", "regeneration", "--data", data, "--tokens", "8", "2", "1"]
    argv += ["--lengths", "12", "40", "--limit", "4", "--output", str(output)]
    assert evaluate_main([*argv, "--published", "true"]) == 0
    printed = capsys.readouterr().out
    for shown in ("ROUGE-L ↑", "nats/token ↓", "byte ratio", "tok:13a|smooth:exp", "Llama-3-8B-Instruct"):
        assert shown in printed

    metrics = _metrics(output)
    rows = metrics["rows"]
    assert [(row["tokens"], row["length"], row["n"]) for row in rows] == [
        (tokens, length, 4) for tokens in (8, 2, 1) for length in (12, 40)
    ]
    for row in rows:
        for name in FIGURES:
            assert row[f"{name}_low"] - 1e-9 <= row[name] <= row[f"{name}_high"] + 1e-9
        assert row["token_ratio"] == row["length"] / row["tokens"]
    assert metrics["data"] == [
        {
            "source": data,
            "split": None,
            "records": 7,
            "sha256": sha256(data),
            "sha256_of": "file",
        }
    ]
    assert metrics["command"].startswith("python evaluate.py --checkpoint")
    assert len(metrics["checkpoint"]["fingerprint"]) == len(metrics["base"]["fingerprint"]) == 64
    assert {"torch", "transformers", "sacrebleu", "python"} <= set(metrics["versions"])
    assert metrics["seconds"] > 0

    lines = _predictions(output)
    assert len(lines) == 4 * len(rows)
    first = lines[0]
    # Keys and values of 8 tokens: 3 layers, 2 heads of 8, 2 bytes each.
    assert first["memory_bytes"] == 2 * 8 * 3 * 2 * 8 * 2
    assert first["passage_bytes"] == len(first["reference"].encode())
    assert {file.name for file in output.iterdir()} == {
        *("metrics.json", "predictions.jsonl", "config.yaml", "table.md", "regeneration.png")
    }

    # The written configuration repeats the run.
    again = tmp_path / "again"
    assert evaluate_main(["--config", str(output / "config.yaml"), "--output", str(again)]) == 0
    assert _metrics(again)["rows"] == rows
    assert (again / "predictions.jsonl").read_text() == (output / "predictions.jsonl").read_text()


def test_never_replaces_a_run_unless_told(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    argv = ["--checkpoint", checkpoint, "--data", data, "--lengths", "12", "--limit", "1", "--output", str(output)]
    assert evaluate_main(argv) == 0
    before = (output / "metrics.json").read_text()
    assert evaluate_main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (output / "metrics.json").read_text() == before
    assert evaluate_main([*argv, "--overwrite"]) == 0
    assert (output / "metrics.json").read_text() != before

    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.tex").write_text("...")
    assert evaluate_main([*argv[:-1], str(other), "--overwrite"]) == 2
    assert "not an evaluation" in capsys.readouterr().err
    assert (other / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task", "regenerate"], "did you mean regeneration"),
        (["--tokens", "16", "4"], "more than the 8 memory tokens"),
        (["--tokens", "4", "x"], "must be a whole number"),
        (["--tokens", "0"], "at least 1"),
        (["--lengths", "9", "9"], "differ from each other"),
        (["--lengths", "100000"], "no passage of at least 100000 tokens"),
        (["--token", "4"], "did you mean tokens"),
        (["--data", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["--text_field", "body"], "'body'"),
        (["--checkpoint", "no/such/checkpoint"], "no compressor checkpoint"),
    ],
)
def test_bad_settings_exit_2_with_one_message(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    argv = ["--checkpoint", checkpoint, "--data", data, "--limit", "1", "--output", str(tmp_path / "out")]
    assert evaluate_main([*argv, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"text": 3}\n', "3"),
        ('{"text": "fine"}\n{broken\n', "2"),
        ('{"title": "no passage"}\n', "'text' or 'abstract'"),
    ],
)
def test_bad_data_is_named(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert evaluate_main(["--checkpoint", checkpoint, "--data", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl" in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_failure_leaves_no_output(checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tasks_module, "rewrite", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_main(["--checkpoint", checkpoint, "--data", data, "--limit", "1", "--output", str(tmp_path / "o")])
    assert set(tmp_path.iterdir()) == before


def test_methods_are_checked_before_any_is_run(
    make_tiny_compressor: Callable[..., Any],
    checkpoint: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_tiny_compressor(method="icae", layout="after")
    other.base.fingerprint = "0" * 64
    other.save_pretrained(tmp_path / "icae")
    monkeypatch.setattr(MemoryMethod, "compress", lambda *_: pytest.fail("a method was run"))
    argv = ["--checkpoint", checkpoint, "--data", data, "--output", str(tmp_path / "out"), "--methods", "kv"]
    assert evaluate_main([*argv, "anchor"]) == 2
    assert "there is no checkpoint of the method anchor" in capsys.readouterr().err
    assert evaluate_main([*argv, f"icae={tmp_path / 'icae'}"]) == 2
    assert "methods are compared on one base" in capsys.readouterr().err


def test_sizes_that_a_method_does_not_have_are_named(
    make_tiny_compressor: Callable[..., Any], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_compressor(method="reference-500x", layout="published")
    model.save_pretrained(tmp_path / "published")
    argv = ["--checkpoint", str(tmp_path / "published"), "--data", data, "--lengths", "12", "--limit", "1"]
    assert evaluate_main([*argv, "--tokens", "8", "2", "--output", str(tmp_path / "out")]) == 0
    metrics = _metrics(tmp_path / "out")
    assert [row["tokens"] for row in metrics["rows"]] == [8]
    assert "reference-500x cannot compress to 2 tokens." in metrics["notes"]
    capsys.readouterr()
    assert evaluate_main([*argv, "--tokens", "2", "1", "--output", str(tmp_path / "none")]) == 2
    assert "Nothing is left to measure" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_whole_passages_are_segmented_and_scored_in_full(tiny_compressor: Any, texts: list[str]) -> None:
    """Nats, first choices, tokens and bytes are those of the segments, each with its EOS, under its own memory."""
    base, task = tiny_compressor.base, Regeneration()
    ids = base.tokenizer(" ".join(texts[:3]), add_special_tokens=False)["input_ids"][:150]
    method = MemoryMethod(tiny_compressor)
    items = [Item("long", ids, None), Item("short", ids[:20], None)]
    (contexts,) = method.compress([item.passage for item in items], [4])
    assert [len(pieces) for pieces in contexts] == [3, 1]  # the limit is 64
    with torch.no_grad():
        long, short = task.run(method, items, contexts)
    assert (long["passage_tokens"], long["target_tokens"], long["memory_tokens"]) == (150, 153, 12)
    assert long["reference"] == base.tokenizer.decode(ids)

    nats = 0.0
    for start in (0, 50, 100):
        segment = torch.tensor([ids[start : start + 50]])
        lengths = torch.tensor([50])
        with torch.no_grad():
            prefix = tiny_compressor.prefix(*tiny_compressor.encode(segment, lengths, 4), lengths)
            inputs = torch.tensor([[base.bos, *segment[0].tolist()]])
            labels = torch.tensor([[*segment[0].tolist(), base.eos]])
            nats += float(label_nats(tiny_compressor.base, prefix, inputs, labels))
    assert long["nats"] == pytest.approx(nats, rel=1e-5)
    assert math.isfinite(short["nats"])


@pytest.mark.parametrize("layout", ["nested", "spread"])
def test_encodes_once_where_the_layout_allows(make_tiny_compressor: Callable[..., Any], layout: str) -> None:
    model = make_tiny_compressor(layout=layout)
    calls = []
    encode = model.compress_ids
    model.compress_ids = lambda ids, tokens, *rest: calls.append(tokens) or encode(ids, tokens, *rest)
    sizes = MemoryMethod(model).compress([list(range(10, 40))], [8, 4, 1])
    assert calls == ([8] if layout == "nested" else [8, 4, 1])
    assert [pieces[0][0].tokens for pieces in sizes] == [8, 4, 1]
    direct = encode([list(range(10, 40))], 4)[0]
    assert torch.allclose(sizes[1][0][0].held.keys, direct.keys, atol=1e-5)


def test_batches_do_not_depend_on_processes_and_start_with_the_longest() -> None:
    items = [Item(str(i), [5] * length, None) for i, length in enumerate([3, 9, 1, 9, 4])]
    assert Task().batches(items, 2) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize("task", ["regeneration", "qa"])
def test_two_processes_give_the_same_figures(
    task: str, checkpoint: str, data: str, tmp_path: Path, program: Callable[..., Any]
) -> None:
    argv = ["--checkpoint", checkpoint, "--task", task, "--tokens", "8", "1", "--batch_size", "2"]
    if task == "regeneration":
        argv += ["--data", data, "--lengths", "12", "40", "--output"]
    else:
        argv += ["--data", "squad-dev", "arxivqa-test", "--limit", "3", "--methods", "kv", "full", "none", "--output"]
    assert evaluate_main([*argv, str(tmp_path / "one")]) == 0
    status, shown, errors = program("evaluate.py", *argv, tmp_path / "two", processes=2)
    assert status == 0, errors
    assert shown.count("wrote ") == 1
    one, two = _metrics(tmp_path / "one"), _metrics(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["rows"] == one["rows"]
    assert (tmp_path / "two" / "predictions.jsonl").read_text() == (tmp_path / "one" / "predictions.jsonl").read_text()


def test_settings_round_trip_through_yaml(tmp_path: Path) -> None:
    from dataclasses import asdict

    from compressor.parsing import parse_config

    config = RegenerationSettings(tokens=[16, 1], lengths=[96], published=True, limit=3)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    assert parse_config(RegenerationSettings, ["--config", str(path)], "")[0] == config
    assert parse_config(RegenerationSettings, ["--config", str(path), "--tokens", "4"], "")[0].tokens == [4]
    for spelling in (["--tokens", "16", "4"], ["--tokens", "[16, 4]"], ["--tokens=[16,4]"], ["--tokens", "16,4"]):
        assert parse_config(RegenerationSettings, spelling, "")[0].tokens == [16, 4]


def test_tables() -> None:
    row = {"method": "memory", "tokens": 16, "length": None, "n": 3, "rouge_l": 0.5, "bleu": None}
    row |= {"rouge_l_low": 0.4, "rouge_l_high": 0.61234, "bleu_low": None, "bleu_high": None}
    text = text_table([row, {**row, "length": 96}], ["rouge_l", "bleu"]).splitlines()
    assert len({len(line) for line in text}) == 1
    assert text[2].split() == ["16", "whole", "3", "0.500", "[0.400,", "0.612]", "-"]
    assert "method" not in text[0]
    assert "method" in text_table([row, {**row, "method": "full"}], ["bleu"])
    assert markdown_table([row], ["rouge_l"], intervals=False).splitlines()[-1] == "| 16 | whole | 3 | 0.500 |"


def test_published_figures_state_their_source_and_base(tmp_path: Path) -> None:
    published = load_published()
    assert published["methods"]["500xCompressor"]["16"][0] == 0.996
    assert "2408.03094" in published["source"]
    assert "8B" in published_table()
    assert re.search(r"500xCompressor +16 +0\.996 ", published_table())
    rows = [
        {"tokens": 4, "length": length, "rouge_l": 0.5, "rouge_l_low": 0.4, "rouge_l_high": 0.6} for length in (96, 192)
    ]
    assert regeneration_plot(rows, tmp_path / "p.png", published)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not regeneration_plot([{**rows[0], "length": None}], tmp_path / "q.png")


def test_loss_curve(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [{"step": 1, "loss": 3.0, "passages": 8}, {"step": 1, "validation_loss": 2.5, "validation_nats_16": 2.5}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_curve([log], ["nested"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    log.write_text('{"step": 1\n')
    with pytest.raises(CompressorError, match=r"log\.jsonl:1"):
        loss_curve([log], ["nested"], tmp_path / "loss.png")
    with pytest.raises(CompressorError, match="labels"):
        loss_curve([log], [], tmp_path / "loss.png")


def test_a_figure_that_cannot_be_trusted_has_a_note_with_its_share(
    checkpoint: str, tmp_path: Path, texts: list[str]
) -> None:
    path = tmp_path / "mixed.jsonl"
    records = [
        {"id": str(i), "text": text} for i, text in enumerate([texts[0][:90], "我们用它压缩长文本", "?!", "Tidy text."])
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert evaluate_main(["--checkpoint", checkpoint, "--data", str(path), "--output", str(tmp_path / "out")]) == 0
    notes = _metrics(tmp_path / "out")["notes"]
    assert any("mixed: 1 of 4 items (25.0%) are in a script without spaces" in note for note in notes)
    assert any("mixed: 1 of 4 items (25.0%) have no word that ROUGE-L could count" in note for note in notes)
    assert not any("lose something in the tokenizer" in note for note in notes)


class _Lossy:
    """A tokenizer that writes everything in lower case, as many of BERT's do."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(ids).decode(errors="replace").lower()


def test_tokens_that_do_not_say_the_text() -> None:
    assert tasks_module.says(_Lossy(), list(b"tidy"), "tidy text")
    assert tasks_module.says(_Lossy(), list("día".encode()[:2]), "día")  # cut within a character
    assert not tasks_module.says(_Lossy(), list(b"Tidy"), "Tidy text")
