"""How memories are made from texts and stored: what commands and stores ask for, in one place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from compressor.errors import require

# Options of commands are read before torch, which takes seconds, is imported.
if TYPE_CHECKING:
    from compressor.model.memory import Memory
    from compressor.model.network import Network
    from compressor.storage.codec import Codec


@dataclass
class Making:
    """How memories are made and stored."""

    tokens: int | None = None
    """Memory tokens for each segment; by default all the compressor has."""
    segment_tokens: int | None = None
    """Compress in segments of at most so many tokens; by default segments are as long as the compressor takes."""
    refine_steps: int = 0
    """Gradient steps on each memory: 10 to 50 keep far more with few memory tokens, and take as many times as long."""
    target_fidelity: float | None = None
    """Take for each text the fewest memory tokens, up to --tokens, from which this share of it comes back."""
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

    def chosen_codec(self) -> Codec:
        """The `Codec` that the options describe."""
        from compressor.storage.codec import Codec

        name = self.codec or {"bfloat16": "bf16"}.get(self.dtype, self.dtype)
        return Codec.parse(name, self.calibration)

    def numbers(self, model: Network) -> dict[str, float]:
        """Numbers that memories are made with, besides what each of them states."""
        most = model.config.max_passage_tokens
        return {
            "segment_tokens": min(self.segment_tokens or most, most),
            "refine_steps": self.refine_steps,
            **({} if self.target_fidelity is None else {"target_fidelity": self.target_fidelity}),
        }

    def memories(self, model: Network, texts: Sequence[str], codec: Codec) -> tuple[list[Memory], list[int]]:
        """Memories of texts, with the share that comes back of each from what its file will hold.

        Returns:
            The memories, and the numbers of the texts that the tokenizer does not spell as they are.
        """
        from compressor.model.fidelity import compress_to_fidelity, fidelities
        from compressor.storage.memory_file import as_stored

        tokenizer = model.base.tokenizer
        sizes: dict[str, Any] = {
            name: getattr(self, name) for name in ("tokens", "batch_size", "segment_tokens", "refine_steps")
        }
        ids = model.base.tokenise(texts)
        if self.target_fidelity is not None:
            with warnings.catch_warnings():
                # Those that fall short are named together, when all are done.
                warnings.filterwarnings("ignore", message=".*reach a fidelity", category=UserWarning)
                memories = compress_to_fidelity(
                    model, ids, self.target_fidelity, stored=lambda memory: as_stored(memory, codec), **sizes
                )
        else:
            memories = model.compress_ids(ids, **sizes)
            if not self.no_measure:
                shares = fidelities(model, [as_stored(memory, codec) for memory in memories], ids, self.batch_size)
                memories = [replace(memory, fidelity=share) for memory, share in zip(memories, shares, strict=True)]
        spelled = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        return memories, [
            i for i, (text, back) in enumerate(zip(texts, spelled, strict=True)) if text.strip() != back.strip()
        ]
