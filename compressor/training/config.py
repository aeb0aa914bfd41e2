"""Run configuration: dataclasses read from YAML and overridden on the command line.

Precedence: defaults < YAML file (`--config`) < command line (`--training.learning-rate 2e-4`).
Everything is validated before any model or data is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from compressor.data.config import DataConfig
from compressor.errors import require
from compressor.model.config import BaseConfig, BaseMismatch, CompressorConfig


@dataclass
class TokensShare:
    """Train with `tokens` memory tokens on a share of the passages of `shortest` to `longest` tokens.

    What one memory token can hold is learned in a fraction of the steps from passages not much longer than that.
    """

    tokens: int
    weight: float = 1.0
    shortest: int = 1
    longest: int | None = None

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "objective.tokens", self.tokens, "at least 1")
        require(self.weight > 0, "objective.tokens.weight", self.weight, "positive")
        require(self.shortest >= 1, "objective.tokens.shortest", self.shortest, "at least 1")
        longest = self.longest
        require(longest is None or longest >= self.shortest, "objective.tokens.longest", longest, "at least `shortest`")


@dataclass
class ObjectiveConfig:
    """What the compressor is trained for (stages `regenerate` and `answer`)."""

    tokens: list[TokensShare] = field(
        default_factory=lambda: [TokensShare(16, 3), *(TokensShare(tokens) for tokens in (8, 4, 2, 1))]
    )
    """Numbers of memory tokens, sampled by weight for each passage among the shares for its length, so that one
    checkpoint serves all."""
    regeneration: float = 1.0
    """Weight of regenerating the passage after its memory."""
    balance: float | None = None
    """Where given, a passage's gradient of regeneration is divided by its own nats a token plus this (the gradient of
    their logarithm), so that what is nearly right is not drowned by what is far from it."""
    continuation: float = 0.0
    """Weight of predicting the text that follows the passage after its memory."""
    answer: float = 1.0
    """Weight of the right answer after memory and question (stage `answer`)."""
    asked_regeneration: float = 0.0
    """Weight of regenerating the passages that questions are about too, whose kind of text the other data may not hold
    (stage `answer`)."""
    cued_share: float = 0.0
    """Share of the passages to regenerate that are not written from their beginning but from a few tokens out of their
    middle on, so that memories are read by content, as questions will read them."""
    distillation: float = 0.0
    """Weight of the divergence from the base that reads the whole passage, on the answer's tokens (stage `answer`)."""
    question_distillation: float = 0.0
    """Weight of the same divergence on the question's tokens, which depend on the passage too and are more."""
    teacher: str | None = None
    """Checkpoint of `full-tuned`, whose trained prefix the base reads before the passage as the teacher of both; by
    default it reads the passage alone, and a base that was not trained to answer chats."""
    unrelated_share: float = 0.0
    """Share of the questions that are asked of another passage's memory, where the base without any memory is the
    teacher, so that a memory leaves other questions alone (stage `answer`, `--task interference`)."""

    def __post_init__(self) -> None:
        require(bool(self.tokens), "objective.tokens", self.tokens, "a non-empty list")
        weights = "regeneration continuation answer asked_regeneration distillation question_distillation"
        for name in weights.split():
            require(getattr(self, name) >= 0, f"objective.{name}", getattr(self, name), "at least 0")
        for name in ("cued_share", "unrelated_share"):
            require(0 <= getattr(self, name) <= 1, f"objective.{name}", getattr(self, name), "between 0 and 1")
        require(self.balance is None or self.balance > 0, "objective.balance", self.balance, "positive, or left out")
        taught = self.teacher is None or self.distillation + self.question_distillation > 0
        require(taught, "objective.teacher", self.teacher, "left out, or objective.distillation positive")
        require(self.regeneration + self.continuation > 0, "objective", "all weights 0", "positive in total")

    def weights(self) -> dict[int, float]:
        """The weight of each number of memory tokens, over all of its shares; the largest number first."""
        found: dict[int, float] = {}
        for share in sorted(self.tokens, key=lambda share: -share.tokens):
            found[share.tokens] = found.get(share.tokens, 0.0) + share.weight
        return found


@dataclass
class TrainingConfig:
    """The loop: optimiser, schedule, batches, checkpoints, logging."""

    steps: int = 1000
    """Optimiser steps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the steps of linear layers and adapters, with AdamW for the rest: fewer steps to the same
    loss, at the same rate. Not for parameters that FSDP shards."""
    learning_rate: float = 1e-3
    """Largest learning rate."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly from 0."""
    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    """What the rate does after the warm-up."""
    decay_steps: int = 0
    """With `constant`: fall linearly to the final rate over the last so many steps."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step, as a fraction of `learning_rate`."""
    average_from: int | None = None
    """Validate and export the mean of the weights after this step and each later one, which spares the rate's fall; by
    default the weights of the last step."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient."""
    batch_tokens: int = 4096
    """Passage tokens of one micro-batch on one device, padding to its longest passage included."""
    batch_passages: int = 64
    """Most passages of one micro-batch on one device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches on each device for one step."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast type of forward and backward passes; `auto` is bf16 where the device has instructions for it."""
    compile: Literal["no", "static", "dynamic"] = "no"
    """torch.compile the model: `static` compiles each shape once (packed rows), `dynamic` suits varying lengths."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every: int = 10
    """Steps between lines of the log."""
    validate_every: int = 200
    """Steps between validations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    resume: bool = False
    """Continue from the newest checkpoint in `output`."""
    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Also log to these (needs the `tracking` extra)."""
    log_model: bool = False
    """Give the finished compressor to wandb as an artifact."""
    threads: int | None = None
    """CPU threads of each process; by default what torch chooses."""

    def __post_init__(self) -> None:
        counts = "batch_tokens batch_passages gradient_accumulation_steps log_every validate_every checkpoint_every"
        for name in ("steps", "keep_last", *counts.split()):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        require(0 < self.learning_rate <= 1, "training.learning_rate", self.learning_rate, "in (0, 1]")
        require(self.warmup_steps >= 0, "training.warmup_steps", self.warmup_steps, "at least 0")
        require(0 <= self.decay_steps <= self.steps, "training.decay_steps", self.decay_steps, "0 to training.steps")
        final = self.final_learning_rate
        require(0 <= final <= 1, "training.final_learning_rate", final, "0 to 1")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"training.{name}", getattr(self, name), "in [0, 1)")
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "at least 0")
        require(self.max_grad_norm > 0, "training.max_grad_norm", self.max_grad_norm, "positive")
        first = self.average_from
        require(first is None or 0 <= first < self.steps, "training.average_from", first, "0 to below training.steps")
        require(self.threads is None or 1 <= self.threads <= 1024, "training.threads", self.threads, "1 to 1024")


@dataclass
class RunConfig:
    """One training run."""

    stage: Literal["regenerate", "answer"] = "regenerate"
    """`regenerate` trains a compressor for a frozen base to write passages back, `answer` to answer questions about
    them."""
    output: str = "outputs/run"
    """Folder for checkpoints, logs and the final model."""
    skip_bad_records: bool = False
    """Leave records of the data out that are null, blank or broken, up to one in twenty, and count them in run.json;
    otherwise the first of them is an error."""
    seed: int = 0
    """Of initial weights, batches and dropout."""
    base: BaseConfig = field(default_factory=BaseConfig)
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    init: str | None = None
    """Compressor checkpoint to start from, not a fresh one; its own settings then apply."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: go on from an `init` that was trained on other weights than its base has here."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 1 << 32, "seed", self.seed, "0 to 4294967295")
        data, objective, training = self.data, self.objective, self.training
        precision = training.mixed_precision
        allowed = f"auto or no with base.dtype = {self.base.dtype}, whose weights are computed with as they are held"
        held = self.base.dtype not in ("auto", "float32")
        require(not held or precision in ("auto", "no"), "training.mixed_precision", precision, allowed)
        allowed = "false with training.compile, which cannot trace it"
        both = training.activation_checkpointing and training.compile != "no"
        require(not both, "training.activation_checkpointing", True, allowed)
        most, longest = self.compressor.memory_tokens, max(share.high for share in data.lengths)
        for share in objective.tokens:
            allowed = f"at most compressor.memory_tokens = {most}"
            require(share.tokens <= most, "objective.tokens", share.tokens, allowed)
        if self.stage == "answer":
            asked = bool(data.questions or data.instructions)
            require(asked, "data.questions", data.questions, "a non-empty list of sources in stage answer")
            allowed = "positive, or objective.distillation, in stage answer"
            require(objective.answer + objective.distillation > 0, "objective.answer", objective.answer, allowed)
        allowed = "left out in stage regenerate, which asks no questions"
        require(self.stage == "answer" or objective.teacher is None, "objective.teacher", objective.teacher, allowed)
        for share in objective.tokens:
            allowed = f"at most {longest}, the longest of data.lengths: no passage would be of this share"
            require(share.shortest <= longest, "objective.tokens.shortest", share.shortest, allowed)
        fits = self.init is not None or longest <= self.compressor.max_passage_tokens
        allowed = f"at most compressor.max_passage_tokens = {self.compressor.max_passage_tokens}"
        require(fits, "data.lengths", longest, allowed)
