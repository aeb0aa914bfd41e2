"""Memory files: a safetensors container with keys, values and what is needed to read them, checked on loading.

The header's metadata holds one JSON object under `memory`: format, package version, fingerprint of the base, layout,
segments and a SHA-256 over all of these and the payload. Any safetensors reader can open the file; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import compressor
from compressor.config import Layout
from compressor.errors import CompressorError
from compressor.files import atomic_path

if TYPE_CHECKING:
    from compressor.memory import Memory

FORMAT = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _checksum(settings: dict[str, Any], keys: torch.Tensor, values: torch.Tensor) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (keys, values):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_memory(memory: Memory, path: str | Path) -> None:
    """Write a memory file atomically, in the type the memory is held in."""
    settings = {
        "format": FORMAT,
        "version": compressor.__version__,
        "base": memory.base,
        "layout": memory.layout,
        "most": memory.most,
        "segments": [[segment.tokens, segment.passage_tokens] for segment in memory.segments],
    }
    settings["sha256"] = _checksum(settings, memory.keys, memory.values)
    tensors = {"keys": memory.keys.contiguous(), "values": memory.values.contiguous()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"memory": json.dumps(settings)})


def load_memory(path: str | Path) -> Memory:
    """Read a memory file; the base is checked when the memory is used.

    Raises:
        CompressorError: not a memory file, of a newer format, or damaged anywhere.
    """
    from compressor.memory import Memory, Segment

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "memory" not in metadata or set(file.keys()) != {"keys", "values"}:
                raise CompressorError(
                    f"{path} is a safetensors file but not a memory: it was not written by Memory.save"
                )
            keys, values = file.get_tensor("keys"), file.get_tensor("values")
    except FileNotFoundError:
        raise CompressorError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise CompressorError(f"{path} is not a memory file, or is damaged: {error}") from None
    try:
        settings = json.loads(metadata["memory"])
        if settings["format"] > FORMAT:
            raise CompressorError(
                f"{path} has memory format {settings['format']}, this version reads up to {FORMAT}: update the package"
            )
        claimed = settings.pop("sha256")
        if keys.dtype not in DTYPES or _checksum(settings, keys, values) != claimed:
            raise CompressorError(f"{path} is damaged: its checksum does not match its content")
        segments = tuple(Segment(int(tokens), int(length)) for tokens, length in settings["segments"])
        if settings["layout"] not in get_args(Layout) or not segments:
            raise CompressorError(f"{path} has layout {settings['layout']!r}, which this version does not know")
        return Memory(keys, values, segments, settings["layout"], int(settings["most"]), str(settings["base"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CompressorError):
            raise
        raise CompressorError(f"{path} is damaged: its header does not describe a memory ({error!r})") from None
