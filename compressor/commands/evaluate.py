"""What `evaluate.py` does: checks that need no model, one call, the printed table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError
from compressor.evaluation.settings import EvaluationConfig
from compressor.evaluation.table import entry, readers
from compressor.files import owned
from compressor.parsing import known_keys, parse_config, read_yaml
from compressor.streams import exits_cleanly, shows_example

if TYPE_CHECKING:
    from accelerate import Accelerator


@exits_cleanly
@shows_example("python evaluate.py --task regeneration --data arxiv-test --lengths 96 --limit 10 --output outputs/it")
def evaluate_main(argv: list[str] | None = None) -> int:
    """Entry point of `evaluate.py`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config, flags = parse_config(
        chosen_settings(argv),
        argv,
        "Measure a compressor checkpoint.",
        {
            "overwrite": "replace the output folder if it holds an earlier evaluation",
            "resume": "go on with an evaluation that was interrupted, if there is one in the output folder",
        },
    )
    # Imported after the settings are known to be good: torch and transformers take seconds.
    from compressor.evaluation.report import published_table, text_table
    from compressor.evaluation.runner import evaluate
    from compressor.processes import make_accelerator

    accelerator = make_accelerator()
    command = command_line(argv, accelerator)
    with owned(config.output) if accelerator.is_main_process else nullcontext():
        metrics = evaluate(config, accelerator, overwrite=flags.overwrite, command=command, resume=flags.resume)
    if metrics is not None:
        print(text_table(metrics["rows"], metrics["figures"], keys=metrics.get("keys")))
        for note in metrics["notes"]:
            print(note)
        if getattr(config, "published", False):
            print("\n" + published_table())
        print(f"wrote {config.output}")
    # A process that ends with an error makes the launcher stop the others: none may leave before the output is written,
    # and a process group that is still open at exit sometimes aborts the process.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def chosen_settings(argv: Sequence[str]) -> type[EvaluationConfig]:
    """The settings of the task that a command line, or the file that it names with --config, asks for.

    Raises:
        CompressorError: there is no such task, or it does not read a setting that is given.
    """
    given: dict[str, Any] = {}
    for place, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        value = value if equals else "".join(argv[place + 1 : place + 2])
        if name == "--config" and value and not value.startswith("--"):
            given |= read_yaml(value)
        given[name[2:].replace("-", "_")] = value
    task = given.get("task", EvaluationConfig.task)
    chosen = entry(f"{task}").settings
    for name in given:
        if name not in known_keys(chosen) and (elsewhere := readers(name)):
            raise CompressorError(
                f"{name} means nothing to --task {task}: leave it out (it is read by {', '.join(elsewhere)})"
            )
    return chosen


def command_line(argv: list[str], accelerator: Accelerator) -> str:
    """The command that repeats this evaluation."""
    launcher = "python"
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        launcher = (
            f"accelerate launch --config_file configs/accelerate/cpu.yaml --num_processes {accelerator.num_processes}"
        )
    elif accelerator.num_processes > 1:
        launcher = f"accelerate launch --num_processes {accelerator.num_processes}"
    return f"{launcher} {shlex.join(['evaluate.py', *argv])}"
