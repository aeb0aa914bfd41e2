"""Benchmarks that are run rarely: that they still run, on something tiny. What they measure is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


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
