"""Training objectives: what the decoder must write from a memory.

Each objective is a pair of decoder inputs and labels in the batch (`compressor/data/collate.py`), all read from one
encoding. A new objective is one pair function and one weight in `ObjectiveConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.data.collate import IGNORED, answer_pair, stack_pairs
from compressor.generation import decode, generate
from compressor.memory import Prefix

if TYPE_CHECKING:
    from compressor.model import Compressor

OBJECTIVES = ("regeneration", "continuation")
"""Objectives that are one pair of inputs and labels for each passage; `answer_losses` is for questions."""
TEACHER_TOKENS = 24
"""Most tokens of an answer that the base itself gives."""


def target_loss(model: Compressor, prefix: Prefix, inputs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels after a prefix, adapters off.

    Args:
        inputs, labels: int64 `[batch, width]`; labels of -100 do not count.

    Returns:
        Nats for each row, float32 `[batch]`.
    """
    with model.adapters(on=False):
        logits = decode(model.base, prefix, inputs).float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape).sum(1)


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
    each passage, without what a method extends it by), `answer_weight`, `distillation_weight` and `teacher_answers`
    (whether the base's own answers are the targets).

    Returns:
        Summed over the answers' tokens, EOS included. The divergence is KL(teacher || student) at the same places,
        where the teacher is the base, adapters off, that reads `BOS passage` instead of the memory.
    """
    from compressor.methods.interface import token_prefix

    owners, inputs, labels = batch["answer_owners"], batch["answer_inputs"], batch["answer_labels"]
    base, targets = model.base, int((labels != IGNORED).sum())
    full: Prefix | None = None
    if batch["distillation_weight"] or batch["teacher_answers"]:
        with model.adapters(on=False):
            full = token_prefix(base, batch["answer_passages"]).select(owners)
    if batch["teacher_answers"]:
        assert full is not None
        inputs, labels = _teacher_pairs(model, full, batch["answer_prompts"])
    wanted = labels != IGNORED
    with model.adapters(on=False):
        student = decode(base, prefix.select(owners), inputs)[wanted].float().log_softmax(-1)
        losses = batch["answer_weight"] * nn.functional.nll_loss(student, labels[wanted], reduction="sum")
        if batch["distillation_weight"]:
            assert full is not None
            with torch.no_grad():
                teacher = decode(base, full, inputs)[wanted].float().log_softmax(-1)
            divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
            losses = losses + batch["distillation_weight"] * divergence
    # The loop divides by the number of right answers' tokens; the teacher's may be more or fewer.
    return losses * (targets / max(1, int(wanted.sum())))


@torch.no_grad()
def _teacher_pairs(model: Compressor, full: Prefix, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Inputs and labels of the answers that the base gives from the whole passage; of one that was cut off, no EOS."""
    base = model.base
    with model.adapters(on=False):
        written = generate(base, full, prompts, [TEACHER_TOKENS] * len(prompts))
    pairs = []
    for prompt, one in zip(prompts, written, strict=True):
        inputs, labels = answer_pair(prompt, one.ids, base.eos)
        pairs.append((inputs, labels) if one.finished else (inputs[:-1], labels[:-1]))
    stacked = stack_pairs(pairs)
    return stacked["inputs"].to(base.device), stacked["labels"].to(base.device)
