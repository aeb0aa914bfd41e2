"""The table of a store: where it is, what all its memories have in common (the manifest), and rows in and out of it.

A row is a record: id, hash of its text, coded memory under a checksum, share of the text that comes back, the text if
it is wanted, and a vector. The manifest is in the table's schema.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from compressor.errors import CompressorError, first_line, lacking, require
from compressor.files import make_folder, owned
from compressor.model.memory import Memory
from compressor.storage.calibration import Calibration
from compressor.storage.codec import Codec
from compressor.storage.memory_file import BESIDE, encode, restore

TABLE = "memories"
EXHAUSTIVE, SMALL_FILES = 1 << 16, 64
"""Most vectors that are all compared with the question's, without an index; most files of few rows."""


def text_hash(text: str) -> str:
    """Short hash that tells whether an id still stands for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a place on object storage."""
    return "://" in str(path)


def is_store(path: str | Path) -> bool:
    """Whether there is a store in the folder `path`, or it is a place on object storage."""
    return is_remote(path) or (Path(path) / f"{TABLE}.lance").is_dir()


def no_store(path: str | Path) -> CompressorError:
    """The error for a folder that is not there, or holds no store."""
    return CompressorError(f"{path} is no store of memories: `compressor index SOURCE --output {path}` makes one")


def owned_store(path: str | Path) -> AbstractContextManager[None]:
    """`files.owned`; on object storage commits follow one another, and who writes is the users' to see to."""
    return nullcontext() if is_remote(path) else owned(path)


def compare(before: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    """Raise a `CompressorError` unless both manifests describe memories of one store; names may differ, hashes not."""

    def flat(settings: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in settings.items():
            found |= {f"{key}.{k}": f"{v}" for k, v in value.items()} if isinstance(value, dict) else {key: f"{value}"}
        del found["version"]
        found.pop("codec.drop_layers", None)  # of stores before 0.2.0
        found.pop("codec.rate", None)  # the level is what memories are coded by
        return found | {key: f"{found.pop(key + '.name')}@{found.pop(key + '.weights')}" for key in ("base", "encoder")}

    old, new = flat(before), flat(now)
    what = ", ".join(
        f"{key}: {old.get(key, 'not recorded')}, now {new.get(key, 'not recorded')}"
        for key in sorted(old | new)
        if old.get(key, "").rpartition("@")[2] != new.get(key, "").rpartition("@")[2]
    )
    if what:
        short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", what)
        raise CompressorError(
            f"{path} is a store made with other settings ({short}): give the same to go on with it, or a new folder"
        )


class MemoryTable:
    """Memories in a LanceDB table; its length is their number. `source` is noted with what is added."""

    manifest: dict[str, Any]
    calibration: Calibration | None = None
    source = ""
    _table: Any
    _codec: Codec

    def __init__(self, path: str | Path):
        try:
            import lancedb  # optional
        except ImportError:
            raise lacking("a store", "lancedb", "store") from None
        self.path, self.manifest = str(path), {}
        with self._errors():
            # Readers see what is committed while they run.
            self._engine: Any = lancedb.connect(self.path, read_consistency_interval=timedelta(0))
            if is_store(path):
                self._table = self._engine.open_table(TABLE)
                self.manifest = json.loads(self._table.schema.metadata[b"manifest"])

    def _make(self, size: int | None) -> None:
        """Make the table, with vectors of so many numbers."""
        import pyarrow as pa  # start-up

        fitted = self._codec.calibration
        if is_remote(self.path):
            require(fitted is None, "codec", self._codec.name, "one without a calibration on object storage")
        else:
            make_folder(self.path)
            if any(one.suffix != ".lance" and one.name != BESIDE for one in Path(self.path).iterdir()):
                raise CompressorError(f"{self.path} holds other files and no store: give an empty or new folder")
            if fitted is not None:
                fitted.save(Path(self.path, BESIDE))
        kinds = dict.fromkeys(("id", "hash", "header", "digest", "source"), pa.string())
        kinds |= {"memory": pa.large_binary(), "fidelity": pa.float32()}
        kinds |= dict.fromkeys(("bytes", "tokens", "coded"), pa.int64())
        kinds |= {"text": pa.string()} if self.manifest["keep_text"] else {}
        kinds |= {} if size is None else {"vector": pa.list_(pa.float32(), size)}
        schema = pa.schema(list(kinds.items()), metadata={"manifest": json.dumps(self.manifest)})
        with self._errors():
            self._table = self._engine.create_table(TABLE, schema=schema)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the engine raises, of many kinds, as errors of ours."""
        try:
            yield
        except (CompressorError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # Rust's panics are no `Exception`
            line = first_line(error)[:300]
            raise CompressorError(f"the store {self.path} cannot be read or written: {line}") from None

    def missing(self, names: Sequence[str], texts: Sequence[str]) -> list[int]:
        """Numbers of the records that the store lacks.

        Raises:
            CompressorError: an id occurs twice, or stands for another text in the store.
        """
        held, seen = dict(zip(*self.columns("id", "hash"), strict=True)), set()
        for name, text in zip(names, texts, strict=True):
            if name in seen:
                raise CompressorError(
                    f"the id {name!r} occurs twice in the corpus: ids name memories, so they must differ"
                )
            seen.add(name)
            if name in held and held[name] != text_hash(text):
                raise CompressorError(
                    f"{self.path} holds a memory {name!r} that was made from another text: give the passage a new id, "
                    "or delete that one first"
                )
        return [number for number, name in enumerate(names) if name not in held]

    def write(
        self, names: Sequence[str], texts: Sequence[str], memories: Sequence[Memory], vectors: Sequence[Any]
    ) -> None:
        """Commit memories, all or none, each with its vector or None; when this returns they are on the disk."""
        import pyarrow as pa  # start-up

        rows, schema = [], self._table.schema
        for name, text, memory, vector in zip(names, texts, memories, vectors, strict=True):
            memory = self._codec.prepare(replace(memory.to("cpu"), text=None))
            tensors, details = encode(memory, self._codec)
            segments = [[part.tokens, part.passage_tokens] for part in memory.segments]
            share = None if memory.fidelity is None else round(memory.fidelity, 4)
            row: dict[str, Any] = {"id": name, "text": text, "vector": vector, "fidelity": share, "source": self.source}
            row |= {"hash": text_hash(text), "bytes": len(text.encode()), "tokens": memory.passage_tokens}
            row["header"] = json.dumps({"segments": segments, "codec": details, "fidelity": share})
            row["memory"] = save({key: value.contiguous() for key, value in tensors.items()})
            row |= {"coded": len(row["memory"]) + len(row["header"]), "digest": _digest(row)}
            rows.append({key: row[key] for key in schema.names})
        with self._errors():
            self._table.add(pa.Table.from_pylist(rows, schema))

    def finish(self) -> None:
        """Index what was added, and put small files together; by one process, when all have written."""
        from lancedb.index import FTS, IvfPq  # optional

        with self._errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            indexed = {column for index in self._table.list_indices() for column in index.columns}
            by_words = "vector" not in self._table.schema.names
            if by_words and "text" not in indexed:
                self._table.create_index("text", config=FTS())
            elif not by_words and "vector" not in indexed and len(self) > EXHAUSTIVE:
                quick = IvfPq(distance_type="cosine", sample_rate=64, max_iterations=10)
                self._table.create_index("vector", config=quick)
            if self._table.stats()["fragment_stats"]["num_small_fragments"] > SMALL_FILES:
                # No one else writes to a folder, so that files no version lists are what a killed run left.
                age, left = timedelta(minutes=10), not is_remote(self.path)
                self._table.optimize(cleanup_older_than=age, delete_unverified=left)

    def delete(self, names: Sequence[str]) -> None:
        """Take records out; their bytes go when files are next put together. Errors are as for `add`."""
        with owned_store(self.path):
            self._rows(names, "hash")
            with self._errors():
                self._table.delete(_among(names))

    def __len__(self) -> int:
        with self._errors():
            return self._table.count_rows()

    def columns(self, *columns: str) -> list[list[Any]]:
        """Columns of the table: `id`, `hash`, `fidelity`, `source`; `bytes` and `tokens` of texts, `coded` bytes."""
        with self._errors():
            found = self._table.search().select(list(columns)).limit(None).to_arrow()
            return [found[name].to_pylist() for name in columns]

    def _rows(self, names: Sequence[str], *columns: str) -> list[dict[str, Any]]:
        """Rows of these ids, in their order."""
        with self._errors():
            found = self._table.search().where(_among(names)).select(["id", *columns]).limit(None).to_list()
        by_id = {row["id"]: row for row in found}
        if absent := [name for name in names if name not in by_id]:
            ids = self.columns("id")[0]
            some = ", ".join(ids[:3]) + ", ..." * (len(ids) > 3) or "it is empty"
            raise CompressorError(f"{self.path} has no memory {absent[0]!r} among {len(ids):,} ({some})")
        return [by_id[name] for name in names]

    def load(self, names: Sequence[str]) -> list[Memory]:
        """The memories of these ids; a `CompressorError` if there is none of one, or it is damaged."""
        memories = []
        for row in self._rows(names, "hash", "header", "memory", "digest"):
            if _digest(row) != row["digest"]:
                raise CompressorError(f"{self.path} is damaged: the checksum of memory {row['id']!r} does not match")
            header = json.loads(row["header"])
            settings = self.manifest | {
                "codec": self.manifest["codec"] | header["codec"],
                "fidelity": header["fidelity"],
            }
            memories.append(restore(settings, header["segments"], load(row["memory"]), self.path, self.calibration))
        return memories

    def texts(self, names: Sequence[str]) -> list[str]:
        """The texts of these ids; a `CompressorError` if they are not kept, there is none of one, or it is damaged."""
        if not self.manifest["keep_text"]:
            raise CompressorError(f"{self.path} keeps no texts: index the corpus again with --keep-text")
        rows = self._rows(names, "hash", "text")
        if hurt := [row["id"] for row in rows if text_hash(row["text"]) != row["hash"]]:
            raise CompressorError(f"{self.path} is damaged: the checksum of the text {hurt[0]!r} does not match")
        return [row["text"] for row in rows]


def _digest(row: Mapping[str, Any]) -> str:
    """Checksum of a memory, and of what its row says of it."""
    stated = "\0".join(row[key] for key in ("id", "hash", "header")).encode()
    return hashlib.sha256(stated + row["memory"]).hexdigest()


def _among(names: Sequence[str]) -> str:
    """Condition for rows of these ids."""
    return "id IN ({})".format(", ".join("'" + name.replace("'", "''") + "'" for name in names)) if names else "false"
