"""Loads a base: from a folder, the hub, a GGUF file, or by name; in the type, place and quantisation asked for."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressor.errors import CompressorError, first_line, lacking, require
from compressor.model.base import Base
from compressor.model.bases import locate, remedy
from compressor.model.config import BaseConfig
from compressor.model.fingerprints import fingerprint
from compressor.model.kernels import GROUPED, lighten_norms
from compressor.model.support import refuse_unsupported
from compressor.processes import bars_on_terminals, check_device, held_dtype


def load_base(config: BaseConfig, device: str | torch.device = "cpu") -> Base:
    """Load the base from a folder, the hub or a GGUF file, or by name (`compressor/model/bases.py`).

    Raises:
        CompressorError: it is not there, is damaged, or is of a kind that cannot work; or there is no such device.
    """
    check_device(device)
    # The command line checks these; the Python API comes straight here.
    hints = get_type_hints(BaseConfig)
    for name in ("dtype", "attention", "quantization"):
        known, value = get_args(hints[name]), getattr(config, name)
        require(value in known, f"base.{name}", value, f"one of {', '.join(known)}")
    path = locate(config.path, config.revision)
    attention: str = config.attention
    dtype = getattr(torch, held_dtype(config.dtype, torch.device(device)))
    if attention == "auto":
        attention = GROUPED
    extra: dict[str, Any] = {}
    if config.quantization == "int4" and torch.device(device).type == "cpu":
        raise CompressorError(
            "base.quantization = int4 does not work on CPUs: bitsandbytes' 4-bit products have no backward pass there "
            "(0.50 was tried), which training takes, and finding the layers that need adapters. Give int8, or a GPU"
        )
    if config.quantization != "none":
        try:
            import bitsandbytes  # noqa: F401
            from transformers import BitsAndBytesConfig
        except ImportError:
            what = f"base.quantization = {config.quantization}"
            raise lacking(what, "bitsandbytes", "quantised-base") from None
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=config.quantization == "int8",
            load_in_4bit=config.quantization == "int4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
        extra["device_map"] = {"": device}
    try:
        settings = AutoConfig.from_pretrained(path, revision=config.revision)
        refuse_unsupported(settings, config.path)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision)
        with bars_on_terminals():
            model = AutoModelForCausalLM.from_pretrained(
                path,
                revision=config.revision,
                dtype=dtype if extra else "auto",
                # By default transformers takes what the base has: Gemma 2 has eager attention alone.
                attn_implementation=None if attention == "sdpa" else attention,
                **extra,
            )
    except CompressorError:
        raise
    except Exception as error:  # transformers, the hub and safetensors raise many kinds
        raise CompressorError(
            f"cannot load the base {config.path!r} ({type(error).__name__}: {first_line(error)}): {remedy(config.path)}"
        ) from None
    # Rounded to another type first, the same stored weights would be taken for others.
    stored = fingerprint(model)
    if not extra:
        # Weights alone: rotary frequencies stay in float32, as transformers has them.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model = model.to(device)  # type: ignore[arg-type]
    base = Base(model, tokenizer, config.path, config.quantization, config.revision, stored)
    if attention == GROUPED and torch.device(device).type == "cpu":
        lighten_norms(model)
    return base
