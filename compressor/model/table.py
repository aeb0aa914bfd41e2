"""The position layouts and the trained methods by name: a new one is a class in a file of its own and a line here.

Torch is not imported: the command line is checked against these tables before anything is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple


class LayoutEntry(NamedTuple):
    """Where a layout's `Placing` is, and what it is good for. Files know a layout by its name."""

    place: str
    truncatable: bool
    """Whether a memory token's position does not depend on how many follow it."""
    general: bool = True
    """Whether memory tokens of any method can stand so."""


class MethodEntry(NamedTuple):
    """Where a trained method's `Encoder` is. Checkpoints know a method by its name."""

    place: str
    layouts: tuple[str, ...] | None = None
    """Those that it can work with; by default all general ones."""


LAYOUTS = {
    "restart": LayoutEntry("layouts:Restart", truncatable=True),
    "published": LayoutEntry("layouts:Published", truncatable=True, general=False),
    "after": LayoutEntry("layouts:After", truncatable=True),
    "front": LayoutEntry("layouts:Front", truncatable=True),
    "spread": LayoutEntry("layouts:Spread", truncatable=False),
    "overlay": LayoutEntry("layouts:Overlay", truncatable=False),
    "nested": LayoutEntry("layouts:Nested", truncatable=True),
}
METHODS = {
    "kv": MethodEntry("compressor.methods.kv:KVEncoder"),
    "reference-500x": MethodEntry("compressor.methods.reference_500x:Reference500xEncoder", ("published",)),
    # Its memories stand in `front`, and can be truncated where these layouts let them.
    "icae": MethodEntry("compressor.methods.icae:ICAEEncoder", ("restart", "after", "front", "nested")),
    "mean-pool": MethodEntry("compressor.methods.mean_pool:MeanPoolEncoder", ("spread",)),
    "anchor": MethodEntry("compressor.methods.anchor:AnchorEncoder", ("spread", "overlay")),
    "sentence-embedding": MethodEntry("compressor.methods.sentence_embedding:SentenceEmbeddingEncoder", ("front",)),
    # The tuned bounds read none.
    "full-tuned": MethodEntry("compressor.methods.tuned:FullTunedEncoder", ("nested", "after")),
    "none-tuned": MethodEntry("compressor.methods.tuned:NoneTunedEncoder", ("nested", "after")),
}


def layouts_of(method: str) -> tuple[str, ...]:
    """Layouts that a trained method can work with."""
    found = METHODS[method].layouts
    return tuple(name for name, entry in LAYOUTS.items() if entry.general) if found is None else found


def load(place: str, package: str) -> Any:
    """What a table's `MODULE:NAME` stands for; a module without a dot in its name is the package's."""
    module, _, name = place.partition(":")
    return getattr(import_module(module if "." in module else f"{package}.{module}"), name)
