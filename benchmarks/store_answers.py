"""A store of real paragraphs: what is found, what 1 to 8 memories in one context answer, and what they cost.

    python benchmarks/store_answers.py --data SQUAD_DEV NQ_DEV --output results/smollm2-135m/store.json

Parts, each kept as soon as it is measured: `together` (answers from memories placed in one context, the right one at a
random place among others, against the same passages as text and as the memories give them back), `codecs` (bytes of a
row against answers), `indexing` (paragraphs compressed by the store itself), `recall` (all paragraphs, the index
alone). Needs `compressor fetch all-minilm-l6-v2`.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compressor.api import Compressor
from compressor.data.prompts import answer_ids, question_ids
from compressor.data.questions import Question, load_questions
from compressor.evaluation.metrics import answer_scores, bootstrap, ratio
from compressor.files import write_json
from compressor.model.decoder import empty_prefix, score, token_prefix
from compressor.model.generation import after, answer, generate, regenerate
from compressor.model.memory import Memory, memory_prefix
from compressor.model.text_encoder import MINILM, TextEncoder
from compressor.parsing import parse_config
from compressor.processes import held_dtype
from compressor.storage.codec import Codec
from compressor.storage.fitting import calibrate
from compressor.storage.making import Making
from compressor.storage.memory_file import as_stored, encode
from compressor.storage.store import Store
from compressor.streams import exits_cleanly

TOP = (1, 2, 4, 8)
CODECS = ("bf16", "int8", "int4+ans", "lowrank:0.4", "lowrank:0.15")
BRIEFLY = " Answer in a few words."


@dataclass
class Options:
    """What the benchmark takes."""

    data: list[str]
    """Questions with the paragraphs that answer them."""
    output: str
    """JSON file, added to after each part."""
    checkpoint: str = "models/smollm2-135m/compressor"
    parts: list[str] = field(default_factory=lambda: ["together", "codecs", "indexing", "recall"])
    """Which to measure; the others stay as the file has them."""
    questions: int = 40
    """Questions that are answered, as many of each set."""
    longest: int = 128
    """Answers are read from paragraphs of at most so many tokens, each of which is one segment's memory."""
    every: int = 10
    """Recall is over every so many-th question."""
    indexed: int = 1_000
    """Paragraphs, of any length, that the store compresses; fewer where there are fewer."""
    indexing_data: list[str] = field(default_factory=list)
    """Questions whose paragraphs these are; by default --data."""
    measured: int = 16
    """Of these, how many a second time with the share that comes back."""
    fitted: int = 96
    """Other paragraphs that low rank is fitted on."""
    recited: list[int] = field(default_factory=lambda: [1])
    """Passages together whose regeneration is read: it takes longest."""
    new_tokens: int = 16
    """Most tokens of an answer."""
    batch_size: int = 40
    """Contexts that are read together."""
    dtype: str = "auto"


@contextmanager
def by_words(texts: list[str]) -> Iterator[Callable[[str, int], list[str]]]:
    """A search among texts by the words of a question, nearest first (LanceDB's BM25, as a store's)."""
    import lancedb
    from lancedb.index import FTS

    with tempfile.TemporaryDirectory() as folder:
        table = lancedb.connect(folder).create_table("texts", [{"text": text} for text in texts])
        table.create_index("text", config=FTS())

        def search(question: str, top: int) -> list[str]:
            found = table.search(question, query_type="fts", fts_columns="text").select(["text", "_score"])
            return [row["text"] for row in found.limit(top).to_list()]

        yield search


def embedded(encoder: TextEncoder, texts: list[str], dtype: str, question: bool = False) -> torch.Tensor:
    """Vectors `[texts, size]`, computed in bfloat16 where that is the base's type (a store computes in float32)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        return encoder.embed(texts, question)


def recall(sets: dict[str, list[Question]], contexts: list[str], dtype: str) -> list[dict[str, Any]]:
    """Share of the questions whose paragraph is among the first 1, 2, 4, 8."""
    encoder, rows = TextEncoder(MINILM), []
    place = {text: number for number, text in enumerate(contexts)}
    vectors = embedded(encoder, contexts, dtype)
    with by_words(contexts) as search:
        for name, questions in sets.items():
            right = torch.tensor([place[one.context] for one in questions])
            near = embedded(encoder, [one.question for one in questions], dtype, question=True) @ vectors.T
            ranks = {"vectors": (near > near.gather(1, right[:, None])).sum(1).tolist(), "words": []}
            for one in questions:
                found = search(one.question, TOP[-1])
                ranks["words"].append(found.index(one.context) if one.context in found else TOP[-1])
            for way, counted in ranks.items():
                row = {"data": name, "way": way, "passages": len(contexts), "questions": len(questions)}
                rows.append(row | {f"recall_at_{top}": float(np.mean(np.array(counted) < top)) for top in TOP})
    return rows


class Asked:
    """Questions on short paragraphs, with the others that are placed beside each one's own."""

    def __init__(self, model: Compressor, sets: dict[str, list[Question]], contexts: list[str], options: Options):
        rng = np.random.default_rng(0)
        self.model, self.batch, self.limit = model, options.batch_size, options.new_tokens
        lengths = dict(zip(contexts, map(len, model.base.tokenise(contexts)), strict=True))
        short = [text for text, length in lengths.items() if 24 <= length <= options.longest]
        chosen: list[Question] = []
        for questions in sets.values():
            fits = [one for one in questions if 24 <= lengths[one.context] <= options.longest]
            places = rng.permutation(len(fits))[: options.questions // len(sets)]
            chosen += [fits[place] for place in places]
        self.questions = chosen
        self.others: dict[str, list[list[str]]] = {"similar": [], "random": []}
        with by_words(short) as search:
            for one in chosen:
                near = [text for text in search(one.question, TOP[-1]) if text != one.context]
                self.others["similar"].append(near[: TOP[-1] - 1])
        pool = list(dict.fromkeys(text for group in self.others["similar"] for text in group))
        for one in chosen:
            some = [text for text in rng.permutation(pool).tolist() if text != one.context]
            self.others["random"].append(some[: TOP[-1] - 1])
        self.places = rng.random(len(chosen))
        self.pool = list(dict.fromkeys([*(one.context for one in chosen), *pool]))
        self.rest = [text for text in short if text not in set(self.pool)]
        self.ids = dict(zip(self.pool, model.base.tokenise(self.pool), strict=True))
        made = model.compress_ids(list(self.ids.values()), segment_tokens=options.longest)
        self.memories = dict(zip(self.pool, made, strict=True))
        self.template = model.config.question_template

    def group(self, number: int, kind: str, count: int) -> list[str]:
        """Paragraphs of one context: the right one at a random place among `count - 1` others."""
        texts = self.others[kind][number][: count - 1]
        texts.insert(int(self.places[number] * count), self.questions[number].context)
        return texts

    def rows(self, groups: list[list[str]], prefixes: Any, template: str, suffix: str = "") -> dict[str, Any]:
        """F1 and EM over all questions; of the compressor's own template also nats of the first right answer.

        Args:
            prefixes: makes one prefix of several groups.
        """
        base = self.model.base
        columns: dict[str, list[float]] = {name: [] for name in ("f1", "em", "nats", "slots")}
        for start in range(0, len(groups), self.batch):
            some = self.questions[start : start + self.batch]
            asked = [one.question + suffix for one in some]
            prefix = prefixes(groups[start : start + self.batch])
            written = answer(base, prefix, asked, template, self.limit)
            if template == self.template:
                prompts = after(base, prefix, question_ids(base.tokenizer, asked, template))
                right = [[*ids, base.eos] for ids in answer_ids(base.tokenizer, [one.answers for one in some])]
                columns["nats"] += [-float(row[:, 0].sum()) for row in score(base, prefix, prompts, right)]
            for one, said in zip(some, written, strict=True):
                exact, f1 = answer_scores(said.text, one.answers)
                columns["f1"].append(f1)
                columns["em"].append(exact)
            columns["slots"] += prefix.mask.sum(1).tolist()
        return figures(columns)

    def from_memories(self, memories: dict[str, Memory] | None = None) -> Any:
        """See `rows`."""
        held = memories or self.memories
        return lambda groups: memory_prefix(
            self.model.base, [Memory.concatenate([held[text] for text in texts]) for texts in groups]
        )

    def from_texts(self, ids: dict[str, list[int]]) -> Any:
        """See `rows`."""
        base = self.model.base
        (gap,) = base.tokenise(["\n\n"])
        return lambda groups: token_prefix(
            base,
            [
                [token for n, text in enumerate(texts) for token in [*(gap if n else []), *ids[text]]]
                for texts in groups
            ],
        )


def figures(columns: dict[str, list[float]]) -> dict[str, Any]:
    """Means with intervals, rounded."""
    row: dict[str, Any] = {"n": len(columns["f1"]), "positions": statistics.mean(columns["slots"])}
    shown = {name: columns[name] for name in ("f1", "em", "nats") if columns[name]} | {"questions": [1] * row["n"]}
    wanted = {name: ratio(name, "questions", 1 if name == "nats" else 100) for name in shown if name != "questions"}
    for name, found in bootstrap(shown, wanted).items():
        row |= {name: round(found.value, 2), f"{name}_low": round(found.low, 2), f"{name}_high": round(found.high, 2)}
    return row


def together(asked: Asked, options: Options, result: dict[str, Any], keep: Any) -> None:
    """Answers from 1 to 8 passages in one context: from memories, from texts, and from what memories give back."""
    base = asked.model.base
    alone = [asked.group(number, "random", 1) for number in range(len(asked.questions))]
    # Texts are asked in the way that suits them better with one passage: the comparison is not to favour memories.
    ways, texts = [(asked.template, ""), ("chat", BRIEFLY)], asked.from_texts(asked.ids)
    tried = [asked.rows(alone, texts, *way) for way in ways]
    best = max(range(len(ways)), key=lambda i: tried[i]["f1"])
    way = ways[best]
    result["asking_texts"] = [{"template": t, "suffix": s, **row} for (t, s), row in zip(ways, tried, strict=True)]
    nothing = asked.rows(alone, lambda groups: empty_prefix(base, len(groups)), asked.template)
    rows = result["together"] = [{"read": "nothing", "count": 0, "others": "none", **nothing}]
    rows.append({"read": "texts", "count": 1, "others": "none", **tried[best]})

    def measure(read: str, prefixes: Any, asking: tuple[str, str], counts: Iterable[int], kinds: Sequence[str]) -> None:
        for count, kind in itertools.product(counts, kinds):
            if count == 1 and kind != kinds[0]:  # there are no others
                continue
            groups = [asked.group(number, kind, count) for number in range(len(asked.questions))]
            row = asked.rows(groups, prefixes, *asking)
            rows.append({"read": read, "count": count, "others": kind if count > 1 else "none", **row})
            print(json.dumps(rows[-1]), flush=True)
            keep()

    measure("memories", asked.from_memories(), (asked.template, ""), TOP, ("random", "similar"))
    result["first_token"] = [first_token(asked, count) for count in TOP]
    measure("texts", texts, way, TOP[1:], ("random",))
    groups = [asked.group(number, "random", max(options.recited)) for number in range(len(asked.questions))]
    needed = list(dict.fromkeys(text for group in groups for text in group))
    began = time.process_time()
    back = regenerate(base, [asked.memories[text] for text in needed])
    result["recite_seconds_a_passage"] = (time.process_time() - began) / len(needed)
    recited = asked.from_texts(dict(zip(needed, base.tokenise(back), strict=True)))
    measure("recited", recited, way, options.recited, ("random",))


def first_token(asked: Asked, count: int, repeats: int = 5) -> dict[str, Any]:
    """Processor seconds from what is held (memories, or tokens of texts) to an answer's first token; medians."""
    base = asked.model.base
    row: dict[str, Any] = {"count": count}
    for name, prefixes in (("memories", asked.from_memories()), ("texts", asked.from_texts(asked.ids))):
        spent = []
        for number in range(repeats):
            groups = [asked.group(number, "random", count)]
            prompts = question_ids(base.tokenizer, [asked.questions[number].question], asked.template)
            began = time.process_time()
            prefix = prefixes(groups)
            generate(base, prefix, prompts, [1])
            spent.append(time.process_time() - began)
        row[f"{name}_seconds"] = statistics.median(spent)
    return row


def codecs(asked: Asked, options: Options, result: dict[str, Any], keep: Any) -> None:
    """Bytes of a row's memory and answers from it, for each codec."""
    model = asked.model
    texts = asked.rest[: options.fitted]
    fitted = calibrate(model, model.base.tokenise(texts), sensitivity_passages=16)
    result["fitted_on"] = len(texts)
    result["codecs"] = []
    for name in CODECS:
        codec = Codec.parse(name, fitted if name.startswith("lowrank") else None)
        own = {one.context: asked.memories[one.context] for one in asked.questions}
        stored = {text: as_stored(memory, codec) for text, memory in own.items()}
        sizes = [
            len(save({key: value.contiguous() for key, value in encode(codec.prepare(memory), codec)[0].items()}))
            for memory in own.values()
        ]
        row = {"codec": name, "bytes_a_passage": statistics.mean(sizes)}
        row["text_bytes_a_passage"] = statistics.mean(len(text.encode()) for text in own)
        groups = [asked.group(number, "random", 1) for number in range(len(asked.questions))]
        row |= asked.rows(groups, asked.from_memories(stored), asked.template)
        result["codecs"].append(row)
        print(json.dumps(row), flush=True)
        keep()


def indexing(model: Compressor, contexts: list[str], options: Options, result: dict[str, Any]) -> None:
    """Seconds and bytes a passage of a store in int4+ans, with vectors."""
    rng = np.random.default_rng(1)
    chosen = [contexts[place] for place in rng.permutation(len(contexts))[: options.indexed]]
    found: dict[str, Any] = {"load": os.getloadavg()[0], "codec": "int4+ans", "dtype": options.dtype}
    for measured, texts in ((False, chosen), (True, chosen[: options.measured])):
        with tempfile.TemporaryDirectory() as folder:
            store = Store.open(
                Path(folder, "s"), model, making=Making(codec="int4+ans", no_measure=not measured), encoder=MINILM
            )
            began, cpu = time.perf_counter(), time.process_time()
            store.add({str(number): text for number, text in enumerate(texts)})
            spent, spent_cpu = time.perf_counter() - began, time.process_time() - cpu
            size = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file())
            coded, tokens, fidelity = store.columns("coded", "tokens", "fidelity")
        end = "_measured" if measured else ""
        found |= {f"passages{end}": len(texts), f"seconds_a_passage{end}": spent / len(texts)}
        found |= {f"processor_seconds_a_passage{end}": spent_cpu / len(texts)}
        if measured:
            found["fidelity"] = statistics.mean(fidelity)
        else:
            found |= {"bytes_a_passage": size / len(texts), "memory_bytes_a_passage": statistics.mean(coded)}
            found |= {"tokens_a_passage": statistics.mean(tokens)}
    result["indexing"] = found


@exits_cleanly
def main() -> int:
    """Measure the parts that are asked for."""
    options, _ = parse_config(
        Options, None, "Real paragraphs in a store: found, answered from together, coded, indexed."
    )
    path = Path(options.output)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sets = {}
    for source in options.data:
        questions = load_questions(source)
        sets[questions[0].dataset] = questions
    contexts = list(dict.fromkeys(one.context for questions in sets.values() for one in questions))
    options.dtype = held_dtype(options.dtype, torch.device("cpu"))
    model = Compressor.from_pretrained(options.checkpoint, dtype=options.dtype)
    result["settings"] = {name: getattr(options, name) for name in ("checkpoint", "dtype", "longest")}
    result["settings"] |= {"encoder": MINILM, "data": {name: len(questions) for name, questions in sets.items()}}

    def keep() -> None:
        write_json(path, result)

    if {"together", "codecs"} & set(options.parts):
        asked = Asked(model, sets, contexts, options)
        result["pool"] = len(asked.pool)
    for part in options.parts:
        began = time.perf_counter()
        if part == "recall":
            some = {name: questions[:: options.every] for name, questions in sets.items()}
            result["recall"] = recall(some, contexts, options.dtype)
        elif part == "together":
            together(asked, options, result, keep)
        elif part == "codecs":
            codecs(asked, options, result, keep)
        else:
            named = [one.context for source in options.indexing_data for one in load_questions(source)]
            indexing(model, list(dict.fromkeys(named)) or contexts, options, result)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
        keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
