"""Train a compressor, or a small base, from a YAML configuration.

    accelerate launch train.py --config configs/arxiv-mini/regenerate.yaml
    python train.py --config configs/arxiv-mini/regenerate.yaml --training.learning-rate 2e-4
    python train.py --config configs/arxiv-mini/regenerate.yaml --dry-run

`--print-config` shows the resolved settings, `--dry-run` also the batch arithmetic, the parameter counts and an
estimate of memory. A stopped run goes on with `--training.resume`.
"""

import sys

from compressor.commands.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
