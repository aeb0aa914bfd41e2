"""What `evaluate.py` does: checks that need no model, one call, the printed table."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError, lacking
from compressor.evaluation.settings import EvaluationConfig
from compressor.evaluation.table import entry, readers
from compressor.files import owned
from compressor.parsing import flat, known_keys, parse_config, read_yaml
from compressor.provenance import commit, versions
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
            "wandb": "give settings, table and figures to wandb as a run of its own, too (extra tracking)",
        },
    )
    if flags.wandb and importlib.util.find_spec("wandb") is None:
        raise lacking("--wandb", "wandb", "tracking")
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
        if flags.wandb:
            track(metrics, asdict(config))
    # A process that ends with an error makes the launcher stop the others: none may leave before the output is written,
    # and a process group that is still open at exit sometimes aborts the process.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def track(metrics: dict[str, Any], settings: dict[str, Any]) -> None:
    """Give an evaluation to wandb: settings, a table of its rows, and each row's figures in the run's summary."""
    import wandb

    known = {"commit": commit(), **{f"versions.{name}": value for name, value in versions().items()}}
    run = wandb.init(project="compressor", job_type="evaluation", config=flat(settings) | known)
    rows, keys = metrics["rows"], ("method", "dataset", "part", "tokens", "length")
    columns = [*keys, "n", *metrics["figures"]]
    run.log({"rows": wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])})
    for row in rows:
        place = "/".join(str(row[key]) for key in keys if row.get(key) is not None)
        run.summary.update({f"{place}/{name}": row[name] for name in metrics["figures"] if row.get(name) is not None})
    run.finish()


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
