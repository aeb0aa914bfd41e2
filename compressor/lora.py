"""Which layers of a base get LoRA."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import Tensor, nn

from compressor.base import Base
from compressor.errors import CompressorError
from compressor.model_config import CompressorConfig


def lora_config(base: Base, config: CompressorConfig, reads_hidden_states: bool = False) -> LoraConfig:
    """LoRA on the chosen linear layers, except where no gradient can reach.

    Args:
        reads_hidden_states: whether the method reads the last hidden states, which every layer feeds, rather than keys
            and values.
    """
    reached = _linear_layers(base, reads_hidden_states)
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
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=chosen,
        bias="none",
    )


def _linear_layers(base: Base, reads_hidden_states: bool) -> dict[str, bool]:
    """The decoder's linear layers, and whether what the encoder reads depends on them.

    A KV memory is made of keys and values alone, and those of the last layer do not depend on its queries, its output
    projection or its MLP. Rather than know the names in every family, scale each layer's output by a 1 that takes a
    gradient, and see which ones the cache depends on.
    """
    ones: dict[str, Tensor] = {}
    handles = []
    for name, module in base.model.get_decoder().named_modules():
        if isinstance(module, nn.Linear):
            one = ones[name] = torch.ones((), device=base.device, requires_grad=True)
            handles.append(module.register_forward_hook(lambda _module, _inputs, out, one=one: out * one.to(out.dtype)))
    try:
        with torch.enable_grad():
            if reads_hidden_states:
                # Of normed states the plain sum hardly depends on what comes before the norm.
                total = base.hidden_states(*base.probe_inputs()).float().square().sum()
            else:
                keys, values = base.keys_and_values(*base.probe_inputs())
                total = keys.float().sum() + values.float().sum()
            gradients = torch.autograd.grad(total, list(ones.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    prefix = next(name for name, module in base.model.named_modules() if module is base.model.get_decoder())
    return {
        f"{prefix}.{name}": gradient is not None for (name, _), gradient in zip(ones.items(), gradients, strict=True)
    }
