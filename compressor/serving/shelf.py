"""Memories by id, and the shelf from which vLLM's workers take them: decoded once, keys placed, in a bounded folder."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import CompressorError
from compressor.files import atomic_file, make_folder, unreadable
from compressor.model.base import Base
from compressor.model.memory import Memory, check_base
from compressor.storage.codec import Codec

_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.ASCII)
SUFFIX = ".memory"


class Refused(CompressorError):
    """A request that cannot be served, and the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Library(Protocol):
    """Where memories are found by id: a folder of files, or a store."""

    def version(self, name: str) -> str:
        """What changes when the memory does; `Refused` with 404 where there is none."""

    def size(self, name: str) -> int:
        """Bytes that it takes as it is kept."""

    def load(self, name: str) -> Memory:
        """The memory; a `CompressorError` if it is damaged."""

    def add(self, name: str, memory: Memory) -> None:
        """Keep a memory, which is then found by this id."""

    def delete(self, name: str) -> None:
        """Forget a memory."""


class Folder:
    """A library of the files `ID.memory` in a folder, and of files elsewhere, whose ids are their names."""

    def __init__(self, folder: str | Path, files: Sequence[str] = (), codec: str | None = None):
        self.folder, self.codec = Path(folder), codec
        make_folder(self.folder)
        self.files = {Path(file).stem: Path(file) for file in files}
        if missing := [str(file) for file in self.files.values() if not file.is_file()]:
            raise CompressorError(f"there is no memory file {missing[0]}: give files that `compressor compress` wrote")

    def path(self, name: str) -> Path:
        """The file of an id, which need not exist."""
        if not _ID.fullmatch(name):
            raise Refused(404, f"there is no memory {name[:80]!r}: ids are letters, digits, '.', '_' and '-'")
        return self.files.get(name, self.folder / f"{name}{SUFFIX}")

    def version(self, name: str) -> str:
        """Time and size of the file."""
        try:
            found = self.path(name).stat()
        except FileNotFoundError:
            raise Refused(404, f"there is no memory {name!r}: POST its text to /v1/memories") from None
        except OSError as error:
            raise unreadable(self.path(name), error) from None
        return f"{found.st_mtime_ns}:{found.st_size}:{found.st_ino}"

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return self.path(name).stat().st_size

    def load(self, name: str) -> Memory:
        """Read and decode the file."""
        self.version(name)
        return Memory.load(self.path(name))

    def add(self, name: str, memory: Memory) -> None:
        """Write the file."""
        memory.save(self.path(name), Codec.parse(self.codec) if self.codec else None)

    def delete(self, name: str) -> None:
        """Remove the file."""
        if name in self.files:
            raise Refused(409, f"memory {name!r} is a file given with --files: leave it out at the next start")
        self.version(name)
        self.path(name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Placed:
    """A memory, or several in one context, as vLLM reads it."""

    name: str
    """SHA-256 of keys and values: name of the file, and salt of the prefix cache."""
    tokens: int
    passage_tokens: int
    nbytes: int


def place(base: Base, memory: Memory) -> tuple[Tensor, Tensor]:
    """Keys and values as vLLM's cache takes them, each `[layers, tokens, kv_heads, head_size]`, in the base's type.

    vLLM counts positions on from the placeholders: what follows k memory tokens is at k, where this project's decoder
    is at its own start. So keys are rotated to their place in the decoder's context, plus k, less that start.

    Raises:
        CompressorError: the memory is of another base or tokenizer.
    """
    check_base(memory, base)
    positions, start = memory.positions()
    shift = memory.tokens - int(start)
    keys = base.rotate(memory.keys.to(base.device, base.dtype)[:, None], (positions + shift)[None].to(base.device))
    values = memory.values.to(base.device, base.dtype)
    return keys[:, 0].transpose(1, 2).contiguous().cpu(), values.transpose(1, 2).contiguous().cpu()


class Shelf:
    """A folder of placed memories, the least lately used of which go when it is full, but never those being read.

    Args:
        folder: its own; what a server that was killed left in it is removed.
        most_bytes: what all files together may take.
    """

    def __init__(self, folder: str | Path, most_bytes: int):
        self.folder, self.most_bytes = Path(folder), most_bytes
        shutil.rmtree(self.folder, ignore_errors=True)
        make_folder(self.folder)
        self._placed: OrderedDict[str, Placed] = OrderedDict()
        self._known: dict[tuple[str, ...], str] = {}
        self._readers: Counter[str] = Counter()

    def put(self, key: tuple[str, ...], base: Base, load: Callable[[], Memory]) -> Placed:
        """The placed memory that `key` stands for, which is loaded where it is not on the shelf."""
        name = self._known.get(key, "")
        if name not in self._placed or not self._file(name).exists():
            memory = load()
            keys, values = place(base, memory)
            digest = hashlib.sha256(repr((tuple(keys.shape), str(keys.dtype))).encode())
            for tensor in (keys, values):
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
            name = digest.hexdigest()
            with atomic_file(self._file(name)) as temporary:
                save_file({"keys": keys, "values": values}, temporary)
            self._known[key] = name
            self._placed[name] = Placed(name, memory.tokens, memory.passage_tokens, keys.nbytes + values.nbytes)
        self._placed.move_to_end(name)
        return self._placed[name]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @contextmanager
    def reading(self, placed: Placed) -> Iterator[None]:
        """Keep a placed memory on the shelf, which may then be over-full, while a request reads it."""
        self._readers[placed.name] += 1
        try:
            self._make_room()
            yield
        finally:
            self._readers[placed.name] -= 1

    def _make_room(self) -> None:
        total = sum(one.nbytes for one in self._placed.values())
        for name, one in list(self._placed.items()):
            if total <= self.most_bytes:
                break
            if not self._readers[name]:
                self._file(name).unlink(missing_ok=True)
                del self._placed[name], self._readers[name]
                total -= one.nbytes
        self._known = {key: name for key, name in self._known.items() if name in self._placed}

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
