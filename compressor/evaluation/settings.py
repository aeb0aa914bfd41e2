"""The settings of an evaluation: what every task and study reads, and what each reads besides.

Which task or study is asked for is known before they are parsed (`table.py`): one that it does not read is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.errors import require
from compressor.model.config import CheckpointConfig, Decoding, DType

LEAST = {
    **dict.fromkeys(("segment_tokens", "question_tokens", "repeats", "limit", "batch_size"), 1),
    **dict.fromkeys(("refine_steps", "resamples", "seed"), 0),
    "candidates": 2,
}
"""Smallest values of settings that are numbers."""


@dataclass
class EvaluationConfig(CheckpointConfig):
    """One evaluation: a checkpoint and a task."""

    task: str = "regeneration"
    """What is measured: regeneration, qa, interference (of a memory with unrelated questions), continuation (of what
    follows a passage), retrieve (a passage from a query), prompt (any instruction, --prompt) or the name of a preset in
    configs/tasks (summarise, entities, ...); or a study: utilisation (what each memory token and layer is used for),
    efficiency (what a memory saves)."""
    tokens: list[int] = field(default_factory=list)
    """Numbers of memory tokens, for instance 16 4 1; by default all the checkpoint has."""
    output: str = "outputs/evaluation"
    """Folder for metrics.json, predictions.jsonl, config.yaml, table.md and plots."""
    dtype: DType = "float32"
    """Type the base computes in; auto: bfloat16 on GPUs and on processors that are made for it."""
    decoding: Decoding = "auto"
    """How the base writes: static takes caches of a fixed width, compiled also compiles the step of a token, for
    evaluations on a GPU that are long enough to pay for the minute that takes."""
    seed: int = 0
    """Seed of the resamples; decoding is greedy."""

    @property
    def loading(self) -> dict[str, Any]:
        """What `Compressor.from_pretrained` takes besides checkpoint and device."""
        names = ("base", "dtype", "base_mismatch", "decoding")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        super().__post_init__()
        given = vars(self)
        for name, least in LEAST.items():
            value = given.get(name)
            require(value is None or value >= least, name, value, f"at least {least}")
        for name in ("data", "methods"):
            values = given.get(name, [])
            require(len(set(values)) == len(values), name, values, "names that differ from each other")
        for name in ("tokens", "lengths", "new_tokens"):
            values = given.get(name, [])
            require(all(value >= 1 for value in values), name, values, "numbers of at least 1")
            require(len(set(values)) == len(values), name, values, "numbers that differ from each other")
        require(given.get("new_tokens") != [], "new_tokens", [], "at least one number")


@dataclass
class ItemSettings(EvaluationConfig):
    """What is read by all that measure a checkpoint on items of data."""

    data: list[str] = field(default_factory=list)
    """Data sets, each reported in rows of its own: JSONL, Parquet, CSV or text files, folders, shipped names or hub
    ids; by default the shipped ones of the task."""
    split: str | None = None
    """Split of a data set that has several."""
    limit: int | None = None
    """Most passages for each length (the first ones long enough)."""
    skip_bad_records: bool = False
    """Leave records out that are null, blank or broken, up to one in twenty, and count them in metrics.json; otherwise
    the first of them is an error."""
    segment_tokens: int | None = None
    """Compress passages in segments of at most so many tokens, each to `tokens` memory tokens; by default segments are
    as long as the compressor takes."""
    refine_steps: int = 0
    """Gradient steps on each memory of a trained method (`compressor/model/refinement.py`)."""
    batch_size: int = 16
    """Passages handled together on each device. Rounding differs a little from one batch size to another."""
    resamples: int = 1000
    """Bootstrap resamples behind the 95% intervals."""


@dataclass
class TaskSettings(ItemSettings):
    """What every task reads: the methods that are compared."""

    methods: list[str] = field(default_factory=list)
    """Methods to compare, by default the checkpoint's own (prompt: beside its bounds): kv, reference-500x, icae,
    mean-pool, anchor, sentence-embedding, full-tuned, none-tuned (trained; NAME=CHECKPOINT, or NAME for a folder of
    that name beside the checkpoint or in methods/ there), recite, recite-tuned (where a prefix ships for the base),
    full, none, truncate, keywords, summary, llmlingua2."""
    refine_from: Literal["encoder", "random"] = "encoder"
    """What refine_steps start from: the memory that the encoder makes, or random vectors, to see what that is worth."""
    refine_keep: float = 0.3
    """Weight of what a memory answered before its gradient steps: 0 refines for regeneration alone."""
    summariser: str | None = None
    """Seq2seq summariser (folder or hub id) of the method summary; by default sentences are extracted."""
    llmlingua: str = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
    """Token classifier (folder or hub id) of the method llmlingua2."""


@dataclass
class PassageSettings:
    """Which passages are taken, and how much of them."""

    text_field: str | None = None
    """Field that holds the passage; by default `text` or `abstract`."""
    lengths: list[int] = field(default_factory=list)
    """Lengths in tokens: passages at least that long are cut to it. By default passages are taken whole."""


@dataclass
class QuestionSettings:
    """Which questions are asked, and how."""

    question_columns: dict[str, str] = field(default_factory=dict)
    """Names of the questions' columns where they are not the usual ones, for instance `{context: abstract}`."""
    question_tokens: int | None = None
    """Ask about the stretch of at most so many tokens that holds the answer, instead of about the whole context.
    Questions whose answer none holds are left out and counted."""
    keep_unanswerable: bool = False
    """Ask questions that the data says have no answer (SQuAD 2.0), too; right is to say nothing."""
    question_template: str | None = None
    """Prompt of a question, with `{question}` in it, or `chat`, with arguments of the template as in
    `chat {"enable_thinking": false}`; by default the checkpoint's."""


@dataclass
class ContinuationSettings(PassageSettings, TaskSettings):
    """Settings of the task continuation."""


@dataclass
class RegenerationSettings(ContinuationSettings):
    """Settings of the task regeneration."""

    published: bool = False
    """Show the figures of the 500xCompressor paper (an 8B base) beside these: second table, dashed lines."""


@dataclass
class QuestionAnsweringSettings(QuestionSettings, TaskSettings):
    """Settings of the tasks qa and interference."""


@dataclass
class PromptSettings(TaskSettings):
    """Settings of the prompted task and its presets."""

    prompt: str = ""
    """YAML of the prompt (configs/tasks/NAME.yaml, or NAME): instruction, columns, labels, metrics; without, rows hold
    their instructions."""
    question_template: str | None = None
    """Prompt of an instruction, with `{question}` in it, or `chat`; by default the preset's, else the checkpoint's."""


@dataclass
class RetrieveSettings(TaskSettings):
    """Settings of the task retrieve."""

    text_field: str | None = None
    """Field that holds the passage; by default `text` or `abstract`."""
    question_columns: dict[str, str] = field(default_factory=dict)
    """Names of the questions' columns where they are not the usual ones, for instance `{context: abstract}`."""
    candidates: int = 16
    """Most passages that a query is to be found among."""


@dataclass
class UtilisationSettings(QuestionSettings, PassageSettings, ItemSettings):
    """Settings of the study utilisation."""


@dataclass
class EfficiencySettings(EvaluationConfig):
    """Settings of the study efficiency."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of the passage; by default 500, or as many as the compressor takes."""
    new_tokens: list[int] = field(default_factory=lambda: [100, 200, 300, 400])
    """Numbers of new tokens to report on."""
    repeats: int = 5
    """Timed runs of each variant, of which medians are reported."""
