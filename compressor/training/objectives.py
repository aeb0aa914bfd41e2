"""Training objectives: what the decoder must write from a memory.

Each objective is a pair of decoder inputs and labels in the batch (`compressor/data/batches.py`), all read from one
encoding. A new objective is one pair function and one weight in `ObjectiveConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.api import Compressor
from compressor.data.batches import IGNORED, pad
from compressor.errors import CompressorError
from compressor.model.decoder import Prefix, empty_prefix, label_nats, logits_at, token_prefix
from compressor.model.network import Network

OBJECTIVES = ("regeneration", "continuation")
"""Objectives that are one pair of inputs and labels for each passage; `answer_losses` is for questions."""


class Trainee(Compressor):
    """A compressor as the loop trains it: one call gives the loss of a micro-batch, so that DDP sees one."""

    activation_checkpointing = False
    """Recompute activations in the backward pass instead of holding them."""
    sharded = False
    """Whether the base's layers are shared out over processes (`sharding.py`)."""
    balance: float | None = None
    """See `ObjectiveConfig.balance`."""
    teacher: Network | None = None
    """A bound on the same base, which answers are taught by (`ObjectiveConfig.teacher`)."""

    def taught_by(self, teacher: Network) -> None:
        """Set `teacher`, which is no part of this module: it is neither trained nor saved with it."""
        object.__setattr__(self, "teacher", teacher)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Summed, weighted loss of a micro-batch.

        The batch holds `input_ids`, `lengths`, `memory_tokens` (each passage's own number) and, for each objective with
        a weight, `NAME_inputs`, `NAME_labels` and `NAME_weight`.
        """
        tokens, encode, nats = batch["memory_tokens"], self.encode, label_nats
        if self.activation_checkpointing and torch.is_grad_enabled():
            # The encoder switches adapters itself, so that a recomputation runs with the same ones.
            encode = partial(checkpoint, self.encode, use_reentrant=False)
            nats = partial(checkpoint, label_nats, use_reentrant=False)
        keys, values = encode(batch["input_ids"], batch["lengths"], tokens)
        prefix = self.prefix(keys, values, batch["lengths"], tokens)
        total = torch.zeros((), device=keys.device)
        for name in OBJECTIVES:
            if f"{name}_inputs" in batch:
                labels = batch[f"{name}_labels"]
                losses = nats(self.base, prefix, batch[f"{name}_inputs"], labels)
                if self.balance is not None and name == "regeneration":
                    losses = balanced(losses, (labels != IGNORED).sum(1), self.balance)
                total = total + batch[f"{name}_weight"] * losses.sum()
        if "answer_inputs" in batch:
            if (groups := batch.get("answer_segments")) is not None:
                prefix = self.joined_prefix(keys, values, batch["lengths"], tokens, groups)
            total = total + answer_loss(self, prefix, batch)
        return total


def balanced(losses: Tensor, counts: Tensor, floor: float) -> Tensor:
    """Losses of the same values, whose gradients are divided by each row's own mean and a floor.

    Args:
        losses: summed nats of each row, float32 `[batch]`.
        counts: tokens of each row, int64 `[batch]`.
        floor: nats a token.
    """
    value = losses.detach()
    scaled = losses / (value / counts.clamp(min=1) + floor)
    return value + scaled - scaled.detach()


def load_teacher(path: str, **held: Any) -> Network:
    """The bound that `objective.teacher` names; `held` as for `Compressor.from_pretrained`.

    Raises:
        CompressorError: it is no checkpoint of `full-tuned`.
    """
    teacher = Compressor.from_pretrained(path, **held)
    if (method := teacher.config.method) != "full-tuned":
        raise CompressorError(
            f"objective.teacher is {path}, a checkpoint of {method}: a teacher reads the passage itself, on the base "
            "as it is; give one of full-tuned (configs/smollm2-135m/tuned.yaml trains it)"
        )
    return teacher


def answer_loss(model: Trainee, prefix: Prefix, batch: dict[str, Any]) -> Tensor:
    """Loss of answers after memory and question: likelihood of the answer, and divergence from the full passage.

    The batch holds `answer_inputs` and `answer_labels` (int64 `[questions, width]`), `answer_owners` (the passage of
    each question, int64 `[questions]`), `answer_prompts` (token ids of each question), `answer_passages` (token ids of
    each passage, without what a method extends it by), `answer_weight`, `distillation_weight` and
    `question_distillation_weight`; where a passage was encoded in segments, `answer_segments` says which rows are each
    one's.

    Returns:
        Summed over the answers' tokens, EOS included. The divergence is KL(teacher || student) at the same places, and
        where the question's own tokens are predicted, with a weight of its own. The teacher is `Trainee.teacher`, or
        the base that reads `BOS passage` instead of the memory; of questions that have nothing to do with the memory
        (`answer_unrelated`, bool `[questions]`) it is the base that reads nothing, at weight 1.
    """
    owners, inputs, labels = batch["answer_owners"], batch["answer_inputs"], batch["answer_labels"]
    of_answers, of_questions = batch["distillation_weight"], batch["question_distillation_weight"]
    base, answered = model.base, labels != IGNORED
    apart = batch.get("answer_unrelated", torch.zeros_like(owners, dtype=torch.bool))
    if not (of_answers or of_questions or bool(apart.any())):  # a few rows of logits at a time
        return batch["answer_weight"] * label_nats(base, prefix.select(owners), inputs, labels).sum()
    places = answered
    if of_questions:
        before = torch.tensor([len(prompt) - 1 for prompt in batch["answer_prompts"]], device=inputs.device)
        columns = torch.arange(inputs.shape[1], device=inputs.device)
        places = answered | ((columns < before[:, None]) & ~apart[:, None])
    student = logits_at(base, prefix.select(owners), inputs, places).float().log_softmax(-1)
    losses = torch.zeros((), device=student.device)
    if bool(apart.any()):
        alone, shown = (nn.functional.pad(one[apart], (1, 0)) for one in (inputs, answered))
        alone[:, 0] = base.bos
        with torch.no_grad():
            nothing = logits_at(base, empty_prefix(base, len(alone)), alone, shown).float().log_softmax(-1)
        elsewhere = apart[places.nonzero()[:, 0]]
        losses = nn.functional.kl_div(student[elsewhere], nothing, reduction="sum", log_target=True)
        student, owners, inputs, labels, answered, places = (
            student[~elsewhere],
            *(one[~apart] for one in (owners, inputs, labels, answered, places)),
        )
    answers = answered[places]
    likelihood = nn.functional.nll_loss(student[answers], labels[answered], reduction="sum")
    losses = losses + batch["answer_weight"] * likelihood
    if (of_answers or of_questions) and len(owners):
        with torch.no_grad():
            full = _read_whole(model, batch["answer_passages"]).share(owners)
            teacher = logits_at(base, full, inputs, places).float().log_softmax(-1)
        divergence = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        losses = losses + of_answers * divergence[answers].sum() + of_questions * divergence[~answers].sum()
    return losses


def _read_whole(model: Trainee, passages: Sequence[Sequence[int]]) -> Prefix:
    """What the teacher reads of passages."""
    if (teacher := model.teacher) is None:
        return token_prefix(model.base, passages)
    ids, lengths = pad(passages, model.base.device)
    return teacher.prefix(*teacher.encode(ids, lengths, teacher.config.memory_tokens), lengths)
