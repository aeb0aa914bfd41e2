"""Memories of texts, made and stored as settings say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compressor.model.fidelity import compress_to_fidelity, fidelities
from compressor.model.memory import Memory
from compressor.model.network import Network
from compressor.storage.codec import Codec
from compressor.storage.making import Making
from compressor.storage.memory_file import as_stored


def chosen_codec(making: Making) -> Codec:
    """The `Codec` that the settings describe."""
    name = making.codec or {"bfloat16": "bf16"}.get(making.dtype, making.dtype)
    return Codec.parse(name, making.calibration)


def memories_of(making: Making, model: Network, texts: Sequence[str], codec: Codec) -> tuple[list[Memory], list[int]]:
    """Memories of texts, with the share that comes back of each from what its file will hold.

    Returns:
        The memories, and the numbers of the texts that the tokenizer does not spell as they are.
    """
    tokenizer = model.base.tokenizer
    sizes: dict[str, Any] = {
        name: getattr(making, name) for name in ("tokens", "batch_size", "segment_tokens", "refine_steps")
    }
    ids = model.base.tokenise(texts)
    if making.target_fidelity is not None:
        with warnings.catch_warnings():
            # Those that fall short are named together, when all are done.
            warnings.filterwarnings("ignore", message=".*reach a fidelity", category=UserWarning)
            memories = compress_to_fidelity(
                model, ids, making.target_fidelity, stored=lambda memory: as_stored(memory, codec), **sizes
            )
    else:
        memories = model.compress_ids(ids, **sizes)
        if not making.no_measure:
            shares = fidelities(model, [as_stored(memory, codec) for memory in memories], ids, making.batch_size)
            memories = [replace(memory, fidelity=share) for memory, share in zip(memories, shares, strict=True)]
    spelled = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    return memories, [
        i for i, (text, back) in enumerate(zip(texts, spelled, strict=True)) if text.strip() != back.strip()
    ]
