"""Settings of the data of a training: where passages and questions come from, and how passages are cut."""

from __future__ import annotations

from dataclasses import dataclass, field

from compressor.errors import require


@dataclass
class LengthRange:
    """Passages are cut to a length drawn uniformly from low..high tokens; `weight` is its share."""

    low: int
    high: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(1 <= self.low <= self.high, "data.lengths", f"{self.low}..{self.high}", "1 <= low <= high")
        require(self.weight > 0, "data.lengths.weight", self.weight, "positive")


@dataclass
class InstructionData:
    """Rows that a preset makes instructions of; without `prompt` they hold their instructions."""

    data: list[str]
    """Files, folders, shipped names or hub ids."""
    prompt: str = ""
    """Preset in configs/tasks, or a YAML file."""
    share: float = 0.25
    """Of the passages that are asked about."""

    def __post_init__(self) -> None:
        require(bool(self.data), "data.instructions.data", self.data, "a non-empty list of sources")
        require(0 < self.share <= 1, "data.instructions.share", self.share, "above 0, up to 1")


@dataclass
class DataConfig:
    """Passages to train and validate on: a corpus folder, files, or a hub data set id."""

    train: list[str] = field(default_factory=lambda: ["arxiv-train"])
    validation: list[str] = field(default_factory=lambda: ["arxiv-validation"])
    text_field: str | None = None
    """Column that holds the text; by default `text` or `abstract`."""
    limit: int | None = None
    """Use only the first so many training records."""
    validation_limit: int = 200
    """Use only the first so many validation records."""
    lengths: list[LengthRange] = field(default_factory=lambda: [LengthRange(16, 500)])
    """Mixture of passage lengths in tokens. Mixing from the start avoids a jump between lengths."""
    random_start: float = 0.25
    """Share of the passages cut from a random place instead of the beginning of the text."""
    questions: list[str] = field(default_factory=list)
    """Questions to train on (stage `answer`): files, folders, shipped names or hub ids. Those of the last
    `validation_limit` contexts are validated on instead."""
    question_columns: dict[str, str] = field(default_factory=dict)
    """Names of the questions' columns where they are not the usual ones, for instance `{context: abstract}`."""
    instructions: list[InstructionData] = field(default_factory=list)
    """Instructions to train on beside questions (stage `answer`), each set with its share of the micro-batches'
    passages that are asked about; questions have the rest."""
    question_share: float = 0.5
    """Share of the micro-batches that hold questions; the others hold passages (stage `answer`)."""
    question_tokens: int | None = None
    """Contexts of questions are cut to at most so many tokens, and a question goes to the stretch that holds its
    answer; by default to as many as the compressor takes. Where none holds it, and for instructions, the memories of
    all stretches are read."""
    passages_together: int = 1
    """Most passages whose memories lie in the context of a question (stage `answer`): a number up to this many is drawn
    for each, its own at a random place among others of the micro-batch, half of which are neighbours in the data."""
    keep_unanswerable: bool = False
    """Train on questions that the data says have no answer (SQuAD 2.0), too: the right answer is nothing but EOS."""
    workers: int = 1
    """Processes that tokenise."""

    def __post_init__(self) -> None:
        for name in ("train", "validation", "lengths"):
            require(bool(getattr(self, name)), f"data.{name}", getattr(self, name), "a non-empty list")
        require(0 < self.question_share <= 1, "data.question_share", self.question_share, "above 0, up to 1")
        shares = sum(one.share for one in self.instructions)
        most = "below 1 in total, beside data.questions" if self.questions else "up to 1 in total"
        fits = shares < 1 if self.questions else shares <= 1 + 1e-9
        require(fits, "data.instructions.share", shares, most)
        require(0 <= self.random_start <= 1, "data.random_start", self.random_start, "in [0, 1]")
        for name in ("question_tokens", "passages_together", "limit", "validation_limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", value, "at least 1")
