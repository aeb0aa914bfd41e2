"""A store: memories of a corpus in a LanceDB table, found by id, by a question's vector or by its words.

A record is a row: id, hash of its text, coded memory under a checksum, share of the text that comes back, the text if
it is wanted, and a vector. What all memories have in common is the table's manifest. The engine runs in the process, on
a folder or on object storage (`s3://bucket/name`). Rows are committed some hundreds at a time, whole or not at all: a
killed run leaves what it had committed, and, run again, goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load, save

from compressor.errors import CompressorError, first_line, lacking, require, require_texts, require_whole
from compressor.files import check_no_file, make_folder
from compressor.model.base import Base
from compressor.model.checkpoint import compressor_name
from compressor.model.config import BaseConfig, BaseMismatch
from compressor.model.decoder import Prefix, token_prefix
from compressor.model.generation import Sampling, answer, regenerate
from compressor.model.load import load_base
from compressor.model.memory import Memory, memory_prefix, on_base, signed
from compressor.model.network import Network
from compressor.model.text_encoder import WORDS, TextEncoder, default_encoder
from compressor.storage.calibration import Calibration
from compressor.storage.codec import Codec
from compressor.storage.container import check_format
from compressor.storage.making import Making
from compressor.storage.manifest import TABLE, compare, is_remote, is_store, owned_store, text_hash
from compressor.storage.memorise import chosen_codec, memories_of
from compressor.storage.memory_file import BESIDE, FORMAT, encode, restore, settings_of

Reading = Literal["memories", "recite", "texts"]
"""What the decoder reads of the records found: memories, what these regenerate, or the texts that are kept."""
EXHAUSTIVE, SMALL_FILES = 1 << 16, 64
"""Most vectors that are all compared with the question's, without an index; most files of few rows."""


@dataclass(frozen=True)
class Hit:
    """A record that was found; `score`: cosine with the question, or BM25; `fidelity`: what share comes back."""

    id: str
    score: float
    fidelity: float | None
    text: str | None


@dataclass(frozen=True)
class StoreAnswer:
    """An answer, the records it was read from, nearest first, and the positions of the context that they took."""

    text: str
    hits: list[Hit]
    positions: int


class Store:
    """A store that `open` opened; its length is the number of memories. `source` is noted with what is added."""

    compressor: Network | None = None
    making = Making(codec="int4+ans")
    calibration: Calibration | None = None
    source = ""
    manifest: dict[str, Any]
    _mismatch: BaseMismatch
    _engine: Any
    _table: Any
    _codec: Codec

    def __init__(self, path: str | Path):
        try:
            import lancedb  # optional
        except ImportError:
            raise lacking("a store", "lancedb", "store") from None
        self.path = str(path)
        with self._errors():
            # Readers see what is committed while they run.
            self._engine = lancedb.connect(self.path, read_consistency_interval=timedelta(0))

    @classmethod
    def open(
        cls,
        path: str | Path,
        compressor: Network | None = None,
        *,
        base: Base | None = None,
        base_mismatch: BaseMismatch = "refuse",
        name: str = "compressor",
        making: Making | None = None,
        encoder: str | None = None,
        keep_text: bool = False,
    ) -> Store:
        """A store to read or, with a compressor, to add to, which is made if there is none.

        Args:
            path: folder, or URI of object storage.
            base: reads the memories; by default the compressor's, or the one that the store names.
            base_mismatch: `allow` reads them with a base of other weights than made them, with a warning.
            name: of the compressor, stated beside its hash.
            making: sizes, codec and the like, by default `int4+ans`; the same for all memories of a store.
            encoder: what makes vectors: sentence-transformers id, folder, `all-minilm-l6-v2`, or `bm25` for none; by
                default the store's, for a new one `default_encoder`.
            keep_text: keep the texts too, which `bm25` always does.

        Raises:
            CompressorError: no store, a damaged one, or one of another base, compressor, codec, encoder or format.
        """
        check_no_file(path)
        there = is_store(path)
        if compressor is None and not there:
            raise CompressorError(
                f"{path} is no store of memories: `compressor index SOURCE --output {path}` makes one"
            )
        store = cls(path)
        store._mismatch, store.manifest = base_mismatch, {}
        if (reader := base if compressor is None else compressor.base) is not None:
            store.base = reader
        if there:
            with store._errors():
                store._table = store._engine.open_table(TABLE)
                store.manifest = json.loads(store._table.schema.metadata[b"manifest"])
        if compressor is not None:
            store.compressor, store.making = compressor, making or cls.making
            store._begin(compressor, name, encoder, keep_text)
        check_format(store.manifest, FORMAT, store.path)
        if store.manifest["codec"]["calibration"] is not None:
            store.calibration = Calibration.load(Path(path, BESIDE))
        return store

    def _begin(self, model: Network, name: str, encoder: str | None, keep_text: bool) -> None:
        """Make the table, or check that the one there was made in the same way."""
        import pyarrow as pa  # start-up

        self._codec = codec = chosen_codec(self.making)
        example = model.compress_ids(model.base.tokenise(["An example."]), self.making.tokens)[0]
        example = signed(example, model.base, compressor_name(model, name))
        example = codec.prepare(replace(example, made=example.made | self.making.numbers(model)))
        before = self.manifest
        encoder = encoder or (before["encoder"]["name"] if before else default_encoder())
        self.encoder = vectors = None if encoder == WORDS else TextEncoder(encoder, model.base.device)
        self.manifest = settings_of(example, codec, {}) | {
            "template": model.config.question_template,
            "encoder": {"name": encoder, "weights": "" if vectors is None else vectors.fingerprint},
            "keep_text": keep_text or vectors is None,
        }
        if before:
            return compare(before, self.manifest, self.path)
        if is_remote(self.path):
            require(codec.calibration is None, "codec", codec.name, "one without a calibration on object storage")
        else:
            make_folder(self.path)
            if any(one.suffix != ".lance" and one.name != BESIDE for one in Path(self.path).iterdir()):
                raise CompressorError(f"{self.path} holds other files and no store: give an empty or new folder")
            if codec.calibration is not None:
                codec.calibration.save(Path(self.path, BESIDE))
        kinds = dict.fromkeys(("id", "hash", "header", "digest", "source"), pa.string())
        kinds |= {"memory": pa.large_binary(), "fidelity": pa.float32()}
        kinds |= dict.fromkeys(("bytes", "tokens", "coded"), pa.int64())
        kinds |= {"text": pa.string()} if self.manifest["keep_text"] else {}
        kinds |= {} if vectors is None else {"vector": pa.list_(pa.float32(), vectors.size)}
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

    # -- adding ------------------------------------------------------------------------------------------------------

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

    def fill(
        self, names: Sequence[str], texts: Sequence[str], rows: int = 256, done: Callable[[int], None] = lambda n: None
    ) -> list[str]:
        """Compress records that the store lacks and commit them `rows` at a time; `done` is told how many were made.

        Returns:
            Ids of the texts that the tokenizer does not spell as they are.
        """
        if (model := self.compressor) is None:
            raise CompressorError("this store was opened to read: give Store.open the compressor that makes memories")
        respelled: list[str] = []
        for start in range(0, len(names), rows):
            memories: list[Memory] = []
            end, step = min(start + rows, len(names)), self.making.batch_size
            for first in range(start, end, step):
                found, odd = memories_of(self.making, model, texts[first : min(first + step, end)], self._codec)
                memories += found
                respelled += [names[first + number] for number in odd]
                done(len(found))
            self.write(names[start:end], texts[start:end], memories)
        return respelled

    def write(self, names: Sequence[str], texts: Sequence[str], memories: Sequence[Memory]) -> None:
        """Commit memories, all or none; when this returns they are on the disk."""
        import pyarrow as pa  # start-up

        rows, schema = [], self._table.schema
        vectors = [None] * len(texts) if self.encoder is None else self.encoder.embed(texts).numpy()
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
            if self.encoder is None and "text" not in indexed:
                self._table.create_index("text", config=FTS())
            elif self.encoder is not None and "vector" not in indexed and len(self) > EXHAUSTIVE:
                quick = IvfPq(distance_type="cosine", sample_rate=64, max_iterations=10)
                self._table.create_index("vector", config=quick)
            if self._table.stats()["fragment_stats"]["num_small_fragments"] > SMALL_FILES:
                # No one else writes to a folder, so that files no version lists are what a killed run left.
                age, left = timedelta(minutes=10), not is_remote(self.path)
                self._table.optimize(cleanup_older_than=age, delete_unverified=left)

    def add(self, texts: Mapping[str, str]) -> int:
        """Compress texts by their ids and commit them, less those that are there already; returns how many.

        Raises:
            CompressorError: another process writes to the store, or an id stands for another text.
        """
        require_texts("text", [*texts, *texts.values()])
        with owned_store(self.path):
            names, passages = list(texts), list(texts.values())
            todo = self.missing(names, passages)
            self.fill([names[i] for i in todo], [passages[i] for i in todo])
            self.finish()
        return len(todo)

    def delete(self, names: Sequence[str]) -> None:
        """Take records out; their bytes go when files are next put together. Errors are as for `add`."""
        with owned_store(self.path):
            self._rows(names, "hash")
            with self._errors():
                self._table.delete(_among(names))

    # -- reading -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with self._errors():
            return self._table.count_rows()

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """What makes vectors; None where texts are found by their words."""
        wanted = self.manifest["encoder"]
        if wanted["name"] == WORDS:
            return None
        found = TextEncoder(wanted["name"])
        if found.fingerprint != wanted["weights"]:
            raise CompressorError(
                f"{self.path} was made with {wanted['name']} of weights {wanted['weights'][:12]}, and it has "
                f"weights {found.fingerprint[:12]} now: get the encoder that made its vectors"
            )
        return found

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
            some = ", ".join(self.columns("id")[0][:3]) or "it is empty"
            raise CompressorError(f"{self.path} has no memory {absent[0]!r} among {len(self):,} ({some}, ...)")
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

    def search(self, question: str, top: int = 4) -> list[Hit]:
        """The records nearest to a question, nearest first."""
        require_texts("the question", [question])
        require_whole("top", top)
        columns = ["id", "fidelity", *(["text"] if self.manifest["keep_text"] else [])]
        vector = None if self.encoder is None else self.encoder.embed([question], question=True)[0].numpy()
        with self._errors():
            if vector is None:
                query, score = self._table.search(question, query_type="fts", fts_columns="text"), "_score"
            else:
                query, score = self._table.search(vector, vector_column_name="vector"), "_distance"
                query = query.distance_type("cosine").nprobes(64).refine_factor(10)
            rows = query.select([*columns, score]).limit(top).to_list()
        scores = [row[score] if vector is None else 1 - row[score] for row in rows]
        return [Hit(row["id"], one, row["fidelity"], row.get("text")) for row, one in zip(rows, scores, strict=True)]

    def ask(
        self,
        question: str,
        top: int = 1,
        read: Reading = "memories",
        tokens: int | None = None,
        template: str | None = None,
        sampling: Sampling | None = None,
    ) -> StoreAnswer:
        """Answer a question from the records nearest to it, placed in one context, the nearest last.

        Args:
            top: how many; more memories than a compressor was trained to read together spoil the answer.
            tokens: use only the first so many memory tokens of each segment.
            template: prompt of the question; by default the compressor's.

        Raises:
            CompressorError: nothing is found, another base, or texts that are not kept.
        """
        hits = self.search(question, top)
        prefix = self.together(hits, read, tokens)
        (found,) = answer(self.base, prefix, [question], template or self.manifest["template"], sampling=sampling)
        return StoreAnswer(found.text, hits, prefix.slots)

    def together(self, hits: Sequence[Hit], read: Reading = "memories", tokens: int | None = None) -> Prefix:
        """One context of records that were found, the first of them last; see `ask`."""
        if not hits:
            raise CompressorError(f"{self.path} has nothing like this question among {len(self):,}: ask in other words")
        names, base = [hit.id for hit in reversed(hits)], self.base
        if read == "texts":
            texts = self.texts(names)
        else:
            memories = [one if tokens is None else one.truncate(tokens) for one in self.load(names)]
            memories = [on_base(one, base) for one in memories] if self._mismatch == "allow" else memories
            if read == "memories":
                return memory_prefix(base, [Memory.concatenate(memories)])
            texts = regenerate(base, memories)
        return token_prefix(base, base.tokenise(["\n\n".join(text.strip() for text in texts)]))

    @cached_property
    def base(self) -> Base:
        """What reads the memories, if none was given."""
        return load_base(BaseConfig(path=self.manifest["base"]["name"]))


def _digest(row: Mapping[str, Any]) -> str:
    """Checksum of a memory, and of what its row says of it."""
    stated = "\0".join(row[key] for key in ("id", "hash", "header")).encode()
    return hashlib.sha256(stated + row["memory"]).hexdigest()


def _among(names: Sequence[str]) -> str:
    """Condition for rows of these ids."""
    return "id IN ({})".format(", ".join("'" + name.replace("'", "''") + "'" for name in names)) if names else "false"
