"""The shelf from which vLLM's workers take memories: decoded once, their keys placed, in a bounded folder."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from compressor.files import atomic_file
from compressor.model.base import Base
from compressor.model.memory import Memory, place


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
