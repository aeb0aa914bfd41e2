"""`evaluate.py`: an evaluation on all processes, its printed table, and wandb's run of it."""

from __future__ import annotations

import importlib.util
import shlex
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from compressor.errors import lacking
from compressor.evaluation.report import published_table, text_table
from compressor.evaluation.runner import evaluate
from compressor.evaluation.settings import EvaluationConfig
from compressor.files import owned
from compressor.parsing import flat
from compressor.processes import make_accelerator
from compressor.provenance import commit, versions


def run(config: EvaluationConfig, switches: Any) -> None:
    """Evaluate on all processes, and print the table."""
    if switches.wandb and importlib.util.find_spec("wandb") is None:
        raise lacking("--wandb", "wandb", "tracking")
    accelerator = make_accelerator()
    command = command_line(switches.argv, accelerator)
    with owned(config.output) if accelerator.is_main_process else nullcontext():
        metrics = evaluate(config, accelerator, overwrite=switches.overwrite, command=command, resume=switches.resume)
    if metrics is not None:
        print(text_table(metrics["rows"], metrics["figures"], keys=metrics.get("keys")))
        for note in metrics["notes"]:
            print(note)
        if getattr(config, "published", False):
            print("\n" + published_table())
        print(f"wrote {config.output}")
        if switches.wandb:
            track(metrics, asdict(config))
    # A process that ends with an error makes the launcher stop the others: none may leave before the output is written,
    # and a process group that is still open at exit sometimes aborts the process.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def track(metrics: dict[str, Any], settings: dict[str, Any]) -> None:
    """Give an evaluation to wandb: settings, a table of its rows, and each row's figures in the run's summary."""
    import wandb  # optional

    known = {"commit": commit(), **{f"versions.{name}": value for name, value in versions().items()}}
    run = wandb.init(project="compressor", job_type="evaluation", config=flat(settings) | known)
    rows, keys = metrics["rows"], ("method", "dataset", "part", "tokens", "length")
    columns = [*keys, "n", *metrics["figures"]]
    run.log({"rows": wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])})
    for row in rows:
        place = "/".join(str(row[key]) for key in keys if row.get(key) is not None)
        run.summary.update({f"{place}/{name}": row[name] for name in metrics["figures"] if row.get(name) is not None})
    run.finish()


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
