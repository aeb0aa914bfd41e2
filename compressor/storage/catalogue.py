"""Memories by id, wherever they are kept: a folder, single files, and a store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.files import make_folder
from compressor.model.memory import Memory
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
