"""What a training step takes of memory, worked out before one is made: what is there, and what the largest will add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from compressor.data.batches import Piece
from compressor.model.decoder import HEAD_ROWS
from compressor.processes import return_free_memory
from compressor.training.config import RunConfig
from compressor.training.regenerate import CompressionStage
from compressor.training.stage import Batch, moved

PROBED = ((1, 16), (2, 16), (1, 32), (1, 48))
"""Passages and tokens of each, of the micro-batches that are tried: the first two by methods that extend passages.
Where the longest is shorter than these, thirds of it."""
CPU_SLACK, CPU_KERNELS = 1.4, 200_000_000
"""What a process on a CPU holds for each byte of activations, since freed tensors leave holes that others do not fit
in, and bytes that it comes to hold for good, oneDNN's kernels of each shape among them: the middle of what all methods
took on two bases (docs/log.md, 2026-11-28)."""
LOOKED_AT = 200
"""Micro-batches among which the largest is looked for."""


def step_bytes(stage: CompressionStage, config: RunConfig, accelerator: Accelerator) -> int:
    """Bytes of one device at the peak of a step.

    Activations are measured, not counted from a formula: what autograd keeps of four small micro-batches gives what it
    keeps of any, since it grows by a constant, a part for each row and parts that are linear and quadratic in the row's
    width. Other parts: what the process holds now (the base, libraries on a CPU), gradients, the optimiser's moments,
    DDP's copies of gradients, and a layer's and the output layer's intermediate values in the backward pass.
    """
    model = stage.module
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = 4 if config.training.optimizer == "muon" else 8
    training = trained * (
        4 + moments + 4 * (accelerator.num_processes > 1) + 4 * (config.training.average_from is not None)
    )
    config_of_base = model.base.model.config.get_text_config()
    batches = [stage.micro_batch(index) for index in range(LOOKED_AT)]
    shapes = {(*batch["input_ids"].shape, asked_cells(batch)) for batch in batches}
    with accelerator.autocast():  # as in training: of what it casts, both types may be kept
        kept = kept_of(stage, config.training.activation_checkpointing)
        answers = kept_of_answers(stage, batches)
    return_free_memory()  # or training begins among the holes of what was tried
    held = resident_bytes(model)  # with libraries and kernels that the passes needed
    size = model.base.dtype.itemsize
    heads, inner = config_of_base.num_attention_heads, config_of_base.intermediate_size
    passing = max(rows * width * (4 * inner + 3 * heads * width) * size for rows, width, _ in shapes)
    logits = HEAD_ROWS * len(model.base.embeddings.weight) * (size + 12)
    activations = max(kept(rows, width) + int(answers * cells) for rows, width, cells in shapes)
    if model.base.device.type == "cpu":
        activations, held = int(CPU_SLACK * activations), held + CPU_KERNELS
    return held + training + activations + max(passing, logits)


def asked_cells(batch: Batch) -> int:
    """Places of a micro-batch's questions and answers, padding included."""
    return batch["answer_inputs"].numel() if "answer_inputs" in batch else 0


def kept_of_answers(stage: CompressionStage, batches: Sequence[Batch]) -> float:
    """Bytes that autograd keeps for each place of questions and answers, which read the passages' memories."""
    asked = min(
        (batch for batch in batches if asked_cells(batch)), key=lambda one: one["input_ids"].numel(), default=None
    )
    if asked is None or stage.module.activation_checkpointing:
        return 0.0
    model = stage.module
    batch = moved(asked, model.base.device)
    encoded = kept_bytes(partial(model.encode, batch["input_ids"], batch["lengths"], batch["memory_tokens"]), model)
    answers = {k: v for k, v in batch.items() if not k.startswith("regeneration_")}
    return max(0, kept_bytes(partial(model, answers), model) - encoded) / asked_cells(batch)


def kept_of(stage: CompressionStage, checkpointing: bool) -> Callable[[int, int], int]:
    """Bytes that autograd keeps of a micro-batch, by its rows and their width."""
    model, most = stage.module, stage.module.config.memory_tokens
    model.activation_checkpointing = False
    probed = PROBED if model.encoder.padded_to is None else PROBED[:2]
    longest, parts, widths = stage.validation[-1], [], []  # parts: of the encoder and of all, for each shape
    for rows, width in probed:
        width = max(1, min(width, width * longest.length // PROBED[-1][1]))
        batch = stage.collate(stage.held_out, [Piece(longest.record, 0, width)] * rows, [most] * rows)
        widths.append(float(batch["input_ids"].shape[1]))
        batch = moved(batch, model.base.device)
        encode = partial(model.encode, batch["input_ids"], batch["lengths"], most)
        parts.append([kept_bytes(encode, model), kept_bytes(partial(model, batch), model)])
    model.activation_checkpointing = checkpointing
    found = torch.tensor(parts, dtype=torch.float64)
    constant = (2 * found[0] - found[1]).clamp(min=0)
    single = [place for place, (rows, _) in enumerate(probed) if rows == 1]
    powers_of = torch.tensor([[widths[i] ** power for power in range(len(single))] for i in single]).double()
    # By least squares: short passages may be padded to one width.
    by_width = torch.linalg.lstsq(powers_of, found[single] - constant).solution.clamp(min=0)

    def kept(rows: int, width: int) -> int:
        powers = torch.tensor([float(width) ** power for power in range(len(single))], dtype=torch.float64)
        encoder, everything = (constant + rows * (powers @ by_width)).tolist()
        # Checkpointed, the encoder's are made again once the decoder's are gone.
        return int(max(encoder, everything - encoder) if checkpointing else everything)

    return kept


def kept_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps of a pass, each storage once, without weights."""
    gathered = getattr(model, "sharded", False)  # weights of shards are known by their shapes alone
    known = {weight.shape if gathered else weight.data_ptr() for weight in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        ways = (tensor.shape, tensor.shape[::-1]) if gathered else (storage.data_ptr(),)
        if not (tensor.is_leaf and known.intersection(ways)):
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor.detach()  # with its history, an output that its own node keeps would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = run()
    del made
    return sum(storage.nbytes() for storage in storages.values())


def resident_bytes(model: nn.Module) -> int:
    """Bytes held now: allocated on a GPU, the process's on a CPU; elsewhere those of the parameters."""
    device, pages = next(model.parameters()).device, Path("/proc/self/statm")
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "cpu" and pages.exists():
        return int(pages.read_text(encoding="ascii").split()[1]) * 4096
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
