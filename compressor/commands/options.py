"""What commands take, apart from what they do with it: options are parsed and checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.errors import require
from compressor.model.bases import default_checkpoint
from compressor.model.config import BaseMismatch


@dataclass
class DemoConfig:
    """Options of the demo."""

    text: str | None = None
    """File with the passage, or - for standard input; by default an unseen abstract that ships with the project."""
    tokens: int | None = None
    """Memory tokens; by default all the compressor has."""
    length: int | None = None
    """Use the first so many tokens of the passage; by default 96 of the shipped abstract, all of your own text and all
    of what a question is about."""
    segment_tokens: int | None = None
    """Compress in segments of at most so many tokens, each to `tokens` memory tokens; by default of as many as the
    compressor takes."""
    refine_steps: int | None = None
    """Gradient steps on the memory: 10 to 50 keep far more with few memory tokens; by default none, and the shipped
    example is shown after 10 too."""
    question: str | None = None
    """Answer this question about the passage instead of regenerating it."""
    example: str = "abstract"
    """A text that ships with the project: `abstract`, `published` (the example of the 500xCompressor paper, with its
    question), or the number of another test abstract."""
    checkpoint: str = ""
    """Compressor checkpoint: folder or hub id; by default the bundled one of smollm2-135m where this base is at hand
    (`compressor fetch smollm2-135m`), else that of arxiv-mini."""
    base: str | None = None
    """Frozen base: folder, hub id, GGUF file or name; by default the one the checkpoint names."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: take a base with other weights than the checkpoint was trained on, with a warning."""
    device: str = "cpu"
    port: int | None = None
    """Port of the page (--web); by default the first free one from 7860 on. It is served to this machine alone."""

    def __post_init__(self) -> None:
        self.checkpoint = self.checkpoint or default_checkpoint()
        require(self.port is None or 1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        require(self.tokens is None or self.tokens >= 1, "tokens", self.tokens, "at least 1")
        require(
            self.segment_tokens is None or self.segment_tokens >= 1, "segment_tokens", self.segment_tokens, "at least 1"
        )
        require(self.refine_steps is None or self.refine_steps >= 0, "refine_steps", self.refine_steps, "at least 0")
        require(self.length is None or self.length >= 1, "length", self.length, "at least 1")
