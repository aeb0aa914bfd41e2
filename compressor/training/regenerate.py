"""Stage `regenerate`: trains a compressor so that the frozen base writes the passage from its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from compressor.data.batches import (
    BatchPlan,
    Piece,
    continuation_pair,
    cued_pair,
    pad,
    padded_width,
    regeneration_pair,
    stack_pairs,
)
from compressor.data.records import load_passages, passages_digest
from compressor.data.rows import LeftOut
from compressor.errors import CompressorError
from compressor.model.decoder import label_nats
from compressor.model.fingerprints import tokenizer_fingerprint
from compressor.model.generation import generate, regeneration_limit
from compressor.model.load import load_base
from compressor.processes import held_dtype, summed
from compressor.training.checkpoints import VALIDATION
from compressor.training.config import RunConfig
from compressor.training.objectives import Trainee, load_teacher
from compressor.training.sharding import shard_base, sharding_asked, share_out
from compressor.training.stage import Batch

CONTINUATION_TOKENS = 64
"""Most tokens of what follows a passage in the continuation objective."""
STARTS = ("compressor.lora_dropout", "compressor.initialisation")
"""Settings of a compressor that may differ in what a run is resumed with: where it started, and noise in training."""
COLLAPSE = 0.05
"""Nats a token: if reading another passage's memory costs less than this, the decoder ignores memories."""


class CompressionStage:
    """See `compressor.training.stage.Stage`."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.config = config
        self.left_out: defaultdict[str, LeftOut] = defaultdict(LeftOut)
        """What is left out of the data, by its use and split; `run.json` holds it."""
        self.module: Trainee
        sharded = sharding_asked(config)
        device = torch.device("cpu") if sharded else accelerator.device  # shards are sent to the device
        dtype: Any = held_dtype(config.base.dtype, accelerator.device)
        held: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "attention": config.base.attention,
            "quantization": None if config.base.quantization == "none" else config.base.quantization,
            "base_mismatch": config.base_mismatch,
        }
        # Before the base gets adapters: one that has some takes no other network.
        teacher = None if config.objective.teacher is None else load_teacher(config.objective.teacher, **held)
        if config.init is not None:
            self.module = Trainee.from_pretrained(config.init, base=teacher.base if teacher else None, **held)
        else:
            base = teacher.base if teacher else load_base(replace(config.base, dtype=dtype), device)
            self.module = Trainee(base, config.compressor, config.seed)
        if teacher:
            teacher.encoder.to(accelerator.device)
            self.module.taught_by(teacher)
        if sharded:
            shard_base(self.module, accelerator)
        self.module.train()
        self.module.activation_checkpointing = config.training.activation_checkpointing
        self.module.balance = config.objective.balance
        most = self.module.config.memory_tokens
        for share in config.objective.tokens:
            if share.tokens > most:
                raise CompressorError(
                    f"objective.tokens asks for {share.tokens} but the checkpoint {config.init} has {most}"
                )
        base, data = self.module.base, config.data
        too_long = max(share.high for share in data.lengths)
        if too_long > self.module.config.max_passage_tokens:
            raise CompressorError(
                f"data.lengths goes up to {too_long} tokens but compressor.max_passage_tokens is "
                f"{self.module.config.max_passage_tokens}: longer passages are always segmented"
            )
        window, written = base.window, max(regeneration_limit(too_long), CONTINUATION_TOKENS)
        if window is not None and (needed := too_long + most + 1 + written) > window:
            raise CompressorError(
                f"data.lengths goes up to {too_long} tokens, which take {needed} positions with their memory and the "
                f"regeneration, and {base.name} has layers that attend over {window} alone: give shorter ones"
            )
        with accelerator.main_process_first():
            self.passages, self.held_out = (
                load_passages(
                    sources,
                    base.tokenizer,
                    split,
                    data.text_field,
                    limit,
                    data.workers,
                    config.skip_bad_records,
                    self.left_out[f"passages, {split}"],
                )
                for sources, split, limit in (
                    (data.train, "train", data.limit),
                    (data.validation, "validation", data.validation_limit),
                )
            )
        lengths = np.asarray(self.passages["tokens"])
        self.plan = BatchPlan(lengths, data, config.training.batch_tokens, config.training.batch_passages, config.seed)
        short = np.flatnonzero(lengths < min(share.low for share in data.lengths))
        if len(short):
            self.left_out["passages, train"].add("too_short", self.passages[int(short[0])]["id"], len(short))
        rng = np.random.default_rng(config.seed)
        held_out = BatchPlan(np.asarray(self.held_out["tokens"]), data, 1 << 14, 16, config.seed, "data.validation")
        self.validation = sorted(
            held_out.draw(rng, min(data.validation_limit, len(self.held_out))), key=lambda p: p.length
        )
        if accelerator.is_main_process:
            self._say_what_is_left_out(lengths)

    def _say_what_is_left_out(self, lengths: np.ndarray) -> None:
        """Lines on passages that are not used, and on ranges of lengths that none is long enough for."""
        used = {"train": len(lengths), "validation": len(self.held_out)}
        for split, count in used.items():
            left_out = self.left_out[f"passages, {split}"]
            short = left_out.counts["too_short"]
            if left_out.total:
                print(f"note: {left_out.line(f'passages ({split})', count - short)}")
        longest = int(lengths.max())
        for share in self.config.data.lengths:
            if share.low > longest:
                print(
                    f"note: no passage is as long as the range {share.low} to {share.high} of data.lengths: its share "
                    f"goes to those of {longest} tokens, the longest"
                )

    def micro_batch(self, index: int) -> Batch:
        pieces = self.plan.batch(index)
        rng = np.random.default_rng([self.config.seed, index, 1])
        return self.collate(self.passages, pieces, self.draw_tokens(rng, [piece.length for piece in pieces]), rng)

    def draw_tokens(self, rng: np.random.Generator, lengths: Sequence[int]) -> list[int]:
        """Numbers of memory tokens for passages of these lengths."""
        shares = self.config.objective.tokens
        weights = np.array(
            [
                [share.weight * (share.shortest <= length <= (share.longest or length)) for share in shares]
                for length in lengths
            ]
        )
        # Lengths for which there is no share take any.
        weights[weights.sum(1) == 0] = [share.weight for share in shares]
        edges = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
        places = np.minimum((rng.random(len(lengths))[:, None] >= edges).sum(1), len(shares) - 1)
        return [shares[place].tokens for place in places]

    def regenerated(
        self, rows: Sequence[Sequence[int]], rng: np.random.Generator | None
    ) -> list[tuple[list[int], list[int]]]:
        """What the decoder writes of each passage: the whole, or where `rng` says so what follows a cue."""
        base, share = self.module.base, self.config.objective.cued_share
        cued = rng.random(len(rows)) < share if rng and share else np.zeros(len(rows), dtype=bool)
        return [
            cued_pair(rng, base.eos, row) if rng and from_cue else regeneration_pair(base.bos, base.eos, row)
            for row, from_cue in zip(rows, cued, strict=True)
        ]

    def collate(
        self,
        passages: Any,
        pieces: Sequence[Piece],
        tokens: Sequence[int],
        rng: np.random.Generator | None = None,
    ) -> Batch:
        """Tensors for `pieces`, each compressed to its number of memory tokens; `rng` draws those read from a cue."""
        base, objective = self.module.base, self.config.objective
        records = [passages[piece.record] for piece in pieces]
        cut = [record["input_ids"][p.start : p.start + p.length] for record, p in zip(records, pieces, strict=True)]
        following = [
            record["input_ids"][p.start + p.length :][:CONTINUATION_TOKENS] or [base.eos]
            for record, p in zip(records, pieces, strict=True)
        ]
        cut = [self.padded(one) for one in cut]
        ids, lengths = pad(cut, width=padded_width)
        batch: Batch = {
            "input_ids": ids,
            "lengths": lengths,
            "memory_tokens": torch.tensor(tokens),
            "ids": [record["id"] for record in records],
            "targets": 0,
            "passages": len(pieces),
        }
        pairs: dict[str, list[tuple[list[int], list[int]]]] = {}
        if objective.regeneration:
            pairs["regeneration"] = self.regenerated(cut, rng)
        if objective.continuation:
            pairs["continuation"] = [continuation_pair(one[-1], rest) for one, rest in zip(cut, following, strict=True)]
        for name, rows in pairs.items():
            stacked = stack_pairs(rows)
            batch[f"{name}_inputs"], batch[f"{name}_labels"] = stacked["inputs"], stacked["labels"]
            batch[f"{name}_weight"] = getattr(objective, name)
            batch["targets"] += stacked["targets"]
        return batch

    def padded(self, passage: list[int]) -> list[int]:
        """The passage, extended with EOS by methods that treat padding as text."""
        width = self.module.encoder.padded_to
        return passage if width is None else passage + [self.module.base.eos] * (width - len(passage))

    def probe_batch(self) -> Batch:
        # All memory tokens at once: one the batch leaves out would look dead.
        piece = self.validation[0]
        return self.collate(
            self.held_out, [Piece(piece.record, 0, min(8, piece.length))], [self.module.config.memory_tokens]
        )

    @torch.no_grad()
    def validate(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """Nats a token of regeneration for each number of memory tokens, and with the memories swapped."""
        model, device = self.module, accelerator.device
        model.eval()
        weights = self.config.objective.weights()
        counts = list(weights)
        # Nats for each count; then targets; then nats with own and with swapped memories, and targets, of groups of two
        # and more: a passage alone has no other's memory to read.
        sums = torch.zeros(len(counts) + 4, dtype=torch.float64)
        groups = [self.validation[i : i + 16] for i in range(0, len(self.validation), 16)]
        for group in share_out(groups, model, accelerator):
            cut = [self.held_out[p.record]["input_ids"][p.start : p.start + p.length] for p in group]
            ids, lengths = pad(cut, device)
            stacked = stack_pairs([regeneration_pair(model.base.bos, model.base.eos, one) for one in cut])
            inputs, labels = stacked["inputs"].to(device), stacked["labels"].to(device)
            with accelerator.autocast():
                for place, tokens in enumerate(counts):
                    keys, values = model.encode(ids, lengths, tokens)
                    prefix = model.prefix(keys, values, lengths)
                    nats = float(label_nats(model.base, prefix, inputs, labels).sum())
                    sums[place] += nats
                    if place == 0 and len(cut) > 1:
                        other = torch.arange(len(cut), device=device).roll(1)
                        swapped = model.prefix(keys[:, other], values[:, other], lengths[other])
                        swapped_nats = float(label_nats(model.base, swapped, inputs, labels).sum())
                        sums[-3:] += torch.tensor([nats, swapped_nats, stacked["targets"]], dtype=torch.float64)
            sums[len(counts)] += stacked["targets"]
        totals = summed(sums, accelerator)
        loss = {tokens: value / totals[len(counts)] for tokens, value in zip(counts, totals, strict=False)}
        own, swapped_loss = (value / max(1.0, totals[-1]) for value in totals[-3:-1])
        figures = {"loss": sum(weights[tokens] * loss[tokens] for tokens in counts) / sum(weights.values())}
        figures |= {f"nats_{tokens}": value for tokens, value in loss.items()}
        if totals[-1]:  # a single record has no other to swap memories with
            figures["nats_swapped"] = swapped_loss
        samples = self.samples(counts[0], accelerator) if accelerator.is_main_process or model.sharded else []
        if totals[-1] and swapped_loss - own < COLLAPSE:
            samples.insert(0, "warning: memories of other passages do as well: the decoder ignores the memory")
        model.train()
        return figures, samples

    def samples(self, tokens: int, accelerator: Accelerator) -> list[str]:
        """Two validation passages and what comes back from their memories."""
        model, tokenizer = self.module, self.module.base.tokenizer
        chosen = [p for p in self.validation if p.length <= 128][-2:] or self.validation[:2]
        cut = [self.held_out[p.record]["input_ids"][p.start : p.start + p.length] for p in chosen]
        base = model.base
        ids, lengths = pad([self.padded(one) for one in cut], accelerator.device)
        limits = [regeneration_limit(len(one)) for one in cut]
        with accelerator.autocast():
            prefix = model.prefix(*model.encode(ids, lengths, tokens), lengths)
            written = [one.ids for one in generate(base, prefix, [[base.bos]] * len(cut), limits)]
        lines = []
        for passage, back in zip(cut, written, strict=True):
            for label, one in (("passage", passage), ("regenerated", back)):
                lines.append(f"{label:>11}: {' '.join(tokenizer.decode(one, skip_special_tokens=True).split())[:160]}")
        return lines

    def origin(self) -> dict[str, str]:
        """See `Stage`: base, method, data and optimiser."""
        model = self.module
        settings = {f"compressor.{name}": str(value) for name, value in asdict(model.config).items()}
        return {
            "base": model.base.fingerprint,
            "tokenizer": tokenizer_fingerprint(model.base.tokenizer),
            "text encoder": model.encoder.frozen_fingerprint or "none",
            **{name: value for name, value in settings.items() if name not in STARTS},
            "training.optimizer": self.config.training.optimizer,
            "data.train": passages_digest(self.passages),
            VALIDATION: passages_digest(self.held_out),
        }

    def save(self, folder: Path) -> None:
        sources = map(str, [*self.config.data.train, *self.config.data.questions])
        # Of a file the name: folders of this machine are nobody's business.
        self.module.save_pretrained(folder, datasets=[Path(one).name if Path(one).exists() else one for one in sources])

    def load(self, folder: Path) -> None:
        self.module.load_trainable(folder)
