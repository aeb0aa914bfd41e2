"""Train a compressor, or a small base, from a YAML configuration.

    accelerate launch train.py --config configs/arxiv-mini/regenerate.yaml
    python train.py --config configs/arxiv-mini/regenerate.yaml --training.learning_rate 2e-4
    python train.py --config configs/arxiv-mini/regenerate.yaml --dry_run

`--print_config` shows the resolved settings, `--dry_run` also the batch arithmetic, the parameter counts and an
estimate of memory. A stopped run goes on with `--training.resume true`.
"""

import sys

from compressor.commands.train import train_main

if __name__ == "__main__":
    sys.exit(train_main())
