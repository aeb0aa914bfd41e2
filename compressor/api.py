"""`Compressor`, for people: texts to memories, memories to texts and answers, checkpoints saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, overload

import torch
from typing_extensions import Self, Unpack

from compressor.errors import CompressorError, as_path, require_texts, unknown
from compressor.methods.recite import recited_prefix
from compressor.methods.table import encoder_class
from compressor.model import generation
from compressor.model.base import Base
from compressor.model.bases import default_checkpoint
from compressor.model.card import evaluated, push
from compressor.model.checkpoint import compressor_name, find_base, load_weights, read_settings, save_checkpoint
from compressor.model.config import CompressorConfig
from compressor.model.decoder import shared
from compressor.model.fidelity import compress_to_fidelity, noted
from compressor.model.memory import Memory, memory_prefix, signed, warn_of_many
from compressor.model.network import Network
from compressor.progress import note, note_once


class CompressOptions(TypedDict, total=False):
    """How passages are compressed, besides to how many tokens."""

    batch_size: int
    """Segments encoded together; by default 16."""
    target_fidelity: float | None
    """Take for each passage the fewest memory tokens (a power of two, at most `tokens`) with which this share of it
    comes back when it is regenerated (`model/fidelity.py`); where none do, all, and a warning."""
    segment_tokens: int | None
    """Compress passages in segments of at most so many tokens: more memory tokens in all, each of which holds less; by
    default those of the compressor's settings (`CompressorConfig.segment_tokens`)."""
    refine_steps: int
    """Gradient steps on each memory itself (`compressor/model/refinement.py`), each of which takes a forward and a
    backward pass over the passage: 10 to 50 keep far more with few memory tokens."""
    measure: bool | None
    """How much of the passages comes back when they are written from their memories. True measures all
    (`Memory.fidelity`), False none; by default as many segments as one batch takes, which is cheap for many texts and
    all of a short one. Where less than 90% comes back, a warning says so."""


class Compressor(Network):
    """A trained method of compression over a frozen base.

    Args:
        base: the frozen base; its linear layers get LoRA wrappers in place.
        config: sizes, layout, LoRA settings.
        seed: of the initial adapters and memory tokens.
    """

    def __init__(self, base: Base, config: CompressorConfig, seed: int = 0):
        super().__init__(base, config, encoder_class(config.method), seed)
        self.about: dict[str, Any] = {}
        """What a model card says besides the settings: license, datasets, evaluation."""
        self.name = "compressor"
        """What memories call it, beside a hash of its weights: the folder or hub id it was loaded from."""
        self._hashed: tuple[Any, str] = (None, "")

    # A str is a Sequence[str] too: the first overload comes first on purpose.
    @overload
    def compress(  # type: ignore[overload-overlap]
        self, passages: str, tokens: int | None = None, **options: Unpack[CompressOptions]
    ) -> Memory: ...
    @overload
    def compress(
        self, passages: Sequence[str], tokens: int | None = None, **options: Unpack[CompressOptions]
    ) -> list[Memory]: ...

    def compress(
        self, passages: str | Sequence[str], tokens: int | None = None, **options: Unpack[CompressOptions]
    ) -> Memory | list[Memory]:
        """Compress one passage, or several in batches.

        Args:
            passages: text or texts. Those over `segment_tokens` are compressed in segments.
            tokens: memory tokens for each segment; by default all the compressor has.
            options: see `CompressOptions`.

        Returns:
            A memory, or a list of them.

        Raises:
            CompressorError: an empty text, more memory tokens than the compressor has, or a fidelity out of range.
        """
        if odd := sorted(set(options) - set(CompressOptions.__annotations__)):
            raise unknown("option of compress", odd[0], CompressOptions.__annotations__)
        settings: dict[str, Any] = {"batch_size": 16, **options}
        target, measure = settings.pop("target_fidelity", None), settings.pop("measure", None)
        ids = self.base.tokenise(in_list(passages, "the passage"))
        if target is None:
            memories = self.compress_ids(ids, tokens, **settings)
            if memories and measure is not False:
                memories = noted(self, memories, ids, settings["batch_size"], every=measure is True)
        else:
            memories = compress_to_fidelity(self, ids, target, tokens, **settings)
        memories = [signed(memory, self.base, self._signature()) for memory in memories]
        return memories[0] if isinstance(passages, str) else memories

    def _signature(self) -> str:
        """`NAME@SHA256`. Hashing takes as long as a short passage does: again only where weights were written to."""
        state = [(weight.data_ptr(), weight._version) for weight in self.trainable_state().values()]
        if self._hashed[0] != state:
            self._hashed = state, compressor_name(self, self.name)
        return self._hashed[1]

    @overload
    def regenerate(self, memories: Memory, **options: Any) -> str: ...
    @overload
    def regenerate(self, memories: Sequence[Memory], **options: Any) -> list[str]: ...

    def regenerate(self, memories: Memory | Sequence[Memory], **options: Any) -> str | list[str]:
        """Write the passages back from their memories; see `generation.regenerate`."""
        texts = generation.regenerate(self.base, _memories(memories), **options)
        return texts[0] if isinstance(memories, Memory) else texts

    @overload
    def answer(self, memories: Memory, questions: str, *, recite: bool = False, **options: Any) -> str: ...
    @overload
    def answer(
        self, memories: Memory | Sequence[Memory], questions: Sequence[str], *, recite: bool = False, **options: Any
    ) -> list[str]: ...

    def answer(
        self,
        memories: Memory | Sequence[Memory],
        questions: str | Sequence[str],
        *,
        recite: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """Answer a question about each memory; see `generation.answer` for options and log-probabilities.

        Args:
            memories, questions: one memory and a question or several; or as many questions as memories. A memory that
                several are asked about is read by all of them without copies.
            recite: write the passages back first and answer from these texts (`methods/recite.py`).
        """
        single = isinstance(memories, Memory) and isinstance(questions, str)
        asked = in_list(questions, "the question")
        chosen = [memories] * len(asked) if isinstance(memories, Memory) else _memories(memories)
        if len(asked) != len(chosen):
            raise CompressorError(f"got {len(chosen)} memories and {len(asked)} questions: give one question for each")
        if not chosen:
            return []
        if not recite and any(memory.made.get("refine_keep") == 0 for memory in chosen):
            note_once(
                "warning: refined for regeneration alone, this memory answers worse than before: recite=True helps"
            )
        if not recite:
            warn_of_many(chosen)
        options = {"template": self.config.question_template} | options
        prefix = shared(chosen, partial(recited_prefix if recite else memory_prefix, self.base))
        answers = generation.answer(self.base, prefix, asked, **options)
        return answers[0].text if single else [one.text for one in answers]

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        *,
        evaluation: str | Path | None = None,
        datasets: Sequence[str] | None = None,
        license: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write adapter, encoder, settings and a model card, never base weights, atomically.

        Args:
            folder: replaced if it exists.
            dtype: round the trained weights to this type; by default they are kept as they are (float32).
            evaluation: output folder of evaluate.py, whose figures the card shows.
            datasets, license: of the card. What is not given stays as it was in the checkpoint that was loaded.
            push_to_hub: upload the folder, too; needs `hf auth login` or `token`.
            repo_id: USER/NAME on the hub; by default the folder's name.
            hub: private, token, revision, commit_message, as of `huggingface_hub`.

        Raises:
            CompressorError: it cannot be written, or the hub does not take it (then it is written here all the same).
        """
        if hub and not push_to_hub:
            raise CompressorError(f"{', '.join(sorted(hub))} is of the hub: give push_to_hub=True, or leave it out")
        found = None if evaluation is None else evaluated(evaluation, self.config.method)
        given = {"license": license, "datasets": datasets and list(datasets), "evaluation": found}
        self.about |= {name: value for name, value in given.items() if value is not None}
        save_checkpoint(self, folder, dtype, self.about)
        if push_to_hub:
            note(f"pushed to {push(folder, repo_id, **hub)}")

    def load_trainable(self, folder: str | Path) -> None:
        """Read what `save_pretrained` wrote into this compressor, exactly."""
        load_weights(self, as_path(folder))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        base: Base | str | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        attention: str = "auto",
        quantization: str | None = None,
        base_mismatch: str = "refuse",
        decoding: str = "auto",
    ) -> Self:
        """Load a checkpoint.

        Args:
            path: folder or hub id; by default a bundled one (`bases.default_checkpoint`).
            base: the frozen base or its path; by default the one named in the checkpoint, also looked for beside it.
            device, dtype: where and how to hold the base. A base quantised as the checkpoint says keeps the type it
                was quantised from.
            revision: hub revision of the checkpoint.
            attention: attention implementation of the base.
            quantization: of the base; by default as it was in training.
            base_mismatch: `allow` takes a base with other weights than the checkpoint was trained on, with a warning.
            decoding: how the base writes: `auto`, `static` (caches of a fixed width) or `compiled` (these, and the step
                of a token by `torch.compile`).

        Raises:
            CompressorError: no such checkpoint, a damaged one, or another base than it was trained with.
        """
        path = default_checkpoint() if path is None or path == "" else as_path(path)
        folder, chosen = find_base(
            path, base, device, dtype, revision, attention, quantization, base_mismatch, decoding
        )
        settings = read_settings(folder)
        model = cls(chosen, CompressorConfig(**settings["config"]))
        model.about, model.name = dict(settings.get("about", {})), str(path)
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
