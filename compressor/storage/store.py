"""A store: memories of a corpus in a LanceDB table, found by id, by a question's vector or by its words.

The engine runs in the process, on a folder or on object storage (`s3://bucket/name`). Rows (`memory_table.py`) are
committed some hundreds at a time, whole or not at all: a killed run leaves what it had committed, and, run again, goes
on with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from compressor.errors import CompressorError, require_texts, require_whole
from compressor.files import check_no_file
from compressor.model.base import Base
from compressor.model.cartridge import text_prefix
from compressor.model.checkpoint import compressor_name
from compressor.model.config import BaseConfig, BaseMismatch
from compressor.model.decoder import Prefix
from compressor.model.generation import Sampling, answer, regenerate
from compressor.model.load import load_base
from compressor.model.memory import Memory, memory_prefix, on_base, signed
from compressor.model.network import Network
from compressor.model.text_encoder import WORDS, TextEncoder, default_encoder
from compressor.storage.calibration import Calibration
from compressor.storage.container import check_format
from compressor.storage.making import Making
from compressor.storage.memorise import chosen_codec, memories_of
from compressor.storage.memory_file import BESIDE, FORMAT, settings_of
from compressor.storage.memory_table import MemoryTable, compare, is_store, no_store, owned_store

Reading = Literal["memories", "recite", "texts"]
"""What the decoder reads of the records found: memories, what these regenerate, or the texts that are kept."""


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


class Store(MemoryTable):
    """A store that `open` opened: the table with what makes memories and vectors, and what reads them."""

    compressor: Network | None = None
    making = Making(codec="int4+ans")
    _mismatch: BaseMismatch

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
        if compressor is None and not is_store(path):
            raise no_store(path)
        store = cls(path)
        store._mismatch = base_mismatch
        if (reader := base if compressor is None else compressor.base) is not None:
            store.base = reader
        if compressor is not None:
            store.compressor, store.making = compressor, making or cls.making
            store._begin(compressor, name, encoder, keep_text)
        check_format(store.manifest, FORMAT, store.path)
        if store.manifest["codec"]["calibration"] is not None:
            store.calibration = Calibration.load(Path(path, BESIDE))
        return store

    def _begin(self, model: Network, name: str, encoder: str | None, keep_text: bool) -> None:
        """Make the table, or check that the one there was made in the same way."""
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
        self._make(None if vectors is None else vectors.size)

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
            some = texts[start:end]
            vectors: Any = [None] * len(some) if self.encoder is None else self.encoder.embed(some).numpy()
            self.write(names[start:end], some, memories, vectors)
        return respelled

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

    def together(
        self,
        hits: Sequence[Hit],
        read: Reading = "memories",
        tokens: int | None = None,
        of_texts: Callable[[Base, Sequence[Sequence[int]]], Prefix] = text_prefix,
    ) -> Prefix:
        """One context of records that were found, the first of them last; see `ask`.

        Args:
            of_texts: what the decoder reads of token ids; `token_prefix` where no question follows but an instruction.
        """
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
        return of_texts(base, base.tokenise(["\n\n".join(text.strip() for text in texts)]))

    @cached_property
    def base(self) -> Base:
        """What reads the memories, if none was given."""
        return load_base(BaseConfig(path=self.manifest["base"]["name"]))
