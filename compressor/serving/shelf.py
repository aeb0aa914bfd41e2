"""Where a server's memories are: by id, as they are kept; and on the shelf, from which vLLM's workers take them."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressor.errors import CompressorError
from compressor.files import atomic_file, make_folder
from compressor.model.base import Base
from compressor.model.memory import Memory, place
from compressor.storage.memory_file import load_memory

_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.ASCII)


class Missing(CompressorError):
    """There is no memory of this id."""


class Catalogue:
    """Memories by id: the files `ID.memory` of a folder, files elsewhere, whose ids are their names, and a store's.

    Args:
        folder: made if there is none; what is added goes there.
        codec: of what is added, by default the type it is held in.
        store: read, never written; what a folder or file has goes first.
    """

    def __init__(self, folder: str | Path, files: Sequence[str] = (), codec: str | None = None, store: Any = None):
        self.folder, self.codec, self.store = Path(folder), codec, store
        make_folder(self.folder)
        self.files = {Path(file).stem: Path(file) for file in files}

    def path(self, name: str) -> Path | None:
        """The file of an id, if it has one."""
        file = self.files.get(name, self.folder / f"{name}.memory")
        return file if name in self.files or (_ID.fullmatch(name) and file.is_file()) else None

    def state(self, name: str) -> tuple[int, str]:
        """Bytes, and what changes when the memory does; `Missing` if there is none."""
        if (path := self.path(name)) is not None and path.is_file():
            found = path.stat()
            return found.st_size, f"{found.st_mtime_ns}:{found.st_size}:{found.st_ino}"
        if self.store is not None:
            try:
                (row,) = self.store._rows([name], "digest", "coded")
                return row["coded"], row["digest"]
            except CompressorError:
                pass
        raise Missing(f"there is no memory {name[:80]!r}: make it of its text first")

    def load(self, name: str) -> Memory:
        """Read and decode; `Missing`, or another `CompressorError` if it is damaged."""
        self.state(name)
        if (path := self.path(name)) is None:
            return self.store.load([name])[0]
        try:
            return load_memory(path)
        except CompressorError as error:
            raise CompressorError(str(error).replace(str(path), f"memory {name!r}")) from None

    def add(self, name: str, memory: Memory) -> None:
        """Keep a memory, which is then found by this id."""
        memory.save(self.folder / f"{name}.memory", self.codec)

    def delete(self, name: str) -> None:
        """Forget a memory of the folder."""
        self.state(name)
        path = self.path(name)
        if path is None or name in self.files:
            raise CompressorError(f"memory {name!r} is not of the folder, and is left alone: take it out where it is")
        path.unlink(missing_ok=True)

    def search(self, question: str, top: int) -> list[str]:
        """Ids of the store's memories nearest to a question, nearest last, as `Store.ask` places them."""
        if self.store is None:
            raise CompressorError("there is no store to retrieve from: name memories, or start with a store")
        return [hit.id for hit in reversed(self.store.search(question, top))]


@dataclass(frozen=True)
class Placed:
    """A memory, or several in one context, on the shelf under the SHA-256 of keys and values."""

    name: str
    tokens: int
    passage_tokens: int
    nbytes: int


class Shelf:
    """A folder of placed memories: beyond `most_bytes` the least lately used go, but never those being read."""

    def __init__(self, folder: str | Path, most_bytes: int):
        self.folder, self.most_bytes = Path(folder), most_bytes
        shutil.rmtree(self.folder, ignore_errors=True)  # of a server that was killed
        self.folder.mkdir(mode=0o700, parents=True)
        self._placed: OrderedDict[str, Placed] = OrderedDict()
        self._known: dict[tuple[str, ...], str] = {}
        self._readers: Counter[str] = Counter()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def take(self, key: tuple[str, ...], base: Base, load: Callable[[], Memory]) -> Placed:
        """The placed memory that `key` stands for, loaded where it is not here; it stays until it is given back."""
        name = self._known.get(key, "")
        if name not in self._placed or not self._file(name).exists():
            memory = load()
            keys, values = place(base, memory)
            digest = hashlib.sha256(repr((keys.shape, keys.dtype)).encode())
            for tensor in (keys, values):
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
            self._known[key] = name = digest.hexdigest()
            with atomic_file(self._file(name)) as temporary:
                save_file({"keys": keys, "values": values}, temporary)
            self._placed[name] = Placed(name, memory.tokens, memory.passage_tokens, keys.nbytes + values.nbytes)
        self._placed.move_to_end(name)
        self._readers[name] += 1
        total = sum(one.nbytes for one in self._placed.values())
        for other, one in list(self._placed.items()):
            if total > self.most_bytes and not self._readers[other]:
                self._file(other).unlink(missing_ok=True)
                del self._placed[other]
                total -= one.nbytes
        self._known = {known: name for known, name in self._known.items() if name in self._placed}
        return self._placed[name]

    def give_back(self, placed: Placed) -> None:
        """Its request has been answered."""
        self._readers[placed.name] -= 1
