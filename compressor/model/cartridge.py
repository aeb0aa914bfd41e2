"""Texts read after a trained prefix of keys and values, a cartridge (arXiv 2506.06266), that makes a base answer.

A base that was not trained to answer chats about the text in front of it. `methods/tuned.py` trains such prefixes as
fair bounds; the one of a named base ships with the project, and texts that questions are asked about are read after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from compressor.data.batches import pad
from compressor.errors import CompressorError
from compressor.files import bundled, sha256
from compressor.model.base import Base
from compressor.model.bases import NAMED
from compressor.model.checkpoint import ENCODER, read_settings
from compressor.model.decoder import Prefix, token_prefix


def read_after(base: Base, cartridge: Tensor, passages: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, turned back to position 0, and values of `BOS cartridge passage`; differentiable.

    BOS is the base's own, because a first position that changes upsets what attends to it for want of anything else.

    Args:
        cartridge: keys and values, `[tokens, (layer, key or value, head, channel)]`, as PEFT has them.
        passages: token ids, int64 `[batch, width]`, padded on the right; of width 0 where none is read.
        lengths: passage tokens, int64 `[batch]`.

    Returns:
        Each `[layers, batch, kv_heads, 1 + tokens + width, head_size]`.
    """
    batch, width = passages.shape
    first = position_free(base, torch.full((1, 1), base.bos, device=passages.device))
    shape = (len(cartridge), base.layers, 2, base.kv_heads, base.head_size)
    trained = cartridge.to(base.dtype).view(shape).permute(2, 1, 3, 0, 4)
    keys, values = (
        torch.cat([start, part[:, None]], dim=3).expand(-1, batch, -1, -1, -1)
        for start, part in zip(first, trained, strict=True)
    )
    if not width:
        return keys, values
    before = keys.shape[3]
    placed = torch.arange(before, device=passages.device).expand(batch, -1)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(base.rotate(keys, placed), values, strict=True)):
        cache.update(key, value, layer)
    # Padding on the right is seen by padding alone.
    positions = torch.arange(before, before + width, device=passages.device).expand(batch, -1)
    columns = torch.arange(before + width, device=passages.device)
    allowed = columns <= positions[:, :, None]
    found = base.keys_and_values(base.embeddings(passages), positions, allowed, cache=cache)
    return base.rotate(found[0], columns.expand(batch, -1), inverse=True), found[1]


def position_free(base: Base, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, turned back to position 0, and values of tokens, `[layers, batch, kv_heads, width, head_size]`."""
    batch, width = ids.shape
    positions = torch.arange(width, device=ids.device).expand(batch, -1)
    causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril().expand(batch, -1, -1)
    keys, values = base.keys_and_values(base.embeddings(ids), positions, causal)
    return base.rotate(keys, positions, inverse=True), values


@torch.no_grad()
def text_prefix(base: Base, rows: Sequence[Sequence[int]]) -> Prefix:
    """What the base reads of texts (token ids) that a question follows: after its cartridge, if it has one."""
    cartridge = cartridge_of(base)
    if cartridge is None or not any(rows):
        return token_prefix(base, rows)
    ids, lengths = pad(rows, base.device)
    keys, values = read_after(base, cartridge, ids, lengths)
    columns = torch.arange(keys.shape[3], device=base.device).expand(len(rows), -1)
    start = 1 + len(cartridge) + lengths
    return Prefix(list(base.rotate(keys, columns)), list(values), columns < start[:, None], start)


def cartridge_of(base: Base) -> Tensor | None:
    """The cartridge that ships for these weights, float32 `[tokens, ...]` as for `read_after`; None where none does.

    Raises:
        CompressorError: it is damaged.
    """
    folder = cartridge_folder(base.fingerprint)
    if folder is None:
        return None
    if sha256(folder / ENCODER) != read_settings(folder)["files"][ENCODER]:
        raise CompressorError(f"{folder / ENCODER} is damaged: its checksum differs from compressor.json's")
    (weights,) = load_file(folder / ENCODER, device=str(base.device)).values()
    return weights


def cartridge_folder(fingerprint: str) -> Path | None:
    """Where the cartridge of the base with this fingerprint ships; None where none does."""
    places = (Path(bundled(named.cartridge)) for named in NAMED.values() if named.cartridge)
    there = (folder for folder in places if folder.is_dir())
    return next((one for one in there if read_settings(one)["base"]["fingerprint"] == fingerprint), None)
