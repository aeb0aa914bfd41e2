"""What gradient steps on a memory cost; numbers of steps alternate in one run. Prints medians and ratios.

python benchmarks/refinement.py --output results/refinement/seconds.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from compressor.api import Compressor
from compressor.data.records import load_texts
from compressor.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="models/arxiv-mini/compressor")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 5, 10, 20, 50])
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = Compressor.from_pretrained(options.checkpoint, device=options.device)
    encoded = model.base.tokenise(load_texts("arxiv-validation")["text"])
    passages = [ids[: options.length] for ids in encoded if len(ids) >= options.length][: options.repeats + 1]

    def seconds(work: object) -> float:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()  # type: ignore[operator]
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    compress: dict[int, list[float]] = {steps: [] for steps in options.steps}
    regenerate: list[float] = []
    for repeat, ids in enumerate(passages):
        for steps in options.steps:
            took = seconds(lambda ids=ids, steps=steps: model.compress_ids([ids], options.tokens, refine_steps=steps))
            if repeat:  # the first round warms up
                compress[steps].append(took)
        memory = model.compress_ids([ids], model.config.memory_tokens, refine_steps=5)[0]
        took = seconds(lambda memory=memory: model.regenerate(memory))
        if repeat:
            regenerate.append(took)
    medians = {steps: statistics.median(times) for steps, times in compress.items()}
    back = statistics.median(regenerate)
    for steps, median in medians.items():
        print(f"compress, {steps:>3} steps {median:8.3f} s   {median / back:6.2f} x writing the passage back")
    if options.output:
        found = {
            **{name: getattr(options, name) for name in ("tokens", "length", "threads", "device", "steps")},
            "torch": torch.__version__,
            "compress": {str(steps): round(median, 4) for steps, median in medians.items()},
            "regenerate": round(back, 4),
            "seconds": {str(steps): times for steps, times in compress.items()},
            "seconds_regenerate": regenerate,
        }
        write_json(options.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
