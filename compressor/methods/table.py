"""Every method of compression by its name: trained ones are in `model/table.py`, a new other one gets a line here."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from compressor.errors import unknown
from compressor.model.table import METHODS, load

if TYPE_CHECKING:
    from compressor.methods.interface import MemoryMethod, Method, MethodSettings
    from compressor.model.base import Base
    from compressor.model.encoder import Encoder

PACKAGE = "compressor.methods"
TRAINED = METHODS
UNTRAINED: dict[str, str] = {
    "full": "bounds:Full",
    "none": "bounds:Nothing",
    "truncate": "bounds:Truncate",
    "keywords": "keywords:Keywords",
    "summary": "summary:Summary",
    "llmlingua2": "llmlingua2:LLMLingua2",
}
"""Methods that work with any base as it is: where their `Method` is, built by `from_settings(base, settings)`."""

TUNED: dict[str, str] = dict.fromkeys(("full-tuned", "none-tuned"), "tuned:Tuned")
"""Trained bounds, which make no memories: where their `MemoryMethod` is."""
READINGS: dict[str, str] = {"recite": "recite:Recite", "recite-tuned": "recite:ReciteTuned"}
"""Other ways for the decoder to read the memories of a trained method: where their `MemoryMethod` is."""


def encoder_class(name: str) -> type[Encoder]:
    """The encoder of a trained method."""
    return load(TRAINED[check_name(name, TRAINED)].place, PACKAGE)


def split_spec(spec: str) -> tuple[str, str | None]:
    """Name and checkpoint of a method written `name` or `name=checkpoint`."""
    name, _, checkpoint = spec.partition("=")
    return check_name(name, [*TRAINED, *READINGS, *UNTRAINED]), checkpoint or None


def memory_method(name: str) -> type[MemoryMethod]:
    """How the memories of a checkpoint are read under this name: as they are, or as one of `READINGS`."""
    return load((READINGS | TUNED).get(name, "interface:MemoryMethod"), PACKAGE)


def untrained_method(name: str, base: Base, settings: MethodSettings) -> Method:
    """A method that needs no checkpoint, over a base without adapters."""
    return load(UNTRAINED[check_name(name, UNTRAINED)], PACKAGE).from_settings(base, settings)


def check_name(name: str, known: Collection[str]) -> str:
    """`name`, if it is known; else a `CompressorError` that names the nearest."""
    if name not in known:
        raise unknown("method", name, known)
    return name
