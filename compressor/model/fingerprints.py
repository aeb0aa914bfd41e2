"""What tells bases and tokenizers apart: hashes of what they compute with; names that files may show."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

FULL_HASH_VALUES = 65_536
_PROBE = "The 3 quick brown foxes—naïve, 𝛼≤β—jump over\n\n\t12,345.67 lazy dogs; can't they?  $x_{i}^2$ <s></s>"
_KNOWN: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash that tells bases apart: SHA-256 over names, shapes and evenly spaced bfloat16 values of the weights.

    Held in float32 or bfloat16, the same weights give the same hash. Of a large tensor 65,536 values or up to twice as
    many are read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.flatten()
        stride = max(1, flat.numel() // FULL_HASH_VALUES)
        digest.update(flat[::stride].to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 that tells tokenizers apart: vocabulary, special tokens, and how a difficult text is cut."""
    state = (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    before, known = _KNOWN.get(tokenizer, (None, ""))
    if before == state:
        return known
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])):
        digest.update(f"{number}:{token}\0".encode("utf-8", "surrogatepass"))
    ids = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id, list(ids))).encode())
    _KNOWN[tokenizer] = (state, digest.hexdigest())
    return digest.hexdigest()


def public_name(path: str) -> str:
    """A path or hub id as files may show it: of an absolute path, which names this machine's folders, the last part."""
    return Path(path).name if Path(path).is_absolute() else path
