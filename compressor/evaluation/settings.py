"""The settings of an evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from compressor.errors import require
from compressor.model.bases import default_checkpoint
from compressor.model.config import BaseMismatch


@dataclass
class EvaluationConfig:
    """One evaluation: a checkpoint, a task, data, and the sizes and lengths to measure at."""

    checkpoint: str = ""
    """Compressor checkpoint: folder or hub id; by default the bundled one of smollm2-135m where this base is at hand
    (`compressor fetch smollm2-135m`), else that of arxiv-mini."""
    base: str | None = None
    """Folder, hub id, GGUF file or name of the frozen base; by default the one the checkpoint names."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: take a base with other weights than the checkpoint was trained on, with a warning."""
    task: str = "regeneration"
    """What is measured: regeneration, qa, continuation (of what follows a passage), summarise, classify, paraphrase,
    retrieve (a passage from a query); or a study: utilisation (what each memory token and layer is used for),
    efficiency (what a memory saves)."""
    data: list[str] = field(default_factory=list)
    """Data sets, each reported in rows of its own: JSONL, Parquet, CSV or text files, folders, shipped names or hub
    ids; by default the shipped ones of the task."""
    methods: list[str] = field(default_factory=list)
    """Methods to compare, by default the checkpoint's own: kv, reference-500x, icae, mean-pool, anchor,
    sentence-embedding, full-tuned, none-tuned (trained; NAME=CHECKPOINT, or NAME for the folder methods/NAME beside
    the checkpoint), full, none, truncate, keywords, summary, llmlingua2."""
    split: str | None = None
    """Split of a data set that has several."""
    text_field: str | None = None
    """Field that holds the passage; by default `text` or `abstract`."""
    tokens: list[int] = field(default_factory=list)
    """Numbers of memory tokens, for instance 16 4 1; by default all the checkpoint has."""
    lengths: list[int] = field(default_factory=list)
    """Lengths in tokens: passages at least that long are cut to it. By default passages are taken whole."""
    limit: int | None = None
    """Most passages for each length (the first ones long enough)."""
    segment_tokens: int | None = None
    """Compress passages in segments of at most so many tokens, each to `tokens` memory tokens; by default segments are
    as long as the compressor takes."""
    refine_steps: int = 0
    """Gradient steps on each memory of a trained method (`compressor/model/refinement.py`)."""
    refine_from: Literal["encoder", "random"] = "encoder"
    """What these steps start from: the memory that the encoder makes, or random vectors, to see what that is worth."""
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
    summariser: str | None = None
    """Seq2seq summariser (folder or hub id) of the method summary; by default sentences are extracted."""
    keyword_language: str = "en"
    """Language of the method keywords."""
    llmlingua: str = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
    """Token classifier (folder or hub id) of the method llmlingua2."""
    candidates: int = 16
    """Most passages that a query is to be found among in the task retrieve."""
    new_tokens: list[int] = field(default_factory=lambda: [100, 200, 300, 400])
    """Numbers of new tokens that the study efficiency reports on."""
    repeats: int = 5
    """Timed runs of each variant in the study efficiency, of which medians are reported."""
    split_date: str | None = None
    """Report records dated before this day (yyyy-mm-dd) and from it on apart."""
    skip_bad_records: bool = False
    """Leave records out that are null, blank or broken, up to one in twenty, and count them in metrics.json; otherwise
    the first of them is an error."""
    output: str = "outputs/evaluation"
    """Folder for metrics.json, predictions.jsonl, config.yaml, table.md and plots."""
    batch_size: int = 16
    """Passages handled together on each device. Rounding differs a little from one batch size to another."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type the base is held in."""
    resamples: int = 1000
    """Bootstrap resamples behind the 95% intervals."""
    seed: int = 0
    """Seed of the resamples; decoding is greedy."""
    published: bool = False
    """Show the figures of the 500xCompressor paper (an 8B base) beside these: second table, dashed lines."""

    def __post_init__(self) -> None:
        self.checkpoint = self.checkpoint or default_checkpoint()
        require(
            self.segment_tokens is None or self.segment_tokens >= 1, "segment_tokens", self.segment_tokens, "at least 1"
        )
        require(
            self.question_tokens is None or self.question_tokens >= 1,
            "question_tokens",
            self.question_tokens,
            "at least 1",
        )
        require(self.refine_steps >= 0, "refine_steps", self.refine_steps, "at least 0")
        for name in ("data", "methods"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, values, "names that differ from each other")
        require(self.candidates >= 2, "candidates", self.candidates, "at least 2")
        require(self.repeats >= 1, "repeats", self.repeats, "at least 1")
        require(bool(self.new_tokens), "new_tokens", self.new_tokens, "at least one number")
        for name in ("tokens", "lengths", "new_tokens"):
            values = getattr(self, name)
            require(all(value >= 1 for value in values), name, values, "numbers of at least 1")
            require(len(set(values)) == len(values), name, values, "numbers that differ from each other")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.resamples >= 0, "resamples", self.resamples, "at least 0")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(
            self.split_date is None or re.fullmatch(r"\d{4}-\d{2}-\d{2}", self.split_date) is not None,
            "split_date",
            self.split_date,
            "a day written yyyy-mm-dd",
        )
