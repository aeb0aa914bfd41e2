"""Every method of compression by its name.

A new method is a file in this folder and a line here.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING, Any

from compressor.errors import unknown

if TYPE_CHECKING:
    from compressor.methods.interface import MemoryMethod, Method, MethodSettings
    from compressor.model.base import Base
    from compressor.model.encoder import Encoder

TRAINED: dict[str, str] = {
    "kv": "kv:KVEncoder",
    "reference-500x": "reference_500x:Reference500xEncoder",
    "icae": "icae:ICAEEncoder",
    "mean-pool": "mean_pool:MeanPoolEncoder",
    "anchor": "anchor:AnchorEncoder",
    "sentence-embedding": "sentence_embedding:SentenceEmbeddingEncoder",
    "full-tuned": "tuned:FullTunedEncoder",
    "none-tuned": "tuned:NoneTunedEncoder",
}
"""Methods that `train.py` trains: where their `Encoder` is."""
UNTRAINED: dict[str, str] = {
    "full": "full:Full",
    "none": "none:Nothing",
    "truncate": "truncate:Truncate",
    "keywords": "keywords:Keywords",
    "summary": "summary:Summary",
    "llmlingua2": "llmlingua2:LLMLingua2",
}
"""Methods that work with any base as it is: where their `Method` is, built by `from_settings(base, settings)`."""

TUNED: dict[str, str] = dict.fromkeys(("full-tuned", "none-tuned"), "tuned:Tuned")
"""Trained bounds, which make no memories: where their `MemoryMethod` is."""
READINGS: dict[str, str] = {"recite": "recite:Recite"}
"""Other ways for the decoder to read the memories of a trained method: where their `MemoryMethod` is."""


def encoder_class(name: str) -> type[Encoder]:
    """The encoder of a trained method."""
    return _load(TRAINED[check_name(name, TRAINED)])


def split_spec(spec: str) -> tuple[str, str | None]:
    """Name and checkpoint of a method written `name` or `name=checkpoint`."""
    name, _, checkpoint = spec.partition("=")
    return check_name(name, [*TRAINED, *READINGS, *UNTRAINED]), checkpoint or None


def memory_method(name: str) -> type[MemoryMethod]:
    """How the memories of a checkpoint are read under this name: as they are, or as one of `READINGS`."""
    return _load((READINGS | TUNED).get(name, "interface:MemoryMethod"))


def untrained_method(name: str, base: Base, settings: MethodSettings) -> Method:
    """A method that needs no checkpoint, over a base without adapters."""
    return _load(UNTRAINED[check_name(name, UNTRAINED)]).from_settings(base, settings)


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(f"compressor.methods.{module}"), attribute)


def check_name(name: str, known: Collection[str]) -> str:
    """`name`, if it is known; else a `CompressorError` that names the nearest."""
    if name not in known:
        raise unknown("method", name, known)
    return name
