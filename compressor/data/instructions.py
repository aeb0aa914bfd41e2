"""Instructions about texts: rows of any data set as questions, made as a preset says (`configs/tasks/NAME.yaml`).

A preset names the instruction, the columns it is made from, and how answers are written and judged. What comes out is
read through the questions' door (`load_questions`), by evaluation, by stage `answer` and by `compressor ask` alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from compressor.data.rows import BadRecord, Row, type_name
from compressor.errors import CompressorError, require
from compressor.files import PROJECT

PRESETS = PROJECT / "configs" / "tasks"
CONTEXT, ANSWERS = ("context", "passage", "text", "abstract", "source"), ("answers", "answer", "targets", "references")
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """How rows become instructions, and how answers to them are read and judged."""

    instruction: str = ""
    """What is asked, with `{NAME}` for a column (of the row, or of `columns`) and `{labels}` for the labels; where it
    is empty, rows hold it under `instruction` or `question`."""
    template: str | None = None
    """Prompt of an instruction, with `{question}` in it, or `chat`; by default the checkpoint's."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """Texts and their answers, `{text: ..., answer: ...}`, that are shown after the instruction."""
    columns: dict[str, list[str]] = field(default_factory=dict)
    """Names that columns go by, the first one that a row has is taken; of `context` and `answers`, the usual ones."""
    answer: Literal["text", "label", "list"] = "text"
    """How an answer is read: as it is written, as the likeliest label, or as a list."""
    labels: list[str] = field(default_factory=list)
    """What to choose from; by default what occurs in the data. The first is the one that AUC ranks by."""
    options: str = ""
    """Column with each row's own labels, instead of `labels`."""
    meanings: dict[str, str] = field(default_factory=dict)
    """Labels by what the data calls them."""
    each: bool = False
    """Where text and answers are lists of the same length, each pair is an item (sentences of an abstract)."""
    separator: str = ";"
    """Between the members of a list."""
    nothing: str = "none"
    """How an empty list is written."""
    new_tokens: int = 48
    """Most tokens of a written answer."""
    metrics: list[str] = field(default_factory=lambda: ["answers"])
    """Names in `compressor/evaluation/scores.py`."""
    data: list[str] = field(default_factory=list)
    """Data sets that are measured where none is named."""
    split: str | None = None
    """Their split."""
    needs: str = ""
    """What data the task reads and where to get it."""

    def __post_init__(self) -> None:
        require(self.answer in ("text", "label", "list"), "answer", self.answer, "text, label or list")
        require(self.new_tokens >= 1, "new_tokens", self.new_tokens, "at least 1")
        require(bool(self.metrics), "metrics", self.metrics, "a non-empty list")
        require(len(self.labels) != 1, "labels", self.labels, "several, or none: those of the data")
        for example in self.examples:
            require(set(example) == {"text", "answer"}, "examples", example, "{text: ..., answer: ...}")

    @property
    def places(self) -> set[str]:
        """Names of what the instruction is made from."""
        return set(_PLACE.findall(self.instruction))

    def listed(self, written: str) -> list[str]:
        """The members of a written list, none twice."""
        parts = [part.strip(" \n.") for part in written.split(self.separator.strip() or None)]
        return [part for part in dict.fromkeys(parts) if part and part.casefold() != self.nothing.casefold()]

    def asks(self, values: Mapping[str, Any], where: str = "the row") -> str:
        """The instruction for a row, with the examples; `{labels}` stays where they are not known yet.

        Raises:
            CompressorError: the row lacks a column that the instruction names.
        """
        if not self.instruction:
            return str(values.get("instruction") or values.get("question") or "")
        texts = {"labels": either(self.labels)} if self.labels else {"labels": "{labels}"}
        for name in self.places - set(texts):
            texts[name] = str(values[self._column(values, name, (name,), where)])
        asked = _PLACE.sub(lambda match: texts[match[1]], self.instruction)
        shown = [f'For "{one["text"]}" it is: {one["answer"]}.' for one in self.examples]
        return " ".join([asked, *shown])

    def rows(self, row: Row) -> Iterator[Row]:
        """The questions of a row: `id`, `context`, `question`, `answers` and, of labels, `choices`.

        Raises:
            BadRecord: a field of it is broken.
            CompressorError: it lacks a column.
        """
        values = row.values
        context = self._column(values, "context", CONTEXT, row.where)
        answers = self._column(values, "answers", ANSWERS, row.where)
        text, right = values[context], values[answers]
        if self.each and isinstance(text, list):
            if not isinstance(right, list) or len(text) != len(right):
                count = len(right) if isinstance(right, list) else 1
                raise BadRecord(f"{row.where}: {len(text)} sentences have {count} labels")
            pairs = list(zip(text, right, strict=True))
        else:
            # SciTLDR's own files hold a text as a list of its sentences.
            pairs = [(" ".join(map(str, text)) if isinstance(text, list) else text, right)]
        for number, (passage, wanted) in enumerate(pairs, start=1):
            made = {**values, "context": passage, "answers": self._answers(row, wanted)}
            made["question"] = self.asks(values, row.where)
            if self.options:
                made["choices"] = [str(one) for one in values.get(self.options) or []]
            if len(pairs) > 1 and (name := next((n for n in ("id", "abstract_id") if n in values), None)):
                made["id"] = f"{values[name]}:{number}"
            yield row._replace(values=made)

    def _answers(self, row: Row, value: Any) -> list[str]:
        """Right answers as texts: the meaning of a label, the members of a list in one text, or any of several."""
        if self.answer == "list":
            members = value if isinstance(value, list) else self.listed(str(value))
            return [f"{self.separator} ".join(map(str, members)) or self.nothing]
        found = value if isinstance(value, list) else [value]
        if not found:
            raise BadRecord(f"{row.where}: the answer is empty")
        if self.answer == "label" and not self.options:
            if not isinstance(found[0], str | int | float):
                raise BadRecord(f"{row.where}: the label must be text or a number but is {type_name(found[0])}")
            label = spelled_plainly(found[0])
            meanings = {spelled_plainly(name): meaning for name, meaning in self.meanings.items()}
            # A right answer is spelled as the labels to choose from are: else none that is chosen would be right.
            known = {spelled_plainly(one): one for one in (*self.labels, *self.meanings.values())} | meanings
            if self.meanings and label not in known:
                raise BadRecord(f"{row.where}: the label {found[0]!r} is none of {', '.join(self.meanings)}")
            return [known.get(label, label)]
        return found

    def _column(self, values: Mapping[str, Any], name: str, usual: tuple[str, ...], where: str) -> str:
        names = self.columns.get(name, usual)
        for one in names:
            if one in values:
                return one
        raise CompressorError(
            f"{where} has no field {' or '.join(map(repr, names))}; its fields are "
            f"{', '.join(map(repr, values)) or 'none'}. {self.needs}".rstrip()
        )


def spelled_plainly(label: Any) -> str:
    """A label as labels are compared: in lower case, with spaces for underscores."""
    return str(label).lower().replace("_", " ")


def either(labels: list[str]) -> str:
    """The labels in a sentence: A, B or C."""
    return f"{', '.join(labels[:-1])} or {labels[-1]}"


def preset_names() -> list[str]:
    """Presets that ship with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_prompt(name: str | Path) -> Prompt:
    """A prompt from a YAML file, or the preset of a name.

    Raises:
        CompressorError: no such file or preset, or a setting that it cannot have.
    """
    path = PRESETS / f"{name}.yaml" if f"{name}" in preset_names() else Path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompressorError(
            f"there is no prompt {name}: {reason}. Give a YAML file, or one of {', '.join(preset_names())}"
        ) from None
    known = [one.name for one in fields(Prompt)]
    if not isinstance(content, dict) or (unknown := sorted(set(content) - set(known))):
        what = f"no setting {unknown[0]!r}" if isinstance(content, dict) else f"no {type_name(content)}"
        raise CompressorError(f"{path}: a prompt has {what}; it has {', '.join(known)}")
    columns = content.get("columns") or {}
    content["columns"] = {key: one if isinstance(one, list) else [one] for key, one in columns.items()}
    try:
        return Prompt(**content)
    except (TypeError, AttributeError) as error:
        raise CompressorError(f"{path} is not a prompt: {error}") from None
