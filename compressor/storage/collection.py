"""A collection: the memories of a corpus in a folder of shards, found by id.

A folder holds `collection.json` (what its memories have in common), the codec's calibration if it has one, and shards:
safetensors files with the coded tensors of up to some hundreds of memories, whose header lists ids, segments and
checksums. A shard is written whole under a temporary name and renamed, so a killed run leaves whole shards; run again,
it goes on with what is missing, and with a longer corpus it appends. Reading one memory reads the headers and that
memory's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save

from compressor.errors import CompressorError
from compressor.files import make_folder, read_json, write_json
from compressor.model.memory import Memory
from compressor.storage import container
from compressor.storage.calibration import Calibration
from compressor.storage.codec import Codec
from compressor.storage.memory_file import BESIDE, FORMAT, encode, restore, settings_of

MANIFEST = "collection.json"
_SUFFIX = ".safetensors"
_WHAT = "a shard of a collection"
_PER_MEMORY = ("sizes",)
"""Settings of the codec that differ between memories of one collection."""
_NO_IDENTITY = ("version", "base.name")
"""Settings in which memories of one collection may differ: they say the same thing in other words."""


class Place(NamedTuple):
    """Where a memory is: its shard, its number there, and a hash of the text it was made from."""

    shard: Path
    number: int
    text: str


def text_hash(text: str) -> str:
    """Short hash that tells whether an id still stands for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_collection(path: str | Path) -> bool:
    """Whether there is a collection at `path`."""
    return (Path(path) / MANIFEST).is_file()


class Collection:
    """Reads a collection; a mapping from ids to memories that loads one at a time.

    Args:
        folder: what `compressor compress CORPUS -o FOLDER` wrote.
        calibration: of the codec; by default the one in the folder.

    Raises:
        CompressorError: no collection, or a damaged one.
    """

    def __init__(self, folder: str | Path, calibration: Calibration | str | Path | None = None):
        self.folder = Path(folder)
        if not is_collection(folder):
            raise CompressorError(f"{folder} is not a collection of memories: it has no {MANIFEST}")
        self.settings: dict[str, Any] = read_json(self.folder / MANIFEST)
        if not isinstance(self.settings, dict) or not isinstance(self.settings.get("codec"), dict):
            raise CompressorError(f"{self.folder / MANIFEST} is not the manifest of a collection, or is damaged")
        container.check_format(self.settings, FORMAT, str(self.folder / MANIFEST))
        if calibration is None and self.settings["codec"].get("calibration") is not None:
            calibration = self.folder / BESIDE
        self.calibration = calibration if not isinstance(calibration, str | Path) else Calibration.load(calibration)
        self._headers: dict[Path, tuple[dict[str, Any], dict[str, Any], int]] = {}
        self._places: dict[str, Place] = {}
        self._shards: list[Path] = []
        for shard in sorted(self.folder.glob(f"shard-*{_SUFFIX}")):
            self._add(shard)

    def _add(self, shard: Path) -> None:
        settings, entries, header, size = container.read_header(shard, "memories", _WHAT)
        try:
            container.check_format(settings, FORMAT, str(shard))
            if hashlib.sha256(json.dumps(settings["memories"]).encode()).hexdigest() != settings["listing"]:
                raise CompressorError(f"{shard} is damaged: the checksum of its list of memories does not match")
            if settings["common"] != self.settings:
                raise CompressorError(
                    f"{shard} is of another collection than {self.folder / MANIFEST} describes: move it elsewhere"
                )
            last = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            if last + len(header) != size:
                raise CompressorError(
                    f"{shard} is damaged: it has {size:,} bytes and should have {last + len(header):,}; delete it and "
                    "run the same command again"
                )
            for number, memory in enumerate(settings["memories"]):
                if memory["id"] in self._places:
                    raise CompressorError(f"{shard} holds {memory['id']!r} again; delete one of the two shards")
                self._places[memory["id"]] = Place(shard, number, memory["text"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CompressorError(f"{shard} is damaged: its header does not list memories ({error!r})") from None
        self._headers[shard] = (settings, entries, len(header))
        self._shards.append(shard)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def place(self, name: str) -> Place:
        """Where the memory of this id is."""
        if name not in self._places:
            some = ", ".join(list(self._places)[:3]) or "it is empty"
            raise CompressorError(f"{self.folder} has no memory {name!r} among {len(self):,} ({some}, ...)")
        return self._places[name]

    def load(self, name: str) -> Memory:
        """The memory of this id; reads its bytes alone.

        Raises:
            CompressorError: there is none, or it is damaged.
        """
        shard, number, _ = self.place(name)
        settings, entries, header = self._headers[shard]
        memory, prefix = settings["memories"][number], f"{number}."
        tensors = {}
        digest = hashlib.sha256(json.dumps(memory["segments"]).encode())
        try:
            mine = {key: entry for key, entry in entries.items() if key.startswith(prefix)}
            with open(shard, "rb") as file:
                for key, entry in sorted(mine.items()):
                    start, end = entry["data_offsets"]
                    if not 0 <= start <= end <= os.fstat(file.fileno()).st_size - header:
                        raise CompressorError(f"{shard} is damaged: {key} lies outside it")
                    file.seek(header + start)
                    data = file.read(end - start)
                    digest.update(f"{key.removeprefix(prefix)}{entry['dtype']}{entry['shape']}".encode() + data)
                    tensors[key.removeprefix(prefix)] = _tensor(entry, data)
            if digest.hexdigest() != memory["digest"]:
                raise CompressorError(f"{shard} is damaged: the checksum of memory {name!r} does not match")
            common = self.settings
            codec = {**common["codec"], **{key: memory[key] for key in _PER_MEMORY if key in memory}}
        except CompressorError:
            raise
        except Exception as error:  # a header of adversarial JSON can fail in many ways
            raise CompressorError(f"{shard} is damaged: {error!r}") from None
        settings = {**common, "codec": codec, "fidelity": memory.get("fidelity")}
        return restore(settings, memory["segments"], tensors, shard, self.calibration)

    def sources(self) -> list[dict[str, Any]]:
        """What each shard says of where its texts come from, every source once; shards of old say nothing."""
        found = [settings["source"] for settings, _, _ in self._headers.values() if "source" in settings]
        return [source for number, source in enumerate(found) if source not in found[:number]]

    def fidelities(self) -> dict[str, float]:
        """Share of its passage that each memory gives back, by id, of those that were measured."""
        listed = [memory for settings, _, _ in self._headers.values() for memory in settings["memories"]]
        return {memory["id"]: float(memory["fidelity"]) for memory in listed if memory.get("fidelity") is not None}

    def ledger(self) -> dict[str, int]:
        """Bytes of `manifest`, `calibration`, shard `headers` and `payload`; `memories`, `shards`, `passage_tokens`."""
        beside = self.folder / BESIDE
        listed = [memory for settings, _, _ in self._headers.values() for memory in settings["memories"]]
        return {
            "manifest": (self.folder / MANIFEST).stat().st_size,
            "calibration": beside.stat().st_size if beside.exists() else 0,
            "headers": sum(header for _, _, header in self._headers.values()),
            "payload": sum(shard.stat().st_size - self._headers[shard][2] for shard in self._shards),
            "memories": len(self),
            "shards": len(self._shards),
            "passage_tokens": sum(length for memory in listed for _, length in memory["segments"]),
            "passage_bytes": sum(memory["bytes"] for memory in listed),
        }


def _tensor(entry: Mapping[str, Any], data: bytes) -> torch.Tensor:
    """One tensor from its header entry and its bytes, through safetensors, which checks both."""
    whole = {"x": {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [0, len(data)]}}
    header = json.dumps(whole).encode()
    return load(len(header).to_bytes(8, "little") + header + data)["x"]


class CollectionWriter:
    """Writes shards of a collection, new or begun earlier.

    Args:
        folder: of the collection.
        codec: of the memories; an existing collection must have the same.
        process: number of this process; it is part of the shards' names.
        source: where the texts come from; shards state it.

    Raises:
        CompressorError: the folder holds something else, or memories of another codec, base or compressor, or such as
            were made otherwise.
    """

    def __init__(self, folder: str | Path, codec: Codec, process: int = 0, source: Mapping[str, Any] | None = None):
        self.folder, self.codec, self.process, self.source = Path(folder), codec, process, source
        make_folder(folder)

    def begin(self, example: Memory) -> Collection:
        """Write the manifest, or check that the one there fits; called by one process.

        Args:
            example: a memory as the others will be (base, compressor, layout, shape, how it was made).
        """
        common = self._common(example)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            if any(not path.name.startswith(".") and path.name != BESIDE for path in self.folder.iterdir()):
                raise CompressorError(
                    f"{self.folder} holds other files and no {MANIFEST}: give an empty or new folder for the collection"
                )
            if self.codec.calibration is not None:
                self.codec.calibration.save(self.folder / BESIDE)
            write_json(manifest, common)
        # What a killed run left under temporary names.
        for path in self.folder.glob(f".shard-*{_SUFFIX}.????????"):
            shutil.rmtree(path, ignore_errors=True)
        collection = Collection(self.folder, self.codec.calibration)
        before, now = _identity(collection.settings), _identity(common)
        if before != now:
            changed = sorted(key for key in before | now if before.get(key) != now.get(key))
            what = ", ".join(f"{key}: {_shown(before, key)}, now {_shown(now, key)}" for key in changed)
            raise CompressorError(
                f"{self.folder} is a collection made with other settings ({what}): give the same to go on with it, or "
                "a new folder"
            )
        return collection

    def _common(self, example: Memory) -> dict[str, Any]:
        prepared = self.codec.prepare(example)
        common = settings_of(prepared, self.codec, {})
        return common

    def write(self, names: Sequence[str], texts: Sequence[str], memories: Sequence[Memory]) -> Path:
        """Write memories as one new shard; when this returns they are on the disk.

        Args:
            names: their ids.
            texts: what they were made from.
        """
        tensors: dict[str, torch.Tensor] = {}
        listed = []
        for number, (name, text, memory) in enumerate(zip(names, texts, memories, strict=True)):
            memory = self.codec.prepare(memory)
            coded, details = encode(memory, self.codec)
            segments = [[segment.tokens, segment.passage_tokens] for segment in memory.segments]
            digest = hashlib.sha256(json.dumps(segments).encode())
            for key, tensor in sorted(coded.items()):
                tensors[f"{number}.{key}"] = tensor.contiguous()
            listed.append(
                {"id": name, "text": text_hash(text), "bytes": len(text.encode()), "segments": segments, **details}
            )
            if memory.fidelity is not None:
                listed[-1]["fidelity"] = round(memory.fidelity, 4)
            entries = _entries(coded)
            for key, (kind, shape, data) in sorted(entries.items()):
                digest.update(f"{key}{kind}{shape}".encode() + data)
            listed[-1]["digest"] = digest.hexdigest()
        listing = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        settings = {
            "format": FORMAT,
            "common": read_json(self.folder / MANIFEST),
            "memories": listed,
            "listing": listing,
            **({} if self.source is None else {"source": dict(self.source)}),
        }
        data, _ = container.serialise("memories", settings, tensors)
        ordinal = 0
        while (path := self.folder / f"shard-{ordinal:05d}-{self.process:02d}{_SUFFIX}").exists():
            ordinal += 1
        container.write(path, data)
        return path


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What memories of one collection must have in common, by dotted names; of a compressor, its hash."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    flat = {key: value for key, value in flat.items() if key not in _NO_IDENTITY}
    return flat | {"compressor": str(flat.get("compressor", "")).rpartition("@")[2]}


def _shown(settings: Mapping[str, Any], key: str) -> str:
    """A setting for a message; of a hash, the beginning."""
    if key not in settings:
        return "not recorded"
    value = str(settings[key])
    return value if len(value) <= 40 else value[:12]


def _entries(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int], bytes]]:
    """Type and shape as a safetensors header writes them, and the bytes, of each tensor."""
    found = {}
    for key, tensor in tensors.items():
        data = save({"x": tensor.contiguous()})
        length = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + length])["x"]
        found[key] = (entry["dtype"], entry["shape"], data[8 + length :])
    return found


def missing(collection: Collection, names: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Numbers of the records that a collection lacks.

    Raises:
        CompressorError: an id occurs twice, or stands for another text in the collection.
    """
    seen: set[str] = set()
    left = []
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        if name in seen:
            raise CompressorError(
                f"the id {name!r} occurs twice in the corpus: ids name the memories, so they must differ"
            )
        seen.add(name)
        if name not in collection:
            left.append(number)
        elif collection.place(name).text != text_hash(text):
            raise CompressorError(
                f"{collection.folder} holds a memory {name!r} that was made from another text: give the passage a new "
                "id, or build a new collection"
            )
    return left
