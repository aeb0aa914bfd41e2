"""Training objectives: what the decoder must write from a memory.

Each objective is a pair of decoder inputs and labels in the batch (`compressor/data/batches.py`), all read from one
encoding. A new objective is one pair function and one weight in `ObjectiveConfig`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.data.batches import IGNORED
from compressor.model.generation import label_nats, logits_at
from compressor.model.memory import Prefix

if TYPE_CHECKING:
    from compressor.api import Compressor

OBJECTIVES = ("regeneration", "continuation")
"""Objectives that are one pair of inputs and labels for each passage; `answer_losses` is for questions."""


def target_loss(model: Compressor, prefix: Prefix, inputs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels after a prefix, adapters off.

    Args:
        inputs, labels: int64 `[batch, width]`; labels of -100 do not count.

    Returns:
        Nats for each row, float32 `[batch]`.
    """
    with model.adapters(on=False):
        return label_nats(model.base, prefix, inputs, labels)


def loss(model: Compressor, batch: dict[str, Any]) -> Tensor:
    """Summed, weighted loss of a micro-batch.

    The batch holds `input_ids`, `lengths`, `memory_tokens` (each passage's own number) and, for each objective with a
    weight, `NAME_inputs`, `NAME_labels` and `NAME_weight`.
    """
    tokens = batch["memory_tokens"]
    keys, values = model.encode(batch["input_ids"], batch["lengths"], int(tokens.max()))
    prefix = model.prefix(keys, values, batch["lengths"], tokens)
    total = torch.zeros((), device=keys.device)
    for name in OBJECTIVES:
        if f"{name}_inputs" not in batch:
            continue
        arguments = (model, prefix, batch[f"{name}_inputs"], batch[f"{name}_labels"])
        if model.activation_checkpointing and torch.is_grad_enabled():
            losses = checkpoint(target_loss, *arguments, use_reentrant=False)
        else:
            losses = target_loss(*arguments)
        total = total + batch[f"{name}_weight"] * losses.sum()
    if "answer_inputs" in batch:
        total = total + answer_loss(model, prefix, batch)
    return total


def answer_loss(model: Compressor, prefix: Prefix, batch: dict[str, Any]) -> Tensor:
    """Loss of answers after memory and question: likelihood of the answer, and divergence from the full passage.

    The batch holds `answer_inputs` and `answer_labels` (int64 `[questions, width]`), `answer_owners` (the passage of
    each question, int64 `[questions]`), `answer_prompts` (token ids of each question), `answer_passages` (token ids of
    each passage, without what a method extends it by), `answer_weight` and `distillation_weight`.

    Returns:
        Summed over the answers' tokens, EOS included. The divergence is KL(teacher || student) at the same places,
        where the teacher is the base, adapters off, that reads `BOS passage` instead of the memory.
    """
    from compressor.methods.interface import token_prefix

    owners, inputs, labels = batch["answer_owners"], batch["answer_inputs"], batch["answer_labels"]
    base, wanted = model.base, labels != IGNORED
    with model.adapters(on=False):
        student = logits_at(base, prefix.select(owners), inputs, wanted).float().log_softmax(-1)
        losses = batch["answer_weight"] * nn.functional.nll_loss(student, labels[wanted], reduction="sum")
        if batch["distillation_weight"]:
            with torch.no_grad():
                full = token_prefix(base, batch["answer_passages"]).select(owners)
                teacher = logits_at(base, full, inputs, wanted).float().log_softmax(-1)
            divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
            losses = losses + batch["distillation_weight"] * divergence
    return losses
