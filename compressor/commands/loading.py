"""What commands work with: the compressor, or the memory, that their options name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from compressor.api import Compressor
from compressor.commands.options import MemoryOptions, ModelOptions
from compressor.data.sources import kind_of, read_text, shipped_names
from compressor.errors import CompressorError, require
from compressor.model.base import Base
from compressor.model.bases import made_with
from compressor.model.checkpoint import fetch_checkpoint, read_settings
from compressor.model.config import BaseConfig, CompressorConfig
from compressor.model.fidelity import LITTLE
from compressor.model.load import load_base
from compressor.model.memory import Memory, check_base, on_base
from compressor.packing.lossless import pack_passage
from compressor.progress import note
from compressor.storage.memory_table import is_store
from compressor.storage.store import Store


def load_model(options: ModelOptions, device: str | torch.device | None = None) -> Compressor:
    """The compressor, on another device than the options' where one is given.

    Raises:
        CompressorError: see `Compressor.from_pretrained`; also where the options ask for memory tokens or segments that
            the checkpoint does not have, which its settings tell before the base is loaded.
    """
    config = CompressorConfig(**read_settings(fetch_checkpoint(options.checkpoint))["config"])
    limits = {"tokens": config.memory_tokens, "segment_tokens": config.max_passage_tokens}
    for name, most in limits.items():
        asked = getattr(options, name, None)
        require(asked is None or 1 <= asked <= most, name, asked, f"1 to {most} with {options.checkpoint}")
    return Compressor.from_pretrained(
        options.checkpoint,
        base=options.base,
        device=device or options.device,
        dtype=options.base_dtype,
        base_mismatch=options.base_mismatch,
    )


def read_passage(source: str, *, as_written: bool = False) -> str:
    """The one text of a file, or of standard input for "-"; `as_written` as for `read_text`.

    Raises:
        CompressorError: it cannot be read, or holds many texts.
    """
    if is_corpus(source):
        what = "is a folder" if Path(source).is_dir() else "holds many texts"
        raise CompressorError(
            f"{source} {what}, and this takes one text: name a text file, or make a store of the texts, which "
            f"`compressor ask --store STORE` asks: `compressor index {source} --output STORE`"
        )
    return read_text(source, as_written=as_written)


def is_corpus(source: str) -> bool:
    """Whether this holds many texts: a data file, a folder, a glob, several or a shipped name.

    A text file is one passage, by itself as in a folder.
    """
    path = Path(source)
    if path.exists():
        return path.is_dir() or kind_of(path) not in (None, ".txt")
    return any(mark in source for mark in "*?[,") or source in shipped_names()


def memory_and_base(options: MemoryOptions) -> tuple[Memory, Base]:
    """The memory that the options name, and its base."""
    if is_store(options.memory):
        if options.id is None:
            raise CompressorError(f"{options.memory} is a store: say which memory with --id, or ask it with --store")
        store = Store.open(options.memory)
        (memory,) = store.load([options.id])
        if store.manifest["keep_text"]:
            memory = replace(memory, text=pack_passage(store.texts([options.id])[0]))
    else:
        memory = Memory.load(options.memory, options.calibration)
        if options.id is not None:
            raise CompressorError(f"{options.memory} is one memory: leave --id out, which is for stores of many")
    if memory.fidelity is not None and memory.fidelity < LITTLE and not getattr(options, "exact", False):
        kept = "its text is kept: regenerate --exact" if memory.text is not None else "its text is not kept"
        note(f"note: {memory.fidelity:.1%} of the text comes back from this memory; {kept}")
    if options.tokens is not None:
        memory = memory.truncate(options.tokens)
    base = load_base(BaseConfig(path=options.base or made_with(memory.base), dtype=options.base_dtype), options.device)
    if options.base_mismatch == "allow":
        return on_base(memory, base), base
    check_base(memory, base)
    return memory, base
