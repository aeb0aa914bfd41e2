"""Memory files: a checked safetensors container with coded keys and values and what is needed to read them.

The metadata hold one JSON object under `memory`: format, package version, base (name and weight hash), tokenizer hash,
compressor, layout, segments (memory tokens and passage tokens of each), shape, type, codec and a SHA-256 over the whole
file. Reading needs the base, not the adapters, and for calibrated codecs the calibration that the file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CompressorError, require_whole
from compressor.model.memory import Memory, Segment
from compressor.model.table import LAYOUTS
from compressor.provenance import VERSION
from compressor.storage import container
from compressor.storage.calibration import Calibration
from compressor.storage.codec import FLOATS, Codec

FORMAT = 2
BESIDE = "calibration.safetensors"
"""Name under which a calibration is looked for beside a memory."""
MOST_VALUES = 1 << 31
"""Most keys and values of a memory: 100,000 tokens' worth for Llama-3-8B."""
MOST_TOKENS = 1 << 12
"""Most memory tokens of a segment."""
MOST_LAYERS = 1 << 12
"""Most layers, heads, and dimensions of a head."""
MOST_EXPANSION = 1 << 11
"""Most values for a byte of a file; a small file that claims to be a vast memory is refused before it is decoded."""
WHAT = "a memory file (`compressor compress` writes one)"
TEXT = "text"
"""Name of the tensor that holds a memory's passage, packed."""


def as_held(memory: Memory) -> str:
    """The codec that stores a memory in the type it is held in."""
    for name, dtype in FLOATS.items():
        if memory.keys.dtype == dtype:
            return name
    return "float32"


def settings_of(memory: Memory, codec: Codec, details: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about a prepared memory, less its segments."""
    layers, heads, _, size = memory.keys.shape
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": {"name": memory.base_name, "weights": memory.base},
        "tokenizer": memory.tokenizer,
        "compressor": memory.compressor,
        "layout": memory.layout,
        "most": memory.most,
        "shape": [layers, heads, size],
        "dtype": str(memory.keys.dtype).removeprefix("torch."),
        "codec": {**codec.record(), **details},
        **({"made": memory.made} if memory.made else {}),
    }


def as_stored(memory: Memory, codec: Codec) -> Memory:
    """The memory as a file of this codec gives it back.

    Raises:
        CompressorError: the codec cannot store this memory.
    """
    memory = codec.prepare(memory)
    tensors, details = codec.encode(memory)
    slots = [slot for segment in memory.segments for slot in range(segment.tokens)]
    keys, values = codec.decode(tensors, {**codec.record(), **details}, memory.keys.shape, slots)
    return replace(memory, keys=keys, values=values)


def save_memory(
    memory: Memory, path: str | Path, codec: str | Codec | None = None, passage_bytes: int | None = None
) -> None:
    """Write a memory file atomically.

    Args:
        codec: a `Codec` or its name (`Codec.parse`); by default the type the memory is held in.
        passage_bytes: length of the passage's text in UTF-8, for `compressor inspect` to compare with.

    Raises:
        CompressorError: the codec cannot store this memory.
    """
    if passage_bytes is not None:
        require_whole("passage_bytes", passage_bytes, 0)
    if not isinstance(codec, Codec):
        codec = Codec.parse(as_held(memory) if codec is None or codec == "" else codec)
    memory = codec.prepare(memory)
    tensors, details = encode(memory, codec)
    segments = [[segment.tokens, segment.passage_tokens] for segment in memory.segments]
    settings = {**settings_of(memory, codec, details), "segments": segments, "passage_bytes": passage_bytes}
    if memory.fidelity is not None:
        settings["fidelity"] = round(memory.fidelity, 4)
    data, _ = container.serialise("memory", settings, tensors)
    container.write(path, data)


def encode(memory: Memory, codec: Codec) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`Codec.encode` for files: what could not be read again is refused.

    Raises:
        CompressorError: the memory is larger than files may be, or the codec leaves next to nothing of it.
    """
    tensors, details = codec.encode(memory)
    values, stored = 2 * memory.keys.numel(), sum(tensor.nbytes for tensor in tensors.values())
    if memory.most > MOST_TOKENS or values > MOST_VALUES:
        raise CompressorError(f"a memory of {values:,} values, {memory.most} tokens a segment, is too large for a file")
    if values > MOST_EXPANSION * stored:
        raise CompressorError(
            f"this codec leaves {stored:,} bytes of {values:,} values, which is next to nothing: choose a higher rate"
        )
    if memory.text is not None:
        tensors = {**tensors, TEXT: torch.frombuffer(bytearray(memory.text), dtype=torch.uint8)}
    return tensors, details


def load_memory(path: str | Path, calibration: Calibration | str | Path | None = None) -> Memory:
    """Read a memory file; the base is checked when the memory is used, or by `check_base`.

    Args:
        calibration: the calibration of the codec, or its file; by default `calibration.safetensors` beside the memory.

    Raises:
        CompressorError: not a memory file, of a newer format, damaged anywhere, or it needs another calibration.
    """
    content = read(path)
    return restore(content.settings, content.settings.get("segments"), content.tensors, path, calibration)


def read(path: str | Path) -> container.Content:
    """A memory file's settings and tensors, checked.

    Raises:
        CompressorError: see `load_memory`.
    """
    return container.read(path, "memory", WHAT, FORMAT)


def restore(
    settings: Mapping[str, Any],
    segments: Any,
    tensors: Mapping[str, Tensor],
    path: str | Path,
    calibration: Calibration | str | Path | None,
) -> Memory:
    """The memory that checked settings and tensors describe.

    Raises:
        CompressorError: they do not describe a memory.
    """
    try:
        kept = tensors.get(TEXT)
        if kept is not None and (kept.dtype != torch.uint8 or kept.dim() != 1 or not len(kept)):
            raise CompressorError(f"{path} is damaged: its text is {kept.dtype} {tuple(kept.shape)}")
        tensors = {name: tensor for name, tensor in tensors.items() if name != TEXT}
        layout, most = settings["layout"], whole(settings["most"], 1, MOST_TOKENS)
        if layout not in LAYOUTS:
            raise CompressorError(f"{path} has layout {str(layout)[:20]!r}, which this version does not know")
        parts = tuple(Segment(whole(k, 1, most), whole(n, 1, 1 << 31)) for k, n in segments)
        layers, heads, size = (whole(number, 1, MOST_LAYERS) for number in settings["shape"])
        tokens = sum(part.tokens for part in parts)
        stored = sum(tensor.nbytes for tensor in tensors.values())
        values = 2 * layers * heads * tokens * size
        if not parts or values > min(MOST_VALUES, MOST_EXPANSION * max(stored, 1)):
            raise CompressorError(f"{path} is damaged: {stored:,} bytes cannot hold the {values:,} values it claims")
        record = settings["codec"]
        if record["calibration"] is not None:
            calibration = find_calibration(path, str(record["calibration"]), calibration)
        codec = Codec.from_record(record, calibration if isinstance(calibration, Calibration) else None)
        slots = [slot for part in parts for slot in range(part.tokens)]
        keys, values_ = codec.decode(tensors, record, (layers, heads, tokens, size), slots)
        texts = (settings["base"]["weights"], settings["compressor"], settings["tokenizer"], settings["base"]["name"])
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name is no text")
        text = None if kept is None else kept.numpy().tobytes()
        made, fidelity = settings.get("made", {}), settings.get("fidelity")
        made = {str(name)[:40]: number(value, 0, 1 << 31) for name, value in made.items()}
        fidelity = None if fidelity is None else float(number(fidelity, 0, 1))
        return Memory(keys, values_, parts, layout, most, *texts, text=text, made=made, fidelity=fidelity)
    except CompressorError as error:
        message = str(error)
        raise CompressorError(message if str(path) in message else f"{path}: {message}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise CompressorError(f"{path} is damaged: its header does not describe a memory ({error!r})") from None


def find_calibration(
    path: str | Path, digest: str, given: Calibration | str | Path | None = None
) -> Calibration | None:
    """The calibration that was given, or the one beside the memory if it has this digest."""
    if isinstance(given, Calibration):
        return given
    if given is not None:
        return Calibration.load(given)
    beside = Path(path).parent / BESIDE
    if beside.exists() and (found := Calibration.load(beside)).digest == digest:
        return found
    return None


def whole(value: Any, low: int, high: int) -> int:
    """`value` if it is a whole number in this range, else a ValueError."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{str(value)[:40]} is no whole number from {low} to {high}")
    return value


def number(value: Any, low: float, high: float) -> float:
    """`value` if it is a number in this range, else a ValueError."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{str(value)[:40]} is no number from {low} to {high}")
    return value
