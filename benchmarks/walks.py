"""The files that a passage passes from its file to the gradient, and a question from its file to the table.

    python benchmarks/walks.py [ROOT]        ROOT: a checkout, by default this one

Whatever runs is counted, in the order in which it is first reached: functions of the package that are called while a
passage is read, tokenised, put into a batch, compressed, read by the decoder and its loss goes back; and while a
question is read, placed, asked of a memory and summed into rows. The root of the package (errors, files, progress),
on which everything stands, and the tables of names are left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
sys.path.insert(0, str(ROOT))


@contextmanager
def watched(reached: dict[str, None]) -> Iterator[None]:
    """Note the package's files whose functions are called in the block."""
    package = str(ROOT / "compressor") + "/"

    def called(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(package):
            reached.setdefault(name.removeprefix(package))

    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(None)


def passage(folder: Path) -> dict[str, None]:
    """A micro-batch of a training, from its file on."""
    from compressor.parsing import parse_config
    from compressor.processes import make_accelerator
    from compressor.training import regenerate
    from compressor.training.config import RunConfig

    texts = folder / "texts.jsonl"
    said = "We study the conductivity of {} thin films at low temperature and find that a model with two bands is made."
    texts.write_text(
        "".join(json.dumps({"id": str(i), "text": said.format(i)}) + "\n" for i in range(9)), encoding="utf-8"
    )
    settings = {"data.train": texts, "data.validation": texts, "data.lengths": "[{low: 8, high: 16}]"}
    settings |= {"data.validation_limit": 2, "compressor.lora_rank": 2, "training.batch_passages": 2, "output": folder}
    config, _ = parse_config(RunConfig, [f"--{name}={value}" for name, value in settings.items()], "")
    reached: dict[str, None] = {}
    stages: Any = regenerate
    stages.load_passages = _watching(stages.load_passages, reached)
    stage = regenerate.CompressionStage(config, make_accelerator())
    with watched(reached):
        stage.module(stage.micro_batch(0)).backward()
    return reached


def question(folder: Path) -> dict[str, None]:
    """Four questions of an evaluation, from their file on."""
    from compressor.evaluation import runner
    from compressor.evaluation.settings import QuestionAnsweringSettings
    from compressor.evaluation.tasks.qa import QuestionAnswering

    reached: dict[str, None] = {}
    for owner, name in ((QuestionAnswering, "load"), (QuestionAnswering, "items"), (runner, "make_rows")):
        setattr(owner, name, _watching(getattr(owner, name), reached))
    runner.run_batches = _watching(runner.run_batches, reached)
    settings: dict[str, Any] = {"checkpoint": "models/arxiv-mini/compressor", "methods": ["kv"], "tokens": [4]}
    settings |= {"data": ["squad-dev"], "limit": 4, "resamples": 10, "output": str(folder / "evaluation")}
    runner.evaluate(QuestionAnsweringSettings(task="qa", **settings))
    return reached


def _watching(honest: Any, reached: dict[str, None]) -> Any:
    def run(*given: Any, **named: Any) -> Any:
        with watched(reached):
            return honest(*given, **named)

    return run


def main() -> int:
    for name, walk in (("passage", passage), ("question", question)):
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            reached = walk(Path(folder))
        files = [file for file in reached if "/" in file and not file.endswith("table.py")]
        print(f"{name}: {len(files)} files: {', '.join(file.removesuffix('.py') for file in files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
