"""Scripts that are run rarely: that they run, on something tiny. What benchmarks measure is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from compressor import Compressor
from compressor.model.layouts import memory_positions


def test_a_training_step_of_random_weights(project: Path, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/training_step.py", "--shape", "tiny", "--passages", "2", "--lengths", "24"]
    command += ["--repeats", "1", "--variants", "ours", "published recipe", "--output", str(output)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    found = json.loads(output.read_text())
    ours, published = found["variants"].values()
    assert (found["base"], found["passages"]) == ("tiny", 2)
    # The published recipe extends passages of 24 tokens to 500.
    assert published["flops"] > 3 * ours["flops"] > 0


def test_memory_tokens_keep_their_places_when_they_are_given_parts(
    project: Path, make_tiny_compressor: Callable[..., Compressor], tmp_path: Path
) -> None:
    before = make_tiny_compressor(layout="nested")
    before.save_pretrained(tmp_path / "nested")
    command = [sys.executable, "runs/change-encoder.py", "parts", str(tmp_path / "nested"), str(tmp_path / "parts")]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    after = Compressor.from_pretrained(tmp_path / "parts")
    assert (after.config.layout, after.config.memory_attention) == ("overlay", "parts")
    most = before.config.memory_tokens
    order = [
        memory_positions(one.config.layout, torch.tensor([80]), most, most)[0].argsort() for one in (before, after)
    ]
    old, new = (one.trainable_state() for one in (before, after))
    for name, weight in old.items():
        if name == "encoder.memory_embeddings":
            assert torch.equal(weight[order[0]], new[name][order[1]])
        else:
            assert torch.equal(weight, new[name])
    again = subprocess.run([*command[:3], *command[4:], str(tmp_path / "twice")], cwd=project, capture_output=True)
    assert again.returncode == 2
    assert b"a compressor of kv in nested" in again.stderr


def test_a_writer_begins_as_a_copy_of_the_shared_adapter(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "runs/change-encoder.py", "writer", "models/arxiv-mini/compressor"]
    command += [str(tmp_path / "with")]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    before, after = (Compressor.from_pretrained(path) for path in ("models/arxiv-mini/compressor", tmp_path / "with"))
    assert after.has_writer
    assert after.config.memory_attention == "tree"
    # A single token sees the whole passage under either mask.
    old, new = (model.compress("Some text to be compressed.", tokens=1) for model in (before, after))
    assert torch.allclose(old.keys, new.keys, atol=1e-4)
    assert torch.allclose(old.values, new.values, atol=1e-4)
    twice = [*command[:3], str(tmp_path / "with"), str(tmp_path / "twice")]
    again = subprocess.run(twice, cwd=project, capture_output=True)
    assert again.returncode == 2
    assert b"has a writer's adapter" in again.stderr
