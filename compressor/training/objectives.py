"""Training objectives: what the decoder must write from a memory.

Each objective is a pair of decoder inputs and labels in the batch (`compressor/data/batches.py`), all read from one
encoding. A new objective is one pair function and one weight in `ObjectiveConfig`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.api import Compressor
from compressor.data.batches import IGNORED
from compressor.model.likelihood import label_nats, logits_at, token_prefix
from compressor.model.network import Network
from compressor.model.prefix import Prefix, empty_prefix

OBJECTIVES = ("regeneration", "continuation")
"""Objectives that are one pair of inputs and labels for each passage; `answer_losses` is for questions."""


class Trainee(Compressor):
    """A compressor as the loop trains it: one call gives the loss of a micro-batch, so that DDP sees one."""

    activation_checkpointing = False
    """Recompute activations in the backward pass instead of holding them."""
    sharded = False
    """Whether the base's layers are shared out over processes (`sharding.py`)."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return loss(self, batch, self.activation_checkpointing)


def loss(model: Network, batch: dict[str, Any], activation_checkpointing: bool = False) -> Tensor:
    """Summed, weighted loss of a micro-batch.

    The batch holds `input_ids`, `lengths`, `memory_tokens` (each passage's own number) and, for each objective with a
    weight, `NAME_inputs`, `NAME_labels` and `NAME_weight`.
    """
    tokens, encode, nats = batch["memory_tokens"], model.encode, label_nats
    if activation_checkpointing and torch.is_grad_enabled():
        # The encoder switches adapters itself, so that a recomputation runs with the same ones.
        encode = partial(checkpoint, model.encode, use_reentrant=False)
        nats = partial(checkpoint, label_nats, use_reentrant=False)
    keys, values = encode(batch["input_ids"], batch["lengths"], int(tokens.max()))
    prefix = model.prefix(keys, values, batch["lengths"], tokens)
    total = torch.zeros((), device=keys.device)
    for name in OBJECTIVES:
        if f"{name}_inputs" in batch:
            losses = nats(model.base, prefix, batch[f"{name}_inputs"], batch[f"{name}_labels"])
            total = total + batch[f"{name}_weight"] * losses.sum()
    if "answer_inputs" in batch:
        if (groups := batch.get("answer_segments")) is not None:
            prefix = model.joined_prefix(keys, values, batch["lengths"], tokens, groups)
        total = total + answer_loss(model, prefix, batch)
    return total


def answer_loss(model: Network, prefix: Prefix, batch: dict[str, Any]) -> Tensor:
    """Loss of answers after memory and question: likelihood of the answer, and divergence from the full passage.

    The batch holds `answer_inputs` and `answer_labels` (int64 `[questions, width]`), `answer_owners` (the passage of
    each question, int64 `[questions]`), `answer_prompts` (token ids of each question), `answer_passages` (token ids of
    each passage, without what a method extends it by), `answer_weight` and `distillation_weight`; where a passage was
    encoded in segments, `answer_segments` says which rows are each one's.

    Returns:
        Summed over the answers' tokens, EOS included. The divergence is KL(teacher || student) at the same places,
        where the teacher is the base that reads `BOS passage` instead of the memory; of questions that have nothing to
        do with the memory (`answer_unrelated`, bool `[questions]`) it is the base that reads nothing, at weight 1.
    """
    owners, inputs, labels = batch["answer_owners"], batch["answer_inputs"], batch["answer_labels"]
    base, wanted = model.base, labels != IGNORED
    student = logits_at(base, prefix.select(owners), inputs, wanted).float().log_softmax(-1)
    losses = torch.zeros((), device=student.device)
    if (apart := batch.get("answer_unrelated")) is not None and bool(apart.any()):
        alone, places = (nn.functional.pad(one[apart], (1, 0)) for one in (inputs, wanted))
        alone[:, 0] = base.bos
        with torch.no_grad():
            nothing = logits_at(base, empty_prefix(base, len(alone)), alone, places).float().log_softmax(-1)
        elsewhere = apart[wanted.nonzero()[:, 0]]
        losses = nn.functional.kl_div(student[elsewhere], nothing, reduction="sum", log_target=True)
        student, owners, inputs, labels, wanted = (
            student[~elsewhere],
            *(one[~apart] for one in (owners, inputs, labels, wanted)),
        )
    losses = losses + batch["answer_weight"] * nn.functional.nll_loss(student, labels[wanted], reduction="sum")
    if batch["distillation_weight"] and len(owners):
        with torch.no_grad():
            full = token_prefix(base, batch["answer_passages"]).share(owners)
            teacher = logits_at(base, full, inputs, wanted).float().log_softmax(-1)
        divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        losses = losses + batch["distillation_weight"] * divergence
    return losses
