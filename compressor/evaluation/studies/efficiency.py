"""Study `efficiency`: what a memory saves against the full passage, by formula and measured.

A prompt is *new* when its passage must still be read (or compressed), *reused* when the passage's keys and values (or
its memory) are there already, and *reread* when the memory is there but a passage, whose keys and values nobody keeps,
must be read again. FLOPs, bytes of keys and values and of activations follow from the sizes of the base
(`compressor/evaluation/flops.py`); times and peak memory are measured on the base itself.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig

from compressor.errors import CompressorError
from compressor.evaluation.command import EvaluationConfig
from compressor.evaluation.flops import Cost, Setting, Shape
from compressor.evaluation.methods import checkpoint_fingerprint
from compressor.evaluation.studies import Findings
from compressor.evaluation.studies.plots import efficiency_plot
from compressor.evaluation.studies.timing import (
    Peaks,
    Times,
    machine,
    median,
    peak_memory,
    time_all,
    tokens_per_second,
    variants,
)
from compressor.methods.interface import check_tokens
from compressor.model import Compressor
from compressor.model_config import CompressorConfig
from compressor.progress import Progress
from compressor.unfinished import Unfinished

LENGTH = 500
"""Passage tokens where none are asked for, as in the published evaluation."""
KEYS = ["base", "prompt", "length", "tokens", "new_tokens"]
FIGURES = (
    *("flops_saved", "kv_saved", "activations_saved", "first_token_speedup", "time_saved"),
    *("tokens_per_second", "full_tokens_per_second", "peak_saved"),
)

PROMPTS = {"new": (True, True), "reused": (False, False), "reread": (True, False)}
"""For each kind of prompt whether the full passage must be read, and whether the memory must be made."""
LLAMA = "Llama-3-8B"
LLAMA_RANK = 64
"""LoRA rank of the published compressor."""
BF16 = 2
PUBLISHED = {"computation": (27, 90), "memory": (55, 83)}
"""Percent saved with one memory token for 500, 100 to 400 new tokens, new and reused prompts (2408.03094, abstract)."""


def llama_shape() -> Shape:
    """Llama-3-8B as its configuration file has it (arXiv 2407.21783, table 3)."""
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    )
    return Shape.of(config)


def efficiency(config: EvaluationConfig, accelerator: Accelerator, parts: Unfinished) -> Findings | None:
    """Run the study; the main process alone measures, so that others do not disturb it.

    Raises:
        CompressorError: settings that mean nothing here, a passage over the compressor's limit, or a base whose layers
            the formulas do not describe.
    """
    check_settings(config)
    model = Compressor.from_pretrained(
        config.checkpoint,
        base=config.base,
        device=accelerator.device,
        dtype=config.dtype,
        base_mismatch=config.base_mismatch,
    )
    settings, base = model.config, model.base
    if settings.method != "kv":
        raise CompressorError(
            f"{config.checkpoint} holds the method {settings.method}, and this study counts what kv computes: give a "
            "checkpoint of kv"
        )
    check_tokens(config.tokens or [1], settings.memory_tokens, config.checkpoint)
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

    adapters = lora_parameters(model)
    value_bytes = base.embeddings.weight.element_size()
    rows: list[dict[str, Any]] = []
    name = base.name.rstrip("/").rsplit("/", 2)[-2:] if base.name.endswith("/base") else [base.name.rsplit("/", 1)[-1]]
    for length in lengths:
        timed, peaks = measure(model, length, sizes, config)
        for prompt, (new_full, new_memory) in PROMPTS.items():
            for tokens in sizes:
                for count in sorted(config.new_tokens):
                    key = {"base": "/".join(name), "prompt": prompt, "length": length, "tokens": tokens}
                    setting = Setting(shape, length, count, value_bytes=value_bytes)
                    row = analytic(setting, prompt, tokens, adapters, settings)
                    row |= measured_row(timed, peaks, tokens, count, new_full, new_memory)
                    rows.append({**key, "new_tokens": count, "n": config.repeats, **row})
    llama = llama_shape()
    for length in lengths:
        for prompt in PROMPTS:
            for tokens in sizes:
                for count in sorted(config.new_tokens):
                    setting = Setting(llama, length, count, value_bytes=BF16)
                    row = analytic(setting, prompt, tokens, llama.lora_parameters(LLAMA_RANK), settings)
                    key = {"base": LLAMA, "prompt": prompt, "length": length, "tokens": tokens}
                    rows.append({**key, "new_tokens": count, "n": None, **row})
    published = compare_published()
    metrics = {
        "keys": KEYS,
        "figures": [name for name in FIGURES if any(row.get(name) is not None for row in rows)],
        "rows": rows,
        "published": published,
        "machine": machine(base.device),
        "shapes": {"/".join(name): asdict(shape), LLAMA: asdict(llama)},
        "adapters": {"/".join(name): adapters, LLAMA: llama.lora_parameters(LLAMA_RANK)},
        "notes": notes(model, config, published),
        "checkpoint": {"path": config.checkpoint, "fingerprint": checkpoint_fingerprint(model)},
        "base": {"path": base.name, "fingerprint": base.fingerprint, "dtype": config.dtype},
    }
    return Findings(metrics, lambda folder: efficiency_plot(rows, sizes[0], folder))


def check_settings(config: EvaluationConfig) -> None:
    """Raise a `CompressorError` for settings that this study cannot follow."""
    why_not = {"data": "costs do not depend on the text", "segment_tokens": "it is of one segment"}
    for name in ("data", "methods", "split_date", "published", "segment_tokens", "refine_steps"):
        if getattr(config, name):
            why = why_not.get(name, "only the checkpoint and full are compared")
            raise CompressorError(f"{name} cannot be used with --task efficiency ({why}): leave it out")
    if min(config.new_tokens) < 2:
        raise CompressorError(f"new_tokens = {config.new_tokens}: a rate needs at least 2 new tokens")


def shape_of(model: Compressor) -> Shape:
    """The base's sizes, checked against its weights; a `CompressorError` if the formulas do not describe it."""
    base = model.base
    with_adapters = [name for name, _ in base.model.get_decoder().named_parameters() if "lora_" not in name]
    parameters = dict(base.model.get_decoder().named_parameters())
    table = base.embeddings.weight
    held = sum(parameters[name].numel() for name in with_adapters if parameters[name].dim() > 1) - table.numel()
    for matrices in (3, 2):
        try:
            shape = Shape.of(base.model.config.get_text_config(), matrices)
        except AttributeError:
            break
        if shape.layers * shape.layer_weights == held:
            return shape
    raise CompressorError(
        f"{base.name} ({base.model.config.model_type}) has {held:,} weights in its layers, which are not those of "
        "attention and an MLP of two or three matrices, so its FLOPs cannot be counted: use another base"
    )


def lora_parameters(model: Compressor) -> int:
    """Parameters of the encoder's adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


@torch.no_grad()
def measure(
    model: Compressor, length: int, sizes: list[int], config: EvaluationConfig
) -> tuple[dict[int | None, list[Times]], dict[int | None, Peaks]]:
    """Times and peak memory of the full passage (None) and of every size, on random tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = len(model.base.embeddings.weight)
    passage = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
    chosen = variants(model, passage, sizes)
    progress = Progress(f"{length} tokens", (config.repeats + 2) * len(chosen), "runs")
    timed = time_all(model, chosen, config.new_tokens, config.repeats, progress.add)
    peaks = {}
    for name, variant in chosen.items():
        peaks[name] = peak_memory(model, variant, config.new_tokens)
        progress.add()
    progress.close()
    return timed, peaks


def analytic(setting: Setting, prompt: str, tokens: int, adapters: int, settings: CompressorConfig) -> dict[str, Any]:
    """Costs by formula of the full passage and of the memory, and percent saved."""
    new_full, new_memory = PROMPTS[prompt]
    full = setting.full(new_full)
    memory = setting.memory(tokens, new_memory, adapters, settings.passage_attention == "bidirectional")
    return {
        **{f"full_{name}": value for name, value in asdict(full).items()},
        **asdict(memory),
        **savings(full, memory),
    }


def savings(full: Cost, memory: Cost) -> dict[str, float]:
    """Percent that a memory saves of each cost; negative where it costs more."""
    return {
        "flops_saved": saved(full.flops, memory.flops),
        "pairs_saved": saved(full.pairs, memory.pairs),
        "kv_saved": saved(full.kv_bytes, memory.kv_bytes),
        "kv_peak_saved": saved(full.kv_peak_bytes, memory.kv_peak_bytes),
        "activations_saved": saved(full.activation_bytes, memory.activation_bytes),
    }


def saved(full: float, memory: float) -> float:
    """Percent of `full` that is saved."""
    return 100 * (1 - memory / full)


def measured_row(
    timed: dict[int | None, list[Times]],
    peaks: dict[int | None, Peaks],
    tokens: int,
    count: int,
    new_full: bool,
    new_memory: bool,
) -> dict[str, Any]:
    """Medians of the times, peaks, and what a memory of `tokens` saves of them."""
    full, memory = timed[None], timed[tokens]
    found: dict[str, Any] = {}
    for prefix, runs, new, peak in (
        ("full_", full, new_full, peaks[None]),
        ("", memory, new_memory, peaks[tokens]),
    ):
        found[f"{prefix}reading_seconds"] = median_reading(runs) if new else 0.0
        found[f"{prefix}first_token_seconds"] = median(runs, new, 1)
        found[f"{prefix}seconds"] = median(runs, new, count)
        found[f"{prefix}tokens_per_second"] = tokens_per_second(runs, count)
        found[f"{prefix}peak_bytes"] = (peak.new if new else peak.reused)[count]
    found["first_token_speedup"] = found["full_first_token_seconds"] / found["first_token_seconds"]
    found["time_saved"] = saved(found["full_seconds"], found["seconds"])
    found["peak_saved"] = saved(found["full_peak_bytes"], found["peak_bytes"])
    return found


def median_reading(runs: list[Times]) -> float:
    """Median seconds of reading (prefill) or compressing the passage."""
    return statistics.median(run.reading for run in runs)


def compare_published() -> dict[str, Any]:
    """The published setting (Llama-3-8B, 500 tokens to one, causal passage) in every quantity that the claim may mean.

    The abstract says "27-90% reduction in calculations and 55-83% memory savings when generating 100-400 tokens for new
    and reused prompts". Pairs of query and key that attention computes give the first range, positions of keys and
    values the second; all FLOPs do not.
    """
    rows = []
    shape = llama_shape()
    adapters = shape.lora_parameters(LLAMA_RANK)
    for prompt, (new_full, new_memory) in PROMPTS.items():
        for count in (100, 400):
            setting = Setting(shape, LENGTH, count, value_bytes=BF16)
            full, memory = setting.full(new_full), setting.memory(1, new_memory, adapters, bidirectional=False)
            found = {name: round(value, 1) for name, value in savings(full, memory).items()}
            rows.append({"prompt": prompt, "new_tokens": count, **found})
    return {
        "source": "500xCompressor, arXiv 2408.03094 (ACL 2025), abstract",
        "base": "Llama-3-8B-Instruct",
        "length": LENGTH,
        "tokens": 1,
        "computation_saved": PUBLISHED["computation"],
        "memory_saved": PUBLISHED["memory"],
        "rows": rows,
    }


def spread(published: dict[str, Any], name: str, prompts: tuple[str, ...]) -> str:
    """Smallest and largest of a saving over some prompts, in percent."""
    values = [row[name] for row in published["rows"] if row["prompt"] in prompts]
    return f"{min(values):.1f} to {max(values):.1f}%"


def notes(model: Compressor, config: EvaluationConfig, published: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    found = machine(model.base.device)
    meter = (
        "torch.cuda.max_memory_allocated"
        if model.base.device.type == "cuda"
        else "bytes of live tensors that operations made (scratch space inside an operation is not seen)"
    )
    device = "" if found["device"] == "cpu" else f" on {found['device']}"
    both = ("new", "reused")
    rereading = spread(published, "flops_saved", ("reread",))
    return [
        "Savings against the full passage. new: the passage must be read or compressed. reused: its keys and values, "
        "or its memory, are there already. reread: the memory is there, the passage must be read again. FLOPs, KV and "
        "activations by formula (compressor/evaluation/flops.py), KV when the last token is written.",
        f"Times: medians of {config.repeats} runs, full and memory in turn, {found['threads']} threads of "
        f"{found['processor']}{device}, {config.dtype}, batch of one. Peak memory, beyond the weights: {meter}.",
        f"Published ({published['source']}; {published['base']}, 500 tokens to 1): 27-90% less computation, 55-83% "
        f"less memory. With these formulas, new and reused prompts, 100 and 400 new tokens: query-key pairs "
        f"{spread(published, 'pairs_saved', both)}, KV bytes {spread(published, 'kv_saved', both)}, all FLOPs "
        f"{spread(published, 'flops_saved', both)}. So the published computation matches attention's pairs and the "
        "published memory the keys and values, weights and activations left out; of all FLOPs the linear layers take "
        "most, and they run once for every token that is read, whether to read it or to compress it. Where the full "
        f"passage must be read again and the memory not, all FLOPs fall by {rereading}.",
    ]
