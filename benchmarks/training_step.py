"""How long a training step takes, variants alternating in one run; prints medians and ratios.

    python benchmarks/training_step.py --output results/benchmark-training-step.json

Variants: the base with eager or sdpa attention; every passage padded to 500 tokens, as the published code does.
Times are the process's CPU seconds on a CPU (other programs do not count) and wall seconds on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from compressor.base import load_base
from compressor.data.collate import regeneration_pair, stack_pairs
from compressor.files import write_json
from compressor.model import Compressor
from compressor.model_config import BaseConfig, CompressorConfig

PADDED = 500


def batch(model: Compressor, passages: int, length: int, width: int) -> dict:
    """Random passages of `length` tokens, padded with EOS to `width` where that is more."""
    generator = torch.Generator().manual_seed(0)
    table = model.base.model.get_input_embeddings().weight
    ids = torch.randint(3, len(table), (passages, length), generator=generator)
    ids = torch.cat([ids, torch.full((passages, max(0, width - length)), model.base.eos)], dim=1)
    pairs = stack_pairs([regeneration_pair(model.base.bos, model.base.eos, row.tolist()) for row in ids])
    tensors = {
        "input_ids": ids,
        "lengths": torch.full((passages,), ids.shape[1]),
        "memory_tokens": torch.full((passages,), model.config.memory_tokens),
        "regeneration_inputs": pairs["inputs"],
        "regeneration_labels": pairs["labels"],
    }
    return {name: tensor.to(model.base.device) for name, tensor in tensors.items()} | {"regeneration_weight": 1.0}


def step(model: Compressor, data: dict) -> None:
    with torch.autocast(model.base.device.type, torch.bfloat16):
        loss = model(data)
    loss.backward()
    model.zero_grad()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/arxiv-mini/base")
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output")
    options = parser.parse_args()

    models = {
        name: Compressor(load_base(BaseConfig(path=options.base, attention=name), options.device), CompressorConfig())  # type: ignore[arg-type]
        for name in ("eager", "sdpa")
    }
    short = batch(models["eager"], options.passages, options.length, 0)
    padded = batch(models["eager"], options.passages, options.length, PADDED)
    variants: dict[str, Callable[[], None]] = {
        "eager": lambda: step(models["eager"], short),
        "sdpa": lambda: step(models["sdpa"], short),
        "eager, padded to 500": lambda: step(models["eager"], padded),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):
        for name, run in variants.items():
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            clock = time.perf_counter if options.device.startswith("cuda") else time.process_time
            started = clock()
            run()
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(clock() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = medians["eager"]
    for name, median in medians.items():
        print(f"{name:<24} {median:8.3f} s   {median / first:6.2f} x eager")
    if options.output:
        settings = {"passages": options.passages, "length": options.length, "device": options.device}
        write_json(options.output, {**settings, "torch": torch.__version__, "seconds": seconds, "median": medians})
    return 0


if __name__ == "__main__":
    sys.exit(main())
