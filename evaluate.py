"""Measure a compressor checkpoint: how well passages come back from their memories.

    python evaluate.py --checkpoint models/arxiv-mini/compressor --task regeneration --data arxiv-test \\
        --tokens 16 4 1 --lengths 96 192 288 384 480 --limit 100 --output outputs/regeneration
    accelerate launch --num_processes 4 evaluate.py --config outputs/regeneration/config.yaml --output outputs/again

Any JSONL, Parquet, CSV or text file with a `text` or `abstract` field works as data. A table is printed;
`metrics.json`, `predictions.jsonl`, `config.yaml`, `table.md` and `regeneration.png` are written to the output folder,
which is never replaced without `--overwrite`. `--split-date 2020-01-01` reports records before and from that day apart.
Figures do not depend on the number of processes. What is done when an evaluation is stopped is in `unfinished/` of the
output folder: the same command with `--resume` goes on with it, to the same table.

`--task utilisation` studies what each memory token and layer is used for, `--task efficiency` what a memory saves.
"""

import sys

from compressor.commands.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
