"""What a training step costs: passages a second, share of the processor's matrix products, peak memory; prints a table.

    python benchmarks/training_step.py --base smollm2-135m --output results/benchmark-training-step.json
    python benchmarks/training_step.py --base smollm2-135m --lengths 96
    python benchmarks/training_step.py --base smollm2-135m --at 48 96 192 480 --output outputs/training-step.json
    python benchmarks/training_step.py --shape llama3-8b --variants ours "published recipe" --memory     # on a GPU

Variants alternate in one run: ours as it trains, ours without one lever each, and the published recipe as it is (every
passage extended to 500 tokens, no mask, LoRA of rank 64 on queries and values, 4 passages a step). Passages are as long
as the shipped test abstracts (up to 500 tokens), or of --lengths tokens. Seconds are the process's own on a CPU (other
programs do not count) and wall seconds on a GPU; the peak is that of products of 2048 x 2048 matrices in the same run.
--shape takes random weights of a known size in place of a base's: all variants are held at once.
How it is on a processor with fewer instructions shows with ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
ONEDNN_MAX_CPU_ISA=AVX2 in the environment and --dtype float32, as `auto` chooses there.
--memory runs each variant in a process of its own and reports the largest resident set (on a GPU, the most memory
allocated).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.data.batches import pad, padded_width, regeneration_pair, stack_pairs
from compressor.data.records import load_passages
from compressor.files import write_json
from compressor.model.base import Base
from compressor.model.config import BaseConfig, CompressorConfig
from compressor.model.kernels import GROUPED, lighten_norms
from compressor.model.load import load_base
from compressor.processes import current_device, held_dtype
from compressor.streams import exits_cleanly
from compressor.training.objectives import Trainee

OURS, PUBLISHED = "ours", "published recipe"
VARIANTS = {
    OURS: "",
    "fused attention": "torch's own attention instead of grouped products (on a GPU the same)",
    "autocast": "float32 weights under bfloat16 autocast",
    "whole logits": "the logits of every position as one tensor",
    "activation checkpointing": "activations computed again in the backward pass",
    PUBLISHED: "passages extended to 500 tokens, q and v only, 4 a step",
}
TOKENS = 512
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}
"""Settings of `LlamaConfig`; the tokenizer is arxiv-mini's, whose ids all of them have."""


def build(variant: str, options: argparse.Namespace, device: torch.device) -> Trainee:
    """The model of a variant, ready to train."""
    held = "float32" if variant == "autocast" else held_dtype(options.dtype, device)
    attention: Any = "sdpa" if variant in ("fused attention", PUBLISHED) else "auto"
    chosen = BaseConfig(path=options.base, dtype=held, attention=attention)  # type: ignore[arg-type]
    loaded = shaped(options.shape, chosen, device) if options.shape else load_base(chosen, device)
    loaded.plain_head = variant not in ("whole logits", PUBLISHED)
    if variant == PUBLISHED:
        settings: dict[str, Any] = {"method": "reference-500x", "layout": "published", "passage_attention": "causal"}
        settings |= {"lora_targets": _named(loaded, ("q_proj", "v_proj"))}
    else:
        settings = {"lora_rank": 32, "writer_rank": 32, "lora_alpha": 32.0}
    model = Trainee(loaded, CompressorConfig(**settings)).train()
    model.activation_checkpointing = variant == "activation checkpointing"
    return model


def shaped(shape: str, config: BaseConfig, device: torch.device) -> Base:
    """A base of random weights, made on its device: 8B of them take minutes elsewhere."""
    tokenizer = load_base(BaseConfig()).tokenizer
    settings = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    settings._attn_implementation = GROUPED if config.attention == "auto" else config.attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with device:
            model = LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(before)
    base = Base(model, tokenizer, shape, stored="random")
    if config.attention == "auto" and device.type == "cpu":
        lighten_norms(model)
    return base


def _named(base: Any, names: tuple[str, ...]) -> Any:
    leaves = {name.split(".")[-1] for name, part in base.model.named_modules() if isinstance(part, torch.nn.Linear)}
    return [name for name in names if name in leaves] or "all-linear"


def batches(model: Trainee, passages: list[list[int]], variant: str) -> list[dict[str, Any]]:
    """Micro-batches of the passages, as the trainer makes them: sorted by length, up to `TOKENS` tokens each."""
    groups: list[list[list[int]]] = [[]]
    for ids in sorted(passages, key=len):
        full = len(groups[-1]) == 4 if variant == PUBLISHED else (len(groups[-1]) + 1) * len(ids) > TOKENS
        if groups[-1] and full:
            groups.append([])
        groups[-1].append(ids)
    made = []
    for group in groups:
        if model.encoder.padded_to:
            group = [ids + [model.base.eos] * (model.encoder.padded_to - len(ids)) for ids in group]
        padded, lengths = pad(group, model.base.device, width=padded_width)
        pairs = stack_pairs([regeneration_pair(model.base.bos, model.base.eos, one) for one in group])
        made.append(
            {
                "input_ids": padded,
                "lengths": lengths,
                "memory_tokens": torch.full_like(lengths, model.config.memory_tokens),
                "regeneration_inputs": pairs["inputs"].to(padded.device),
                "regeneration_labels": pairs["labels"].to(padded.device),
                "regeneration_weight": 1.0,
            }
        )
    return made


def run(model: Trainee, data: list[dict[str, Any]], variant: str) -> None:
    """Forward and backward pass over all of the micro-batches."""
    device = model.base.device
    precision: AbstractContextManager[Any] = nullcontext()
    for batch in data:
        if variant == "autocast":
            precision = torch.autocast(device.type, torch.bfloat16)
        with precision:
            loss = model(batch)
        loss.backward()
        model.zero_grad()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What `work` takes: CPU seconds of this process, or wall seconds of a GPU."""
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    started = clock()
    work()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


def peak(device: torch.device, held: str) -> float:
    """Matrix products a second, in FLOP, in the type that training computes in; the best of a few."""
    dtype = getattr(torch, held_dtype(held, device))
    left = torch.randn(2048, 2048, device=device).to(dtype)
    return 2 * 2048**3 / min(seconds(lambda: left @ left, device) for _ in range(5))


def passages_of(base: str, lengths: list[int], count: int) -> list[list[int]]:
    """Token ids of shipped test abstracts, at their own lengths up to 500, or cut to `lengths` in turn."""
    tokenizer = load_base(BaseConfig(path=base)).tokenizer
    found = [row["input_ids"] for row in load_passages(["arxiv-test"], tokenizer, "test")]
    if not lengths:
        return [ids[:500] for ids in found[:count]]
    made = []
    for i in range(count):
        length = lengths[i % len(lengths)]
        made.append(next(ids for ids in found[i:] + found if len(ids) >= length)[:length])
    return made


def resident_peak() -> int:
    """Most bytes that this program had in memory: not `ru_maxrss`, which starts at what its parent had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def memory_of(variant: str, options: argparse.Namespace) -> int:
    """Bytes at the peak of a variant's step, in a process of its own."""
    command = [sys.executable, __file__, "--base", options.base, "--passages", str(options.passages), "--only", variant]
    command += ["--dtype", options.dtype, *(["--shape", options.shape] if options.shape else [])]
    lengths = ["--lengths", *map(str, options.lengths)] if options.lengths else []
    done = subprocess.run([*command, *lengths], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def measure(
    variants: list[str], lengths: list[int], options: argparse.Namespace, device: torch.device, memory: bool = True
) -> dict[str, Any]:
    """Figures of these variants, in turn, on passages of these lengths; printed, too."""
    passages = passages_of(options.base, lengths, options.passages)
    work: dict[str, Callable[[], None]] = {}
    flops: dict[str, int] = {}
    for variant in variants:
        model = build(variant, options, device)
        data = batches(model, passages, variant)
        with FlopCounterMode(display=False) as counter:
            run(model, data, variant)  # warms up, too
        flops[variant] = counter.get_total_flops()
        work[variant] = partial(run, model, data, variant)
    taken: dict[str, list[float]] = {variant: [] for variant in variants}
    peaks = [peak(device, options.dtype)]
    for _ in range(options.repeats):
        for variant, step in work.items():
            taken[variant].append(seconds(step, device))
        peaks.append(peak(device, options.dtype))
    median = {variant: statistics.median(times) for variant, times in taken.items()}
    sizes = {variant: memory_of(variant, options) for variant in variants} if options.memory and memory else {}
    best, mean = max(peaks), sum(map(len, passages)) / len(passages)
    print(f"{len(passages)} passages of {mean:.0f} tokens on average; products at {best / 1e9:.0f} GFLOP/s")
    print(f"{'':<26}{'s':>8}{'passages/s':>12}{'of the peak':>13}{'x ours':>8}{'GB':>8}")
    rows = {}
    for variant, time_taken in median.items():
        rows[variant] = {
            "seconds": taken[variant],
            "median": time_taken,
            "passages_per_second": len(passages) / time_taken,
            "flops": flops[variant],
            "share_of_peak": flops[variant] / time_taken / best,
            "bytes": sizes.get(variant),
        }
        size = f"{sizes[variant] / 1e9:8.2f}" if sizes else ""
        print(
            f"{variant:<26}{time_taken:8.2f}{len(passages) / time_taken:12.2f}"
            f"{flops[variant] / time_taken / best:12.0%} {time_taken / median[OURS]:8.2f}{size}",
            flush=True,
        )
    return {"lengths": lengths or "natural", "passages": len(passages), "peaks": peaks, "variants": rows}


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds a passage against its length, of ours and the published recipe."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for variant, style in ((OURS, "o-"), (PUBLISHED, "x--")):
        points = [(one["lengths"][0], 1 / one["variants"][variant]["passages_per_second"]) for one in result["at"]]
        axes.plot(*zip(*points, strict=True), style, label=variant)
    axes.set(xscale="log", ylim=(0, None), xlabel="tokens of a passage", ylabel="seconds of a step for each passage")
    axes.set_xticks([one["lengths"][0] for one in result["at"]], [str(one["lengths"][0]) for one in result["at"]])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/arxiv-mini/base")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this size instead of a base")
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="*", default=[])
    parser.add_argument("--at", type=int, nargs="*", default=[], help="ours and the published recipe at these, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of frozen weights")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = current_device()
    if options.only:
        passages = passages_of(options.base, options.lengths, options.passages)
        model = build(options.only, options, device)
        run(model, batches(model, passages, options.only), options.only)
        used = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
        print(json.dumps({"bytes": used}))
        return 0
    result = {
        "base": options.shape or options.base,
        "device": device.type,
        "threads": options.threads,
        "machine": platform.machine(),
    }
    result |= {"dtype": held_dtype(options.dtype, device), "instructions": torch.backends.cpu.get_cpu_capability()}
    result |= {"torch": torch.__version__, **measure(options.variants, options.lengths, options, device)}
    result["at"] = [measure([OURS, PUBLISHED], [length], options, device, False) for length in options.at]
    if options.output:
        write_json(options.output, result)
        if options.at:
            plot(result, Path(options.output).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
