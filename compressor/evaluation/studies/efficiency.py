"""Study `efficiency`: what a memory saves against the full passage, by formula and measured.

A prompt is *new* when its passage must still be read (or compressed), *reused* when the passage's keys and values (or
its memory) are there already, and *reread* when the memory is there but a passage, whose keys and values nobody keeps,
must be read again. FLOPs and bytes of keys and values follow from the sizes of the base
(`compressor/evaluation/flops.py`); times are measured on the base itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from compressor.api import Compressor
from compressor.errors import CompressorError
from compressor.evaluation.flops import Cost, Setting, Shape
from compressor.evaluation.report import figure
from compressor.evaluation.settings import EfficiencySettings
from compressor.evaluation.studies import Findings
from compressor.methods.interface import check_tokens
from compressor.model.base import Base
from compressor.model.checkpoint import compressor_fingerprint, fetch_checkpoint, read_settings
from compressor.model.decoder import token_prefix
from compressor.model.generation import stream
from compressor.model.lora import READER, WRITER
from compressor.model.memory import memory_prefix
from compressor.progress import Progress
from compressor.unfinished import Unfinished

LENGTH = 500
"""Passage tokens where none are asked for, as in the published evaluation."""
FIGURES = ("flops_saved", "kv_saved", "first_token_speedup", "time_saved", "tokens_per_second")
PROMPTS = {"new": (True, True), "reused": (False, False), "reread": (True, False)}
"""For each kind of prompt whether the full passage must be read, and whether the memory must be made."""
PUBLISHED = (
    "500xCompressor, arXiv 2408.03094 (ACL 2025), abstract; Llama-3-8B-Instruct, 500 tokens to 1): 27-90% less "
    "computation, 55-83% less memory"
)
LLAMA = Shape(
    layers=32,
    hidden=4096,
    query_size=4096,
    kv_size=1024,
    layer_weights=2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336,
    vocabulary=128256,
)
"""Llama-3-8B (arXiv 2407.21783, table 3)."""
LLAMA_ADAPTERS = 64 * (32 * 10_240 + 31 * 71_680)
"""LoRA of rank 64 on its linear layers, in and out, but for what no memory depends on in the last one."""


def efficiency(config: EfficiencySettings, accelerator: Accelerator, parts: Unfinished) -> Findings | None:
    """Run the study; the main process alone measures, so that others do not disturb it.

    Raises:
        CompressorError: settings that mean nothing here, a passage over the compressor's limit, or a base whose layers
            the formulas do not describe.
    """
    if min(config.new_tokens) < 2:
        raise CompressorError(f"new_tokens = {config.new_tokens}: a rate needs at least 2 new tokens")
    held = read_settings(fetch_checkpoint(config.checkpoint))["config"]["memory_tokens"]
    check_tokens(config.tokens or [1], held, config.checkpoint)  # before a base is loaded, which takes long
    model = Compressor.from_pretrained(config.checkpoint, device=accelerator.device, **config.loading)
    settings, base = model.config, model.base
    if settings.method != "kv":
        raise CompressorError(
            f"{config.checkpoint} holds the method {settings.method}, and this study counts what kv computes: give a "
            "checkpoint of kv"
        )
    sizes = config.tokens or list(dict.fromkeys([settings.memory_tokens, 1]))
    sizes = [size for size in sizes if model.encoder.trained_for(size)]
    lengths = config.lengths or [min(LENGTH, settings.max_passage_tokens)]
    if max(lengths) > settings.max_passage_tokens:
        raise CompressorError(
            f"lengths = {lengths}: {config.checkpoint} compresses up to {settings.max_passage_tokens} tokens at once, "
            "and this study is of one segment: ask for shorter passages"
        )
    shape = shape_of(model)
    if not accelerator.is_main_process:
        return None
    value_bytes = base.embeddings.weight.element_size()
    encoder = (
        lora_parameters(model, READER),
        settings.passage_attention == "bidirectional",
        lora_parameters(model, WRITER) if model.has_writer else None,
    )
    parts.expect({"weights": compressor_fingerprint(model, settings=True)})
    rows: list[dict[str, Any]] = []
    for length in lengths:
        timed = kept_times(parts, length)
        if timed is None:
            timed = measure(model, length, sizes, config)
            times = [[name, [asdict(one) for one in runs]] for name, runs in timed.items()]
            parts.add([{"length": length, "times": times}])
        for prompt, (new_full, new_memory) in PROMPTS.items():
            for tokens in sizes:
                for count in sorted(config.new_tokens):
                    setting = Setting(shape, length, count, value_bytes)
                    full, memory = setting.full(new_full), setting.memory(tokens, new_memory, *encoder)
                    row: dict[str, Any] = {"prompt": prompt, "length": length, "tokens": tokens, "new_tokens": count}
                    row |= {"n": config.repeats, **{f"full_{name}": value for name, value in asdict(full).items()}}
                    row |= asdict(memory) | savings(full, memory)
                    rows.append(row | measured(timed[None], timed[tokens], count, new_full, new_memory))
    metrics = {
        "keys": ["prompt", "length", "tokens", "new_tokens"],
        "figures": list(FIGURES),
        "rows": rows,
        "published": published_rows(),
        "machine": {"threads": torch.get_num_threads(), "device": device_name(base.device)},
        "notes": notes(config, base),
        "checkpoint": {"path": config.checkpoint, "fingerprint": compressor_fingerprint(model, settings=True)},
        "base": {"path": base.name, "fingerprint": base.fingerprint, "dtype": base.dtype_name},
    }
    return Findings(metrics, lambda folder: draw(rows, sizes[0], folder))


def shape_of(model: Compressor) -> Shape:
    """The base's sizes; a `CompressorError` if the formulas do not describe it."""
    base, config = model.base, model.base.model.config.get_text_config()
    named = base.model.get_decoder().named_parameters()
    weights = [p for name, p in named if "lora_" not in name and p.dim() > 1]
    if any(p.dim() > 2 for p in weights):
        raise CompressorError(
            f"{base.name} ({config.model_type}) has experts, of which a token takes some, so its FLOPs cannot be "
            "counted: use another base"
        )
    held = sum(p.numel() for p in weights) - base.embeddings.weight.numel()
    queries, keys = config.num_attention_heads * base.head_size, base.kv_heads * base.head_size
    return Shape(base.layers, base.hidden, queries, keys, held // base.layers, config.vocab_size)


def lora_parameters(model: Compressor, adapter: str = READER) -> int:
    """Parameters of one of the encoder's adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in name)


def savings(full: Cost, memory: Cost) -> dict[str, float]:
    """Percent that a memory saves of each cost; negative where it costs more."""
    return {
        "flops_saved": saved(full.flops, memory.flops),
        "pairs_saved": saved(full.pairs, memory.pairs),
        "kv_saved": saved(full.kv_bytes, memory.kv_bytes),
    }


def saved(full: float, memory: float) -> float:
    """Percent of `full` that is saved."""
    return 100 * (1 - memory / full)


@dataclass
class Times:
    """Seconds of one run."""

    reading: float
    """Until the passage is read or compressed."""
    written: dict[int, float] = field(default_factory=dict)
    """From then on until so many new tokens are written."""


def kept_times(parts: Unfinished, length: int) -> dict[int | None, list[Times]] | None:
    """What `measure` found for a length before an interruption."""
    for part in parts.parts:
        if part["length"] == length:
            return {
                name: [Times(one["reading"], {int(n): s for n, s in one["written"].items()}) for one in runs]
                for name, runs in part["times"]
            }
    return None


def time_once(model: Compressor, passage: Sequence[int], tokens: int | None, new_tokens: Sequence[int]) -> Times:
    """Read a passage (None) or compress it to `tokens`, then decode greedily; no EOS ends that."""

    def clock() -> float:
        if model.base.device.type == "cuda":
            torch.cuda.synchronize(model.base.device)
        return time.perf_counter()

    marks, started = {1, *new_tokens}, clock()
    if tokens is None:
        prefix = token_prefix(model.base, [passage])
        read = clock()
    else:
        kept = model.compress_ids([passage], tokens, segment_tokens=len(passage))[0]
        read = clock()
        prefix = memory_prefix(model.base, [kept])
    times = Times(read - started)
    steps = stream(model.base, prefix, [[model.base.bos]], [max(marks)], ends=False)
    for count, _ in enumerate(steps, start=1):
        if count in marks:
            times.written[count] = clock() - read
    return times


@torch.no_grad()
def measure(
    model: Compressor, length: int, sizes: Sequence[int], config: EfficiencySettings
) -> dict[int | None, list[Times]]:
    """Times of the full passage (None) and of every size in turn, on random tokens, after a round that warms up."""
    generator = torch.Generator().manual_seed(config.seed)
    passage = torch.randint(3, len(model.base.embeddings.weight), (length,), generator=generator).tolist()
    found: dict[int | None, list[Times]] = {name: [] for name in (None, *sizes)}
    progress = Progress(f"{length} tokens", (config.repeats + 1) * len(found), "runs")
    for repeat in range(config.repeats + 1):
        for name, runs in found.items():
            times = time_once(model, passage, name, config.new_tokens)
            runs += [times] if repeat else []
            progress.add()
    progress.close()
    return found


def measured(
    full: Sequence[Times], memory: Sequence[Times], count: int, new_full: bool, new_memory: bool
) -> dict[str, float]:
    """Medians of the times, and what the memory saves of them."""
    found: dict[str, float] = {}
    for prefix, runs, new in (("full_", full, new_full), ("", memory, new_memory)):
        for name, mark in (("first_token_seconds", 1), ("seconds", count)):
            found[prefix + name] = statistics.median(run.written[mark] + run.reading * new for run in runs)
        rates = [(count - 1) / (run.written[count] - run.written[1]) for run in runs]
        found[f"{prefix}tokens_per_second"] = statistics.median(rates)
    found["first_token_speedup"] = found["full_first_token_seconds"] / found["first_token_seconds"]
    return found | {"time_saved": saved(found["full_seconds"], found["seconds"])}


def published_rows() -> list[dict[str, Any]]:
    """The published setting (Llama-3-8B, 500 tokens to one, causal passage) in every quantity that the claim may mean.

    The abstract says "27-90% reduction in calculations and 55-83% memory savings when generating 100-400 tokens for new
    and reused prompts". Pairs of query and key that attention computes give the first range, positions of keys and
    values the second; all FLOPs do not.
    """
    rows: list[dict[str, Any]] = []
    for prompt, (new_full, new_memory) in PROMPTS.items():
        for count in (100, 400):
            setting = Setting(LLAMA, LENGTH, count)
            full, memory = setting.full(new_full), setting.memory(1, new_memory, LLAMA_ADAPTERS, bidirectional=False)
            found = {name: round(value, 1) for name, value in savings(full, memory).items()}
            rows.append({"prompt": prompt, "new_tokens": count, **found})
    return rows


def device_name(device: torch.device) -> str:
    """What the times were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), device.type)


def notes(config: EfficiencySettings, base: Base) -> list[str]:
    """What a reader of the table must know; the third is the README's."""

    def spread(name: str, *prompts: str) -> str:
        values = [row[name] for row in published_rows() if row["prompt"] in prompts]
        return f"{min(values):.1f} to {max(values):.1f}%"

    both = ("new", "reused")
    return [
        "Savings against the full passage. new: the passage must be read or compressed. reused: its keys and values, "
        "or its memory, are there already. reread: the memory is there, the passage must be read again. FLOPs and KV "
        "by formula (compressor/evaluation/flops.py), KV when the last token is written.",
        f"Times: medians of {config.repeats} runs, full and memory in turn, {torch.get_num_threads()} threads, "
        f"{device_name(base.device)}, {base.dtype_name}, batch of one.",
        f"Published ({PUBLISHED}. With these formulas, new and reused prompts, 100 and 400 new tokens: query-key pairs "
        f"{spread('pairs_saved', *both)}, KV bytes {spread('kv_saved', *both)}, all FLOPs "
        f"{spread('flops_saved', *both)}. So the published computation matches attention's pairs and the "
        "published memory the keys and values, weights and activations left out; of all FLOPs the linear layers take "
        "most, and they run once for every token that is read, whether to read it or to compress it. Where the full "
        f"passage must be read again and the memory not, all FLOPs fall by {spread('flops_saved', 'reread')}.",
    ]


def draw(rows: Sequence[dict[str, Any]], tokens: int, folder: Path) -> None:
    """`efficiency.png`: what is saved with so many memory tokens against the full passage, by prompt and new tokens."""
    canvas, axes = figure(height=4.0)
    chosen = [row for row in rows if row["tokens"] == tokens]
    names = {"flops_saved": "FLOPs", "kv_saved": "KV bytes", "time_saved": "time, measured"}
    for number, (name, label) in enumerate(names.items()):
        axes.bar(np.arange(len(chosen)) + 0.28 * (number - 1), [row[name] for row in chosen], 0.28, label=label)
    axes.set_xticks(range(len(chosen)), [f"{row['prompt']}\n{row['new_tokens']}" for row in chosen], fontsize="x-small")
    axes.set(xlabel="prompt, new tokens", ylabel=f"saved by {tokens} memory tokens (%)")
    axes.axhline(0, color="0.3", linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")
    canvas.savefig(folder / "efficiency.png")
