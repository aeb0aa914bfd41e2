"""The compressor: LoRA on a frozen base, and an encoder that makes memories with it.

Encoder: the base with its adapters on reads the passage (and, in most methods, learned memory tokens after it), and
`compressor/methods/` takes keys and values of k slots from it. Decoder: the same base with its adapters off reads
these instead of the passage.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, overload

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.errors import CompressorError, require_texts, require_whole
from compressor.methods.table import encoder_class
from compressor.model.base import Base
from compressor.model.checkpoint import find_base, load_weights, read_settings, save_checkpoint
from compressor.model.config import CompressorConfig
from compressor.model.encoder import equal_segments, pad
from compressor.model.lora import READER, adapter, add_adapters
from compressor.model.memory import Memory, Prefix, Segment, memory_prefix
from compressor.progress import Progress


class Compressor(nn.Module):
    """A trained method of compression over a frozen base.

    Args:
        base: the frozen base; its linear layers get LoRA wrappers in place.
        config: sizes, layout, LoRA settings.
        seed: of the initial adapters and memory tokens.
    """

    def __init__(self, base: Base, config: CompressorConfig, seed: int = 0):
        super().__init__()
        if any(isinstance(module, BaseTunerLayer) for module in base.model.modules()):
            raise CompressorError(f"the base {base.name} already carries a compressor's adapters: load it again")
        self.base, self.config = base, config
        chosen = encoder_class(config.method)
        self.has_writer = chosen.writes and config.writer_rank > 0
        self.peft: PeftModel | None = None
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            if chosen.adapted:
                self.peft = add_adapters(base, config, chosen.reads_hidden_states, self.has_writer)
            self.encoder = chosen(base, config)
        self._lora_layers = [module for module in base.model.modules() if isinstance(module, BaseTunerLayer)]
        self.activation_checkpointing = False
        self.to(base.device)

    def adapters(self, on: bool) -> AbstractContextManager[None]:
        """Run the passage's adapter, or none, in the calling thread for the block; outside, none runs."""
        return adapter(READER if on else None)

    def train(self, mode: bool = True) -> Compressor:
        """Training mode for the adapters only: the frozen base keeps its own dropout off."""
        super().train(mode)
        self.base.model.eval()
        for layer in self._lora_layers:
            layer.train(mode)
        return self

    def encode(self, passages: Tensor, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Compress a batch of passages; differentiable.

        Args:
            passages: token ids, int64 `[batch, width]`, padded on the right with any valid id.
            lengths: passage tokens, int64 `[batch]`.
            tokens: memory tokens k.

        Returns:
            Position-free keys and values, each `[layers, batch, kv_heads, k, head_size]`.
        """
        if self.activation_checkpointing and torch.is_grad_enabled():
            # The encoder switches adapters itself, so that a recomputation runs with the same ones.
            return checkpoint(self.encoder.encode, self, passages, lengths, tokens, use_reentrant=False)
        return self.encoder.encode(self, passages, lengths, tokens)

    def prefix(self, keys: Tensor, values: Tensor, lengths: Tensor, tokens: Tensor | None = None) -> Prefix:
        """The decoder's context from what `encode` returned; differentiable.

        Args:
            keys, values: `[layers, batch, kv_heads, k, head_size]`.
            lengths: passage tokens, int64 `[batch]`.
            tokens: memory tokens that each row may use, int64 `[batch]`; by default all k. Fewer than k is what
                truncating gives, and needs a layout that can be truncated.
        """
        slots = keys.shape[3]
        if tokens is None:
            tokens = torch.full_like(lengths, slots)
        positions, used, start = self.encoder.places(lengths, slots, tokens)
        return Prefix(keys=list(self.base.rotate(keys, positions)), values=list(values), mask=used, start=start)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Summed training loss of a batch (`compressor/training/objectives.py`), so that DDP sees one module call."""
        from compressor.training.objectives import loss

        return loss(self, batch)

    # -- the API for people ------------------------------------------------------------------------------------------

    def segment(self, ids: Sequence[int], most: int | None = None) -> list[list[int]]:
        """Cut token ids into the fewest segments of at most `most` tokens, as equal as can be.

        Args:
            most: at most, and by default, `max_passage_tokens`.
        """
        if not ids:
            raise CompressorError("cannot compress an empty passage: give at least one token of text")
        if most is not None and most < 1:
            raise CompressorError(f"segments of {most} tokens hold nothing: give segment_tokens of at least 1")
        most = min(most or self.config.max_passage_tokens, self.config.max_passage_tokens)
        return equal_segments(ids, most)

    # A str is a Sequence[str] too: the first overload comes first on purpose.
    @overload
    def compress(  # type: ignore[overload-overlap]
        self,
        passages: str,
        tokens: int | None = None,
        batch_size: int = 16,
        *,
        target_fidelity: float | None = None,
        segment_tokens: int | None = None,
        refine_steps: int = 0,
    ) -> Memory: ...
    @overload
    def compress(
        self,
        passages: Sequence[str],
        tokens: int | None = None,
        batch_size: int = 16,
        *,
        target_fidelity: float | None = None,
        segment_tokens: int | None = None,
        refine_steps: int = 0,
    ) -> list[Memory]: ...

    def compress(
        self,
        passages: str | Sequence[str],
        tokens: int | None = None,
        batch_size: int = 16,
        *,
        target_fidelity: float | None = None,
        segment_tokens: int | None = None,
        refine_steps: int = 0,
    ) -> Memory | list[Memory]:
        """Compress one passage, or several in batches.

        Args:
            passages: text or texts. Those over `max_passage_tokens` are compressed in segments.
            tokens: memory tokens for each segment; by default all the compressor has.
            batch_size: segments encoded together.
            target_fidelity: take for each passage the fewest memory tokens (a power of two, at most `tokens`) with
                which this share of it comes back when it is regenerated (`model/fidelity.py`); where none do,
                all, and a warning.
            segment_tokens: compress passages in segments of at most so many tokens: more memory tokens in all, each of
                which holds less; by default segments are as long as the compressor takes.
            refine_steps: gradient steps on each memory itself (`compressor/model/refinement.py`), each of which takes a
                forward and a backward pass over the passage: 10 to 50 keep far more with few memory tokens.

        Returns:
            A memory, or a list of them.

        Raises:
            CompressorError: an empty text, more memory tokens than the compressor has, or a fidelity out of range.
        """
        texts = in_list(passages, "the passage")
        ids = self.base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        if target_fidelity is None:
            memories = self.compress_ids(ids, tokens, batch_size, segment_tokens, refine_steps)
        else:
            from compressor.model.fidelity import compress_to_fidelity

            memories = compress_to_fidelity(
                self, ids, target_fidelity, tokens, batch_size, segment_tokens, refine_steps
            )
        return memories[0] if isinstance(passages, str) else memories

    @torch.no_grad()
    def compress_ids(
        self,
        passages: Sequence[Sequence[int]],
        tokens: int | None = None,
        batch_size: int = 16,
        segment_tokens: int | None = None,
        refine_steps: int = 0,
    ) -> list[Memory]:
        """`compress` for passages that are tokenised already.

        Args:
            segment_tokens: most tokens of a segment, by default `max_passage_tokens`.
            refine_steps: see `compress`.
        """
        if not self.encoder.makes_memories:
            raise CompressorError(
                f"the method {self.config.method} is a bound to compare with and makes no memories: evaluate it "
                f"(evaluate.py --methods {self.config.method}=CHECKPOINT), or load another checkpoint"
            )
        tokens = self.config.memory_tokens if tokens is None else tokens
        require_whole("tokens", tokens, 0)
        require_whole("batch_size", batch_size)
        require_whole("refine_steps", refine_steps, 0)
        if segment_tokens is not None:
            require_whole("segment_tokens", segment_tokens)
        if not 1 <= tokens <= self.config.memory_tokens:
            raise CompressorError(
                f"cannot compress to {tokens} memory tokens: this compressor has 1 to {self.config.memory_tokens}"
            )
        most = min(segment_tokens or self.config.max_passage_tokens, self.config.max_passage_tokens)
        owners, segments = [], []
        for owner, ids in enumerate(passages):
            for segment in self.segment(ids, segment_tokens):
                owners.append(owner)
                segments.append(segment)
        parts: list[Memory | None] = [None] * len(segments)
        order = sorted(range(len(segments)), key=lambda i: len(segments[i]))
        with Progress("compressing", len(order), "segments") as progress:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                padded, lengths = pad([segments[i] for i in chosen], self.base.device)
                keys, values = self.encode(padded, lengths, tokens)
                for row, i in enumerate(chosen):
                    parts[i] = Memory(
                        keys[:, row].clone(),
                        values[:, row].clone(),
                        (Segment(tokens, len(segments[i])),),
                        self.encoder.memory_layout,
                        self.config.memory_tokens,
                        self.base.fingerprint,
                        made={"tokens": tokens, "segment_tokens": most, "refine_steps": 0},
                    )
                progress.add(len(chosen))
        grouped: list[list[Memory]] = [[] for _ in passages]
        for owner, part in zip(owners, parts, strict=True):
            assert part is not None
            grouped[owner].append(part)
        return self.refine([Memory.concatenate(group) for group in grouped], passages, refine_steps, batch_size)

    def refine(
        self, memories: Sequence[Memory], passages: Sequence[Sequence[int]], steps: int, batch_size: int = 16
    ) -> list[Memory]:
        """Better the memories of tokenised passages by gradient steps, adapters off; see `refinement.refine`."""
        from compressor.model.refinement import refine

        with self.adapters(on=False):
            return refine(self.base, memories, passages, steps, batch_size)

    @overload
    def regenerate(self, memories: Memory, **options: Any) -> str: ...
    @overload
    def regenerate(self, memories: Sequence[Memory], **options: Any) -> list[str]: ...

    def regenerate(self, memories: Memory | Sequence[Memory], **options: Any) -> str | list[str]:
        """Write the passages back from their memories, adapters off; see `generation.regenerate`."""
        from compressor.model import generation

        chosen = _memories(memories)
        with self.adapters(on=False):
            texts = generation.regenerate(self.base, chosen, **options)
        return texts[0] if isinstance(memories, Memory) else texts

    @overload
    def answer(self, memories: Memory, questions: str, *, recite: bool = False, **options: Any) -> str: ...
    @overload
    def answer(
        self, memories: Sequence[Memory], questions: Sequence[str], *, recite: bool = False, **options: Any
    ) -> list[str]: ...

    def answer(
        self,
        memories: Memory | Sequence[Memory],
        questions: str | Sequence[str],
        *,
        recite: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """Answer a question about each memory, adapters off; see `generation.answer` for options and log-probabilities.

        Args:
            memories, questions: one of each, or as many questions as memories.
            recite: write the passages back first and answer from these texts (`methods/recite.py`).
        """
        from compressor.methods.recite import recited_prefix
        from compressor.model import generation

        single = isinstance(memories, Memory)
        asked = in_list(questions, "the question")
        chosen = _memories(memories)
        if len(asked) != len(chosen):
            raise CompressorError(f"got {len(chosen)} memories and {len(asked)} questions: give one question for each")
        if not chosen:
            return []
        options = {"template": self.config.question_template} | options
        with self.adapters(on=False):
            prefix = (recited_prefix if recite else memory_prefix)(self.base, chosen)
            answers = generation.answer(self.base, prefix, asked, **options)
        return answers[0].text if single else [one.text for one in answers]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """Adapter weights and memory tokens by parameter name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write adapter, encoder, settings and a card, never base weights, atomically.

        Args:
            folder: replaced if it exists.
            dtype: round the trained weights to this type; by default they are kept as they are (float32).
        """
        save_checkpoint(self, folder, dtype)

    def load_trainable(self, folder: str | Path) -> None:
        """Read what `save_pretrained` wrote into this compressor, exactly."""
        load_weights(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        base: Base | str | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        attention: str = "sdpa",
        quantisation: str | None = None,
        base_mismatch: str = "refuse",
    ) -> Compressor:
        """Load a checkpoint.

        Args:
            path: folder or hub id; by default a bundled one (`bases.default_checkpoint`).
            base: the frozen base or its path; by default the one named in the checkpoint, also looked for beside it.
            device, dtype: where and how to hold the base. A base quantised as the checkpoint says keeps the type it
                was quantised from.
            revision: hub revision of the checkpoint.
            attention: attention implementation of the base.
            quantisation: of the base; by default as it was in training.
            base_mismatch: `allow` takes a base with other weights than the checkpoint was trained on, with a warning.

        Raises:
            CompressorError: no such checkpoint, a damaged one, or another base than it was trained with.
        """
        folder, chosen = find_base(path, base, device, dtype, revision, attention, quantisation, base_mismatch)
        model = cls(chosen, CompressorConfig(**read_settings(folder)["config"]))
        load_weights(model, folder)
        return model.eval()


def _memories(memories: Any) -> list[Memory]:
    """A memory, or several, as a list; what is none is a `CompressorError`."""
    found = list(memories) if isinstance(memories, Iterable) else [memories]
    if wrong := [type(one).__name__ for one in found if not isinstance(one, Memory)]:
        raise CompressorError(f"got {wrong[0]}, not a memory: give what compress returned, or Memory.load(FILE)")
    return found


def in_list(texts: str | Sequence[str], name: str) -> list[str]:
    """A text, or several, as a list; what is no text is a `CompressorError`."""
    try:
        found = [texts] if isinstance(texts, str | os.PathLike) else list(texts)
    except TypeError:
        raise CompressorError(f"{name} is {type(texts).__name__}, not text: give a str or a list of them") from None
    require_texts(name, found)
    return found
