"""Compress a passage into the keys and values of a few memory tokens of a frozen language model."""

from typing import TYPE_CHECKING, Any

from compressor.provenance import VERSION as __version__

__all__ = ["Compressor", "Memory", "__version__"]

if TYPE_CHECKING:
    from compressor.api import Compressor
    from compressor.model.memory import Memory


def __getattr__(name: str) -> Any:
    """`Compressor` and `Memory` when they are asked for: torch and transformers take seconds to import."""
    if name == "Compressor":
        from compressor.api import Compressor

        return Compressor
    if name == "Memory":
        from compressor.model.memory import Memory

        return Memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
