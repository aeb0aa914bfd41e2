"""How memories are made from texts and stored: settings of commands and stores. Torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compressor.errors import require

if TYPE_CHECKING:
    from compressor.model.network import Network


@dataclass
class Making:
    """How memories are made and stored."""

    tokens: int | None = None
    """Memory tokens for each segment; by default all the compressor has."""
    segment_tokens: int | None = None
    """Compress in segments of at most so many tokens; by default as the compressor's settings say (96 for SmolLM2's; at
    most 500, all of which its memory tokens then hold)."""
    refine_steps: int = 0
    """Gradient steps on each memory: 10 to 50 keep far more with few memory tokens, and take as many times as long."""
    target_fidelity: float | None = None
    """Take for each text the fewest memory tokens of 1, 2, 4, ... up to --tokens from which this share comes back."""
    no_measure: bool = False
    """Do not regenerate from the memories to see how much comes back (which takes longer the less does)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that keys and values are stored in, where --codec does not say."""
    codec: str | None = None
    """float32, float16, bf16, int8, int4, int3, int2 or lowrank:RATE; with +ans or +huffman it is coded."""
    calibration: str | None = None
    """What `compressor calibrate` wrote: for lowrank, and for integers without steps of their own."""
    batch_size: int = 16
    """Segments compressed together."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "segment_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.refine_steps >= 0, "refine_steps", self.refine_steps, "at least 0")
        if self.target_fidelity is not None:
            require(0 < self.target_fidelity <= 1, "target_fidelity", self.target_fidelity, "above 0 and at most 1")
            require(not self.no_measure, "no_measure", True, "left out with target_fidelity, which is measured")

    def numbers(self, model: Network) -> dict[str, float]:
        """Numbers that memories are made with, besides what each of them states."""
        return {
            "segment_tokens": model.longest_segment(self.segment_tokens),
            "refine_steps": self.refine_steps,
            **({} if self.target_fidelity is None else {"target_fidelity": self.target_fidelity}),
        }
