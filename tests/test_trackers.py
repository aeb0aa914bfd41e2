"""What wandb is told of a training run and of an evaluation: real offline runs, read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor.commands.cli import train_main
from compressor.parsing import read_yaml

wandb = pytest.importorskip("wandb")


def records(file: Path) -> Iterator[Any]:
    """Records of an offline run: protocol buffers in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


class Run:
    """What an offline run holds."""

    def __init__(self, folder: Path):
        wandb.teardown()  # until its service has ended, the file may be incomplete
        (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        for record in records(file):
            for update in [*record.run.config.update, *record.config.update]:
                self.config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
            for update in record.summary.update:
                self.summary[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
            if record.HasField("history"):
                items = record.history.item
                self.history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
            if record.HasField("artifact"):
                self.artifacts.append(record.artifact)
        tables = sorted(file.parent.glob("files/media/table/*.json"), key=lambda path: path.stat().st_mtime_ns)
        self.tables = [json.loads(path.read_text()) for path in tables]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tracked"
    folder.mkdir()
    for name, value in (("MODE", "offline"), ("DIR", str(folder)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    return folder


def test_a_training_run_tells_all_it_is_made_from_and_what_comes_back(
    offline: Path, training_options: list[str], tmp_path: Path
) -> None:
    options = ["--training.trackers", "[wandb]", "--training.log_model", "true", "--training.validate_every", "2"]
    output = tmp_path / "out"
    assert train_main([*training_options, *options, "--training.steps", "4", "--output", str(output)]) == 0
    run = Run(offline)
    settings = read_yaml(output / "config.yaml")
    assert run.config["training.learning_rate"] == settings["training"]["learning_rate"]
    assert json.loads(run.config["data.train"]) == settings["data"]["train"]
    assert {"base.path", "compressor.layout", "seed", "commit", "versions.torch", "processes"} <= set(run.config)
    assert run.config["parameters.trained"] > 0 < run.config["parameters.frozen"]
    assert any("loss" in row for row in run.history)
    first, last = (table for table in run.tables if table["columns"] == ["step", "kind", "text"])
    assert {row[0] for row in first["data"]} == {2}
    assert {row[0] for row in last["data"]} == {2, 4}
    assert last["data"][: len(first["data"])] == first["data"]
    assert {"passage", "regenerated"} <= {row[1] for row in last["data"]}
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert run.summary["final_loss"] == pytest.approx(logged[-1]["validation_loss"])
    assert run.summary["best_step"] in (2, 4)
    (model,) = [one for one in run.artifacts if one.type == "model"]
    assert {"compressor.json", "adapter_model.safetensors"} <= {entry.path for entry in model.manifest.contents}


def test_an_evaluation_is_a_summary(
    offline: Path, make_tiny_compressor: Callable[..., Any], tmp_path: Path, program: Callable[..., Any]
) -> None:
    """In a process of its own: wandb keeps what it once read of the environment."""
    make_tiny_compressor().save_pretrained(tmp_path / "made")
    options = ["--checkpoint", str(tmp_path / "made"), "--data", "arxiv-test", "--lengths", "16", "--limit", "2"]
    status, _, errors = program("evaluate.py", *options, "--tokens", "4", "--output", tmp_path / "out", "--wandb")
    assert status == 0, errors
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    run = Run(offline)
    assert run.summary["kv/arxiv-test/4/16/rouge_l"] == row["rouge_l"]
    assert run.config["task"] == "regeneration"
    assert run.tables[0]["data"][0][:2] == ["kv", "arxiv-test"]
