"""LoRA adapters: which layers of a base get them, and which of them runs.

A compressor has one adapter or two (`READER`, `WRITER`). Which of them runs is a property of the calling thread, not of
the layers: threads that share a compressor do not see each other's, and outside `adapter` none runs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.config import CompressorConfig

READER, WRITER = "default", "writer"
"""PEFT's names of the adapters: of the passage (and, without a writer, of memory tokens), and of memory tokens."""


class _Running(threading.local):
    name: str | None = None


_running = _Running()


@contextmanager
def adapter(name: str | None) -> Iterator[None]:
    """Run the adapter of this name, or none, in the calling thread for the block."""
    before, _running.name = _running.name, name
    try:
        yield
    finally:
        _running.name = before


class AdaptedLinear(lora.Linear):
    """PEFT's LoRA layer, with `adapter` as its switch and products in the type the base computes in.

    PEFT's own switch is a flag on every layer, which threads share, and its forward pass casts the input to the
    adapter's float32 and back.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x W + scale * dropout(x) A B` with the running adapter, `x W` where none runs or it is not on this layer."""
        name = _running.name
        if name is None or name not in self.lora_A:
            return self.base_layer(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        out = self.base_layer(rows, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            rows = self.lora_dropout[name](rows)
        down, up = (cast(nn.Linear, part[name]).weight.to(out.dtype) for part in (self.lora_A, self.lora_B))
        inner = nn.functional.linear(rows.to(out.dtype), down)
        # In place: one pass over the output less. No gradient needs the base's own output.
        return out.addmm_(inner, up.t(), alpha=self.scaling[name]).view(*x.shape[:-1], -1)


def add_adapters(base: Base, config: CompressorConfig, reads_hidden_states: bool, writer: bool) -> PeftModel:
    """Wrap the base's linear layers, in place, in the adapters of a compressor; all of them trainable.

    Args:
        reads_hidden_states: whether the method reads the last hidden states, which every layer feeds, rather than keys
            and values.
        writer: whether memory tokens have an adapter of their own.
    """
    ranks = {READER: config.lora_rank} | ({WRITER: config.writer_rank} if writer else {})
    reached = _reached_layers(base, reads_hidden_states, writer)
    configs = {name: _lora_config(base, config, rank, reached[name]) for name, rank in ranks.items()}
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft = PeftModel(base.model, configs[READER], adapter_name=READER)
        if writer:
            peft.add_adapter(WRITER, configs[WRITER])
    for name, parameter in peft.named_parameters():
        # PEFT freezes all adapters but its active one.
        parameter.requires_grad_(".lora_" in name)
    return peft


def _lora_config(base: Base, config: CompressorConfig, rank: int, reached: dict[str, bool]) -> LoraConfig:
    """LoRA on the chosen linear layers, except where no gradient can reach."""
    chosen = [name for name, useful in reached.items() if useful]
    if config.lora_targets != "all-linear":
        leaves = {name.split(".")[-1] for name in reached}
        for target in config.lora_targets:
            if target not in leaves:
                raise CompressorError(
                    f"compressor.lora_targets names {target!r}, which {base.name} does not have; its linear layers are "
                    f"{', '.join(sorted(leaves))}"
                )
        chosen = [name for name in chosen if name.split(".")[-1] in config.lora_targets]
    if not chosen:
        raise CompressorError(
            f"no memory of {base.name} depends on compressor.lora_targets = {config.lora_targets}: keys and values of "
            "the last layer do not depend on its queries, output and MLP; name the key and value projections too"
        )
    made = LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha * rank / config.lora_rank,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=chosen,
        bias="none",
    )
    made._register_custom_module({nn.Linear: AdaptedLinear})
    return made


def _reached_layers(base: Base, reads_hidden_states: bool, writer: bool) -> dict[str, dict[str, bool]]:
    """For each adapter the decoder's linear layers, and whether what the encoder reads depends on them.

    A KV memory is made of keys and values alone, and those of the last layer do not depend on its queries, its output
    projection or its MLP; what memory tokens read of the passage ends a layer earlier. Rather than know the names in
    every family, scale each layer's output by a 1 that takes a gradient, and see which ones the memory depends on.
    """
    ones: dict[tuple[str | None, str], Tensor] = {}
    handles = []

    def scaled(name: str, out: Tensor) -> Tensor:
        one = ones.setdefault((_running.name, name), torch.ones((), device=base.device, requires_grad=True))
        return out * one.to(out.dtype)

    for name, module in base.model.get_decoder().named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(lambda _module, _inputs, out, name=name: scaled(name, out)))
    try:
        with torch.enable_grad():
            embedded, positions, allowed = base.probe_inputs()
            inputs, cache = (embedded, positions, allowed), None
            if writer:
                with adapter(READER):
                    cache = base.read(*inputs)
                inputs = embedded, positions, allowed.new_ones(1, 4, 8)
            with adapter(WRITER if writer else READER):
                if reads_hidden_states:
                    # Of normed states the plain sum hardly depends on what comes before the norm.
                    total = base.hidden_states(*inputs, cache=cache).float().square().sum()
                else:
                    keys, values = base.keys_and_values(*inputs, last=4, cache=cache)
                    total = keys.float().sum() + values.float().sum()
            gradients = torch.autograd.grad(total, list(ones.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    prefix = next(name for name, module in base.model.named_modules() if module is base.model.get_decoder())
    reached: dict[str, dict[str, bool]] = {}
    for (which, name), gradient in zip(ones, gradients, strict=True):
        assert which is not None
        # What is cached of the passage in the last layer is cut off the memory: its gradient is there, and 0.
        reached.setdefault(which, {})[f"{prefix}.{name}"] = gradient is not None and bool(gradient)
    return reached
