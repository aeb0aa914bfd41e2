"""Tokens a second of regeneration against batch size, beside a batch-1 loop and transformers' `generate`.

    python benchmarks/decoding.py --checkpoints models/arxiv-mini/compressor --output results/benchmark-decoding.json

Memories are of unequal size (16, 8 and 4 tokens in turn) and every row writes --tokens tokens, with no end. The loop
runs the model on one row at a time, as the published code does; `generate` gets the same prefix. Variants alternate in
one run; seconds are the process's own on a CPU and wall seconds on a GPU, and the best of --repeats counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor.api import Compressor
from compressor.files import write_json
from compressor.model.base import Base
from compressor.model.generation import stream
from compressor.model.memory import Memory, memory_prefix
from compressor.processes import current_device, held_dtype
from compressor.streams import exits_cleanly

LOOP, LIBRARY, OURS = "batch-1 loop", "generate", "ours"


def loop(base: Base, memories: list[Memory], tokens: int) -> None:
    """One row, a token a pass."""
    prefix = memory_prefix(base, memories[:1])
    ids, cache, mask = torch.tensor([[base.bos]], device=base.device), prefix.to_cache(), prefix.mask.long()
    model: Any = base.model
    for step in range(tokens):
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        places = prefix.start[:, None] + step
        found = model(input_ids=ids, position_ids=places, attention_mask=mask, past_key_values=cache, use_cache=True)
        ids = found.logits[:, -1:].argmax(-1)


def library(base: Base, memories: list[Memory], tokens: int) -> None:
    """transformers' `generate` after the same prefix."""
    prefix, rows = memory_prefix(base, memories), len(memories)
    ids = torch.full((rows, prefix.slots + 1), base.bos, device=base.device)
    mask = torch.cat([prefix.mask.long(), prefix.mask.new_ones(rows, 1).long()], dim=1)
    limits: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model: Any = base.model
    model.generate(ids, attention_mask=mask, past_key_values=prefix.to_cache(), pad_token_id=base.eos, **limits)


def ours(base: Base, memories: list[Memory], tokens: int, decoding: str = "auto") -> None:
    """`compressor/model/generation.py`."""
    rows, base.decoding = len(memories), decoding
    for _ in stream(base, memory_prefix(base, memories), [[base.bos]] * rows, [tokens] * rows, ends=False):
        pass


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds of a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


@torch.no_grad()
def measure(checkpoint: str, dtype: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Tokens a second of every variant and batch size."""
    model = Compressor.from_pretrained(checkpoint, device=device, dtype=dtype).eval()
    made = model.compress_ids([[(7 * i + j) % 400 + 5 for i in range(40)] for j in range(3)])
    work: dict[tuple[str, int], Callable[[], None]] = {(LOOP, 1): partial(loop, model.base, made, options.tokens)}
    for size in options.batches:
        rows = [made[i % 3].truncate((16, 8, 4)[i % 3]) for i in range(size)]
        work[OURS, size] = partial(ours, model.base, rows, options.tokens)
        work[LIBRARY, size] = partial(library, model.base, rows, options.tokens)
        for way in options.decoding:
            work[way, size] = partial(ours, model.base, rows, options.tokens, way)
    for one in work.values():
        one()
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in work}
    for _ in range(options.repeats):
        for key, one in work.items():
            taken[key].append(seconds(one, device))
    rate = {key: key[1] * options.tokens / min(times) for key, times in taken.items()}
    measured = []
    for (variant, size), times in taken.items():
        fields = {"base": model.base.name, "dtype": dtype, "variant": variant, "batch": size, "seconds": times}
        found = rate[variant, size]
        measured.append({**fields, "tokens_per_second": found, "times_loop": found / rate[LOOP, 1]})
        ratio = found / rate[LOOP, 1]
        print(f"{model.base.name:<28}{dtype:<10}{variant:<14}{size:>6}{found:12.1f}{ratio:9.1f} x the loop")
    return measured


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second against batch size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for base, dtype in dict.fromkeys((row["base"], row["dtype"]) for row in rows):
        for variant, style in ((OURS, "o-"), (LIBRARY, "x--")):
            of = [r for r in rows if (r["base"], r["dtype"], r["variant"]) == (base, dtype, variant)]
            label = f"{Path(base).parent.name or base} {dtype}, {variant}"
            axes.plot([r["batch"] for r in of], [r["tokens_per_second"] for r in of], style, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rows decoded together", ylabel="tokens a second")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", default=["models/arxiv-mini/compressor"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoding", nargs="+", default=[], choices=["static", "compiled"], help="these, too")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = current_device()
    rows = []
    for checkpoint in options.checkpoints:
        rows += measure(checkpoint, held_dtype("auto", device), options, device)
    if options.output:
        settings = {"tokens": options.tokens, "threads": options.threads, "device": device.type}
        write_json(options.output, {**settings, "torch": torch.__version__, "rows": rows})
        plot(rows, options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
