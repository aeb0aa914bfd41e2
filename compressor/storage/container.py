"""Checked containers: safetensors files whose every bit is under a SHA-256.

The metadata hold one JSON object with a `sha256` entry: the digest of the whole file, header and payload, with the
digest's own 64 characters replaced by zeros. Any safetensors reader opens such a file; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from compressor.errors import CompressorError, as_path
from compressor.files import atomic_file, unreadable

MOST_HEADER = 64 << 20
"""Bytes of the longest header that is read."""
_DIGEST = re.compile(rb'sha256\\": \\"([0-9a-f]{64})\\"')
_BLANK = b"0" * 64


class Content(NamedTuple):
    """What a container holds: its settings, its tensors, and the bytes of its header and of the whole file."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    header_bytes: int
    total_bytes: int


def serialise(kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """The bytes of a container and their digest.

    Args:
        kind: name of the metadata entry, by which a reader knows what the file is.
        settings: JSON object, without an entry `sha256` anywhere in it.
    """
    text = json.dumps({**settings, "sha256": _BLANK.decode()})
    data = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata={kind: text})
    digest = hashlib.sha256(data).hexdigest()
    (found,) = _DIGEST.finditer(data[: 8 + int.from_bytes(data[:8], "little")])
    return data[: found.start(1)] + digest.encode() + data[found.end(1) :], digest


def write(path: str | Path, data: bytes) -> None:
    """Write bytes to a file, atomically and durably: they are on the disk before the name is."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def kind(path: str | Path) -> str | None:
    """The metadata entry that names what a safetensors file is, None if there is none or it cannot be read."""
    expected = (OSError, ValueError, TypeError, KeyError, RecursionError, StopIteration)
    with contextlib.suppress(*expected), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= MOST_HEADER:
            return next(iter(json.loads(file.read(length))["__metadata__"]))
    return None


def _header(path: Path, kind: str, what: str) -> tuple[dict[str, Any], bytes]:
    """Settings and raw header (with its length): what is not of this kind is not read, however large."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length < 2 or 8 + length > size:
                found = f"its {size:,} bytes do not begin as one" if size else "it is empty"
                raise CompressorError(f"{path} is not {what}, or is cut off: {found}")
            if length > MOST_HEADER:
                raise CompressorError(f"{path} is not {what}: its header claims {length:,} bytes")
            header = start + file.read(length)
    except FileNotFoundError:
        raise CompressorError(f"{path} does not exist") from None
    except PermissionError as error:
        raise unreadable(path, error) from None
    except IsADirectoryError:
        raise CompressorError(f"{path} is a folder, not {what}") from None
    try:
        metadata = json.loads(header[8:].decode("utf-8")).get("__metadata__", {})
        if kind not in metadata:
            raise CompressorError(f"{path} is a safetensors file but not {what}: it was written by something else")
        settings = json.loads(metadata[kind])
        if not isinstance(settings, dict):
            raise TypeError("settings are no object")
    except CompressorError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CompressorError(f"{path} is not {what}, or is damaged: its header cannot be read ({error})") from None
    return settings, header


def read(path: str | Path, kind: str, what: str, newest: int) -> Content:
    """Read and check a container.

    Args:
        kind: as it was written.
        what: "a memory file", for messages.
        newest: format numbers above this one are refused as written by a newer version.

    Raises:
        CompressorError: missing, foreign, newer, truncated or damaged anywhere.
    """
    path = as_path(path)
    settings, header = _header(path, kind, what)
    check_format(settings, newest, str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CompressorError(f"{path} cannot be read: {error.strerror}") from None
    check_digest(data, len(header), settings, str(path))
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise CompressorError(f"{path} is damaged: {error}") from None
    return Content(settings, tensors, len(header), len(data))


def check_format(settings: Mapping[str, Any], newest: int, path: str) -> None:
    """Raise a `CompressorError` unless this version reads the settings' format."""
    found = settings.get("format")
    if type(found) is not int or found < 1:
        raise CompressorError(f"{path} is damaged: its format is {str(found)[:20]!r}")
    if found > newest:
        raise CompressorError(f"{path} has format {found}, this version reads up to {newest}: update the package")


def check_digest(data: bytes, header: int, settings: Mapping[str, Any], path: str) -> None:
    """Raise a `CompressorError` unless the digest in the header is that of `data` with the digest blanked."""
    found = list(_DIGEST.finditer(data[:header]))
    if len(found) == 1 and settings.get("sha256") == found[0].group(1).decode():
        digest = hashlib.sha256(data[: found[0].start(1)])
        digest.update(_BLANK)
        digest.update(memoryview(data)[found[0].end(1) :])
        if digest.hexdigest() == settings["sha256"]:
            return
    raise CompressorError(f"{path} is damaged: its checksum does not match its content; get or make the file again")
