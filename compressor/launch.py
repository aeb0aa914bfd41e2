"""What `train.py` does: parse, check, build the stage, train."""

from __future__ import annotations

from pathlib import Path

import yaml
from accelerate.utils import set_seed

from compressor.config import RunConfig, parse_config
from compressor.errors import exits_cleanly
from compressor.files import atomic_path


@exits_cleanly
def train_main(argv: list[str] | None = None) -> int:
    """Entry point of `train.py`; returns the exit status."""
    config, flags = parse_config(
        RunConfig,
        argv,
        "Train a compressor (stage regenerate) or a small base (stage base).",
        {"dry_run": "show settings, batch arithmetic, parameter counts and memory, then stop"},
    )
    # Imported after the settings are known to be good: torch and transformers take seconds.
    from compressor.training import make_accelerator, train

    accelerator = make_accelerator(config)
    set_seed(config.seed)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    if config.stage == "base":
        from compressor.pretraining import BaseStage as Stage
    else:
        from compressor.compression import CompressionStage as Stage  # type: ignore[assignment]
    train(Stage(config, accelerator), config, accelerator)
    return 0
