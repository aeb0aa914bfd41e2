"""Starting the processes of a run: one, or several under `accelerate launch`."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from compressor.errors import CompressorError, first_line, require
from compressor.progress import is_quiet, note

LONGEST_WAIT = timedelta(hours=6)
"""How long processes wait for the main one, which tokenises and packs alone."""

_CHOSEN_BY_CONFIG = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DOWNCAST_BF16": "",
}
"""Variables by which accelerate would change what is computed, and what the launcher writes where nothing is asked."""
_NOT_SUPPORTED = {
    "DEEPSPEED": "its engine takes the training loop's place; its ZeRO-3 shares out what fsdp2.yaml shares out",
    "MEGATRON_LM": "its models are its own",
    "PARALLELISM_CONFIG": "fsdp2.yaml shares the base out, multi-gpu.yaml the batches alone",
    "SAGEMAKER": "launch on the machine itself",
}
"""Ways of sharing a model out that the training loop refuses, and why."""


@contextmanager
def config_alone() -> Iterator[None]:
    """Keep accelerate from reading settings in the environment: what shapes results is the configuration's alone.

    Raises:
        CompressorError: the environment asks for a way of sharing a model out that the training loop does not know.
    """
    for way, reason in _NOT_SUPPORTED.items():
        name = f"ACCELERATE_USE_{way}"
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise CompressorError(
                f"{name} is set, by `accelerate config` or by hand, and is not supported: {reason}. Unset it, or "
                "launch with configs/accelerate/"
            )
    # Shards are ours (`training/sharding.py`).
    hidden = (*_CHOSEN_BY_CONFIG, "ACCELERATE_USE_FSDP")
    found = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        for name, value in found.items():
            if (
                name in _CHOSEN_BY_CONFIG
                and value.lower() != _CHOSEN_BY_CONFIG[name]
                and os.environ.get("RANK", "0") == "0"
            ):
                note(f"note: {name}={value} is ignored: the configuration alone says what is computed")
        yield
    finally:
        os.environ.update(found)


def make_accelerator(mixed_precision: str | None = None, **options: Any) -> Accelerator:
    """An `Accelerator` with these options; quiet on all processes but the main one.

    On a machine without accelerators, processes that were started together would each work alone unless told that they
    are on CPUs.

    Args:
        mixed_precision: as of `Accelerator`, or `auto`: bf16 where the device is fast at it.
    """
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if mixed_precision == "auto":
        mixed_precision = "bf16" if fast_bfloat16(current_device()) else "no"
    with config_alone():
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=together and not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
            **options,
        )
    if not accelerator.is_main_process:
        # One process speaks; a library's warnings would come once for each.
        logging.disable(logging.WARNING)
    return accelerator


def keep_kernels_few() -> None:
    """Keep no more than a few hundred of oneDNN's kernels, one for each shape; to be called before the first is made.

    With its own bound, 1,024, a training in bfloat16 on widths of every size holds a gigabyte of them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def return_free_memory() -> None:
    """Give what was freed back to the system, where glibc allocates: it keeps holes between tensors for itself."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def current_device() -> torch.device:
    """The accelerator of this machine, or its CPU: also where accelerate is told to stay on that."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by instructions of its own; where it is not, float32 is up to ten times as fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 on
    # "avx512_bf16" and "amx_bf16" of x86, "bf16" of Arm.
    return device.type == "cpu" and any(on for name, on in capabilities.items() if "bf16" in name)


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Keep the progress bars of the loading layer and of transformers out of log files."""
    import datasets  # start-up
    from transformers.utils import logging as transformers_logging  # start-up

    if sys.stderr.isatty() and not is_quiet():
        yield
        return
    before = not datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before[0]:
            datasets.enable_progress_bars()
        if before[1]:
            transformers_logging.enable_progress_bar()


@contextmanager
def unreported() -> Iterator[None]:
    """Load a model without transformers' table of weights that are there besides, or missing: of heads not in use."""
    from transformers.utils import logging as transformers_logging  # start-up

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def check_device(device: str | torch.device) -> None:
    """Raise a `CompressorError` if nothing can be put on this device."""
    try:
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise CompressorError(
            f"device {str(device)!r} cannot be used here ({first_line(error)}): give cpu, or the name of a device that "
            "this machine and this build of torch have (cuda, cuda:0, mps)"
        ) from None


def held_dtype(dtype: str, device: torch.device) -> str:
    """The type a base's weights are held in on a device, where `auto` leaves the choice (`BaseConfig.dtype`)."""
    if dtype == "auto":
        return "bfloat16" if fast_bfloat16(device) else "float32"
    return dtype


def precise(device: torch.device) -> torch.dtype:
    """The type that figures are summed in on a device: float64, but on Apple's, which have none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def summed(values: torch.Tensor, accelerator: Accelerator) -> list[float]:
    """The sums over all processes of what each has."""
    device = accelerator.device
    return accelerator.reduce(values.to(precise(device)).to(device), "sum").tolist()


def check_dtype(dtype: Any) -> None:
    """Raise a `CompressorError` unless keys, values and weights can be held in this type."""
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(floating, "dtype", dtype, "a floating-point type of torch (torch.bfloat16)")
