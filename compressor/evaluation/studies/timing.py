"""Measured time and memory of generation after a full passage and after a memory of it."""

from __future__ import annotations

import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.generation import stream
from compressor.memory import Prefix, memory_prefix
from compressor.methods.interface import token_prefix
from compressor.model import Compressor


@dataclass
class Times:
    """Seconds of one run."""

    reading: float
    """Until the passage is read or compressed."""
    written: dict[int, float] = field(default_factory=dict)
    """From then on until so many new tokens are written."""


@dataclass
class Peaks:
    """Most bytes of tensors beyond the weights, by number of new tokens."""

    new: dict[int, int] = field(default_factory=dict)
    """Reading or compressing the passage included."""
    reused: dict[int, int] = field(default_factory=dict)
    """From what reading left on."""


Variant = Callable[[], Callable[[], Prefix]]
"""Reads a passage; what it returns places what is kept of it."""


def variants(model: Compressor, passage: Sequence[int], tokens: Sequence[int]) -> dict[int | None, Variant]:
    """Ways to give the decoder a passage: the passage itself (None), and memories by their number of tokens."""

    def full() -> Callable[[], Prefix]:
        with model.adapters(on=False):
            prefix = token_prefix(model.base, [passage])
        return lambda: prefix

    def memory(count: int) -> Callable[[], Prefix]:
        kept = model.compress_ids([passage], count)[0]
        return lambda: memory_prefix(model.base, [kept])

    found: dict[int | None, Variant] = {None: full}
    for count in tokens:
        found[count] = lambda count=count: memory(count)  # type: ignore[misc]
    return found


def time_once(model: Compressor, variant: Variant, new_tokens: Sequence[int]) -> Times:
    """Run a variant with greedy decoding that no EOS ends, and read the clock at 1 and at each of `new_tokens`."""
    wait = _waiter(model.base.device)
    marks = {1, *new_tokens}
    wait()
    started = time.perf_counter()
    place = variant()
    wait()
    read = time.perf_counter()
    times = Times(read - started)
    with model.adapters(on=False):
        steps = stream(model.base, place(), [[model.base.bos]], [max(marks)], ends=False)
        for count, _ in enumerate(steps, start=1):
            if count in marks:
                wait()
                times.written[count] = time.perf_counter() - read
    return times


def time_all(
    model: Compressor,
    chosen: dict[int | None, Variant],
    new_tokens: Sequence[int],
    repeats: int,
    done: Callable[[], None],
) -> dict[int | None, list[Times]]:
    """Time every variant `repeats` times in turn, after a round that warms up."""
    found: dict[int | None, list[Times]] = {name: [] for name in chosen}
    for repeat in range(repeats + 1):
        for name, variant in chosen.items():
            times = time_once(model, variant, new_tokens)
            if repeat:
                found[name].append(times)
            done()
    return found


def median(runs: Sequence[Times], new: bool, count: int) -> float:
    """Median seconds until `count` new tokens are written, with reading the passage if it is `new`."""
    return statistics.median(run.written[count] + (run.reading if new else 0.0) for run in runs)


def tokens_per_second(runs: Sequence[Times], count: int) -> float:
    """Median rate of the new tokens after the first."""
    return statistics.median((count - 1) / (run.written[count] - run.written[1]) for run in runs)


@torch.no_grad()
def peak_memory(model: Compressor, variant: Variant, new_tokens: Sequence[int]) -> Peaks:
    """The most bytes in use at once, beyond what was there before: the allocator's on a GPU, tensors' on a CPU."""
    meter = GPUMeter(model.base.device) if model.base.device.type == "cuda" else TensorMeter()
    peaks = Peaks()
    with meter:
        place = variant()
        reading = meter.peak()
        meter.restart()
        with model.adapters(on=False):
            steps = stream(model.base, place(), [[model.base.bos]], [max(new_tokens)], ends=False)
            for count, _ in enumerate(steps, start=1):
                if count in new_tokens:
                    peaks.reused[count] = meter.peak()
                    peaks.new[count] = max(reading, peaks.reused[count])
    return peaks


class GPUMeter:
    """`torch.cuda.max_memory_allocated`, less what was allocated when the block began."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> GPUMeter:
        torch.cuda.synchronize(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        self.restart()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class TensorMeter(TorchDispatchMode):
    """Bytes of the tensors that operations make while the block runs, counted until they are freed.

    A CPU has no counter like a GPU's. Scratch space inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.held and storage._cdata not in inputs:
                    self._hold(storage)
        return found

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.held[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)

    def restart(self) -> None:
        self.most = self.now

    def peak(self) -> int:
        return self.most


def _waiter(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def machine(device: torch.device) -> dict[str, Any]:
    """What the times were measured on."""
    name = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = [line for line in described.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    found = {"processor": name, "threads": torch.get_num_threads(), "device": str(device.type)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found
