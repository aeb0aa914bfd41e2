"""What tells whether a base can carry a compressor: bits per byte and in-context copying on unseen passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.base import load_base, start_token
from compressor.data.records import load_texts
from compressor.model_config import BaseConfig

COPY_LENGTHS = (96, 240)
"""Tokens of the passages that are repeated."""


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without the special tokens that some tokenizers put around them."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 16
) -> tuple[float, int, int]:
    """Code length of `texts` under the model, each on its own as `BOS text EOS` (EOS twice where there is no BOS).

    Returns:
        Total bits, total bytes of UTF-8, total target tokens.
    """
    device = next(model.parameters()).device
    bits, tokens = 0.0, 0
    start_id, end_id = start_token(tokenizer), tokenizer.eos_token_id
    encoded = [[start_id, *ids, end_id] for ids in encode(tokenizer, texts)]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), batch_size):
        chunk = [encoded[i] for i in order[start : start + batch_size]]
        width = max(map(len, chunk))
        rows = torch.zeros(len(chunk), width, dtype=torch.int64)  # what pads on the right does not matter
        for row, ids in zip(rows, chunk, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        labels = rows[:, 1:].clone()
        for label, ids in zip(labels, chunk, strict=True):
            label[len(ids) - 1 :] = -100
        logits = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten().to(device), reduction="sum", ignore_index=-100
        )
        bits += float(loss) / math.log(2)
        tokens += int((labels != -100).sum())
    size = sum(len(text.encode()) for text in texts)
    return bits, size, tokens


@torch.no_grad()
def copying_accuracy(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int, batch_size: int = 16
) -> tuple[int, int]:
    """How often the model's first choice is right in the second copy of `BOS passage BOS passage`.

    Returns:
        Correct tokens and all tokens, over texts of at least `length` tokens cut to `length`.
    """
    device = next(model.parameters()).device
    passages = [ids[:length] for ids in encode(tokenizer, texts) if len(ids) >= length]
    correct = 0
    for start in range(0, len(passages), batch_size):
        chunk = torch.tensor(passages[start : start + batch_size])
        bos = torch.full((len(chunk), 1), start_token(tokenizer))
        rows = torch.cat([bos, chunk, bos, chunk], dim=1).to(device)
        choice = model(input_ids=rows, use_cache=False).logits[:, length + 1 : -1].argmax(-1)
        correct += int((choice == rows[:, length + 2 :]).sum())
    return correct, len(passages) * length


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Any, tokens: int = 60, temperature: float = 0.8) -> str:
    """A text drawn from the model, from BOS on; always with the same random numbers."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = [start_token(tokenizer)]
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        ids.append(int(torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=generator)))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True).replace("\n", " / ")


def evaluate(path: str, data: str, limit: int | None = None) -> dict[str, Any]:
    """Held-out figures of a base.

    Returns:
        `base`, `data`, `n`, `parameters`, `bits_per_byte`, `nats_per_token`, `copying` (length in tokens to accuracy
        in the second copy of a repeated passage) and `sample`.
    """
    base = load_base(BaseConfig(path=path))
    texts = list(load_texts(data, split="test", limit=limit)["text"])
    bits, size, tokens = bits_per_byte(base.model, base.tokenizer, texts)
    copying = {}
    for length in COPY_LENGTHS:
        correct, total = copying_accuracy(base.model, base.tokenizer, texts, length)
        copying[str(length)] = correct / max(1, total)
    return {
        "base": path,
        "fingerprint": base.fingerprint,
        "data": data,
        "n": len(texts),
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "bits_per_byte": bits / size,
        "nats_per_token": bits * math.log(2) / tokens,
        "copying": copying,
        "sample": sample(base.model, base.tokenizer),
    }
