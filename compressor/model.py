"""The compressor: LoRA on a frozen base, and learned memory tokens.

Encoder: the base with its adapters on reads `passage ; k memory tokens`, and the keys and values of the memory tokens
are kept in every layer. Decoder: the same base with its adapters off reads them instead of the passage.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import compressor
from compressor.base import Base, load_base, resolve
from compressor.config import BaseConfig, CompressorConfig
from compressor.errors import CompressorError
from compressor.files import atomic_path, read_json, sha256, write_json
from compressor.layouts import decoder_start, memory_positions
from compressor.lora import lora_config
from compressor.memory import Memory, Prefix, Segment

FORMAT = 1
NEEDED_SETTINGS = ("memory_tokens", "layout", "passage_attention", "lora_rank", "lora_alpha")
"""Settings without which a checkpoint would be read as another compressor."""


class Compressor(nn.Module):
    """LoRA adapters and memory tokens over a frozen base.

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
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                # peft 0.21 reads an attribute that transformers 5.23 renamed.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                self.peft: PeftModel = get_peft_model(base.model, lora_config(base, config))
            self.memory_embeddings = nn.Parameter(_initial_memory(base, config))
        self._lora_layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        self.activation_checkpointing = False
        self.to(base.device)

    @contextmanager
    def adapters(self, on: bool) -> Iterator[None]:
        """Switch the adapters for the block.

        PEFT's own `disable_adapter()` also changes `requires_grad`, walks every module (26 ms a call on 28 layers) and
        leaves gradients None when `backward` runs inside it. This only sets the flag that LoRA layers read.
        """
        before = [layer._disable_adapters for layer in self._lora_layers]
        for layer in self._lora_layers:
            layer._disable_adapters = not on
        try:
            yield
        finally:
            for layer, flag in zip(self._lora_layers, before, strict=True):
                layer._disable_adapters = flag

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
            return checkpoint(self._encode, passages, lengths, tokens, use_reentrant=False)
        return self._encode(passages, lengths, tokens)

    def _encode(self, passages: Tensor, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        # The adapter switch is inside, so that a recomputation under activation checkpointing runs with it too.
        batch, width = passages.shape
        embedded = self.base.embeddings(passages)
        # The base may be in bfloat16 while memory tokens train in float32; `cat` would promote.
        memory = self.memory_embeddings[:tokens].to(embedded.dtype).expand(batch, -1, -1)
        columns = torch.arange(width, device=passages.device)
        positions = torch.cat(
            [
                columns.expand(batch, -1),
                memory_positions(self.config.layout, lengths, tokens, self.config.memory_tokens),
            ],
            dim=1,
        )
        allowed = encoder_attention(lengths, width, tokens, self.config.passage_attention == "bidirectional")
        with self.adapters(on=True):
            keys, values = self.base.keys_and_values(torch.cat([embedded, memory], dim=1), positions, allowed, tokens)
        return self.base.rotate(keys, positions[:, width:], inverse=True), values

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
        positions = memory_positions(self.config.layout, lengths, slots, self.config.memory_tokens)
        return Prefix(
            keys=list(self.base.rotate(keys, positions)),
            values=list(values),
            mask=torch.arange(slots, device=keys.device)[None] < tokens[:, None],
            start=decoder_start(self.config.layout, lengths, tokens),
        )

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Summed training loss of a batch (`compressor/objectives.py`), so that DDP sees one module call."""
        from compressor.objectives import loss

        return loss(self, batch)

    # -- the API for people ------------------------------------------------------------------------------------------

    def segment(self, ids: Sequence[int]) -> list[list[int]]:
        """Cut token ids into the fewest segments of at most `max_passage_tokens`, as equal as can be."""
        if not ids:
            raise CompressorError("cannot compress an empty passage: give at least one token of text")
        count = -(-len(ids) // self.config.max_passage_tokens)
        edges = [len(ids) * i // count for i in range(count + 1)]
        return [list(ids[a:b]) for a, b in pairwise(edges)]

    # A str is a Sequence[str] too: the first overload comes first on purpose.
    @overload
    def compress(self, passages: str, tokens: int | None = None, batch_size: int = 16) -> Memory: ...  # type: ignore[overload-overlap]
    @overload
    def compress(self, passages: Sequence[str], tokens: int | None = None, batch_size: int = 16) -> list[Memory]: ...

    def compress(
        self, passages: str | Sequence[str], tokens: int | None = None, batch_size: int = 16
    ) -> Memory | list[Memory]:
        """Compress one passage, or several in batches.

        Args:
            passages: text or texts. Those over `max_passage_tokens` are compressed in segments.
            tokens: memory tokens for each segment; by default all the compressor has.
            batch_size: segments encoded together.

        Returns:
            A memory, or a list of them.

        Raises:
            CompressorError: an empty text, or more memory tokens than the compressor has.
        """
        texts = [passages] if isinstance(passages, str) else list(passages)
        ids = self.base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        memories = self.compress_ids(ids, tokens, batch_size)
        return memories[0] if isinstance(passages, str) else memories

    @torch.no_grad()
    def compress_ids(
        self, passages: Sequence[Sequence[int]], tokens: int | None = None, batch_size: int = 16
    ) -> list[Memory]:
        """`compress` for passages that are tokenised already."""
        tokens = self.config.memory_tokens if tokens is None else tokens
        if not 1 <= tokens <= self.config.memory_tokens:
            raise CompressorError(
                f"cannot compress to {tokens} memory tokens: this compressor has 1 to {self.config.memory_tokens}"
            )
        owners, segments = [], []
        for owner, ids in enumerate(passages):
            for segment in self.segment(ids):
                owners.append(owner)
                segments.append(segment)
        parts: list[Memory | None] = [None] * len(segments)
        order = sorted(range(len(segments)), key=lambda i: len(segments[i]))
        was_training = self.training
        self.eval()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            padded, lengths = pad([segments[i] for i in chosen], self.base.device)
            keys, values = self.encode(padded, lengths, tokens)
            for row, i in enumerate(chosen):
                parts[i] = Memory(
                    keys[:, row].clone(),
                    values[:, row].clone(),
                    (Segment(tokens, len(segments[i])),),
                    self.config.layout,
                    self.config.memory_tokens,
                    self.base.fingerprint,
                )
        self.train(was_training)
        grouped: list[list[Memory]] = [[] for _ in passages]
        for owner, part in zip(owners, parts, strict=True):
            assert part is not None
            grouped[owner].append(part)
        return [Memory.concatenate(group) for group in grouped]

    @overload
    def regenerate(self, memories: Memory, **options: Any) -> str: ...
    @overload
    def regenerate(self, memories: Sequence[Memory], **options: Any) -> list[str]: ...

    def regenerate(self, memories: Memory | Sequence[Memory], **options: Any) -> str | list[str]:
        """Write the passages back from their memories, adapters off; see `generation.regenerate`."""
        from compressor import generation

        single = isinstance(memories, Memory)
        with self.adapters(on=False):
            texts = generation.regenerate(self.base, [memories] if single else memories, **options)  # type: ignore[list-item,arg-type]
        return texts[0] if single else texts

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """Adapter weights and memory tokens by parameter name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write adapter, memory tokens, settings and a card, never base weights, atomically.

        Args:
            folder: replaced if it exists.
            dtype: round the trained weights to this type; by default they are kept as they are (float32).
        """
        with atomic_path(folder) as path:
            path.mkdir()
            # "auto" would ask the hub whether the base's vocabulary changed, at every checkpoint.
            self.peft.save_pretrained(str(path), save_embedding_layers=False)
            # PEFT lists the layers in the order of a set: sorted, the same training gives the same files.
            adapter = read_json(path / "adapter_config.json")
            adapter["target_modules"] = sorted(adapter["target_modules"])
            adapter["base_model_name_or_path"] = self._public_base_name()
            write_json(path / "adapter_config.json", adapter)
            memory = self.memory_embeddings.detach().to(dtype=dtype).contiguous()
            save_file({"memory_embeddings": memory}, path / "memory_tokens.safetensors")
            if dtype is not None:
                weights = load_file(path / "adapter_model.safetensors")
                rounded = {name: weight.to(dtype) for name, weight in weights.items()}
                save_file(rounded, path / "adapter_model.safetensors", metadata={"format": "pt"})
            (path / "README.md").write_text(self._card())
            write_json(
                path / "compressor.json",
                {
                    "format": FORMAT,
                    "version": compressor.__version__,
                    "base": self._base_record(),
                    "config": asdict(self.config),
                    "files": {
                        name: sha256(path / name) for name in ("adapter_model.safetensors", "memory_tokens.safetensors")
                    },
                },
            )

    def _public_base_name(self) -> str:
        """The base's path or hub id; of an absolute path, which names folders of this machine, the last part."""
        return Path(self.base.name).name if Path(self.base.name).is_absolute() else self.base.name

    def _base_record(self) -> dict[str, Any]:
        """What finds and loads the base again with the same weights."""
        base = self.base
        record = {
            "path": base.name,
            "fingerprint": base.fingerprint,
            "quantisation": base.quantisation,
            "revision": base.revision,
        }
        if base.quantisation != "none":
            # The type weights had when they were quantised is part of what is kept of them.
            record["dtype"] = str(base.dtype).removeprefix("torch.")
        return record

    def _card(self) -> str:
        trainable = sum(p.numel() for p in self.trainable_state().values())
        return (
            "---\nlibrary_name: peft\ntags: [prompt-compression]\n---\n# KV prompt compressor\n\n"
            f"{self.config.memory_tokens} memory tokens, layout `{self.config.layout}`, "
            f"{self.config.passage_attention} passage attention, LoRA rank {self.config.lora_rank}; "
            f"{trainable:,} trained parameters.\n\n"
            f"Base: `{self._public_base_name()}` (weights {self.base.fingerprint[:12]}).\n"
        )

    def load_trainable(self, folder: str | Path) -> None:
        """Read adapter and memory tokens that `save_pretrained` wrote into this compressor, exactly."""
        folder = Path(folder)
        settings = read_settings(folder)
        state = {}
        for name, digest in settings["files"].items():
            try:
                if sha256(folder / name) != digest:
                    raise CompressorError(f"{folder / name} is damaged: its checksum differs from compressor.json's")
                state.update(load_file(folder / name))
            except (OSError, SafetensorError) as error:
                raise CompressorError(f"{folder / name} is missing or damaged: {error}") from None
        wanted = self.trainable_state()
        found = {_parameter_name(key): value for key, value in state.items()}
        if set(found) != set(wanted) or any(found[name].shape != wanted[name].shape for name in wanted):
            odd = sorted(set(found) ^ set(wanted))[:3] or "shapes"
            raise CompressorError(f"checkpoint {folder} does not fit its own settings and base (differs in: {odd})")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name in found:
                    parameter.copy_(found[name])

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        base: Base | str | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        attention: str = "sdpa",
        quantisation: str | None = None,
    ) -> Compressor:
        """Load a checkpoint.

        Args:
            path: folder or hub id.
            base: the frozen base or its path; by default the one named in the checkpoint, also looked for beside it.
            device, dtype: where and how to hold the base. A base quantised as the checkpoint says keeps the type it
                was quantised from.
            revision: hub revision of the checkpoint.
            attention: attention implementation of the base.
            quantisation: of the base; by default as it was in training.

        Raises:
            CompressorError: no such checkpoint, a damaged one, or another base than it was trained with.
        """
        folder = _fetch(str(path), revision)
        settings = read_settings(folder)
        trained_on = settings["base"]
        if not isinstance(base, Base):
            name = base or trained_on["path"]
            if base is None and not Path(resolve(name)).exists() and (folder.parent / "base").exists():
                name = str(folder.parent / "base")
            if quantisation is None:
                quantisation = trained_on.get("quantisation", "none")
                dtype = trained_on.get("dtype", dtype)
            chosen = BaseConfig(
                path=name,
                revision=trained_on.get("revision") if name == trained_on["path"] else None,
                dtype=dtype,  # type: ignore[arg-type]
                attention=attention,  # type: ignore[arg-type]
                quantisation=quantisation,  # type: ignore[arg-type]
            )
            base = load_base(chosen, device)
        if base.fingerprint != trained_on["fingerprint"]:
            raise CompressorError(
                f"checkpoint {path} was trained on the base {trained_on['path']} "
                f"(weights {trained_on['fingerprint'][:12]}, quantisation {trained_on.get('quantisation', 'none')}) "
                f"but {base.name} has weights {base.fingerprint[:12]} (quantisation {base.quantisation}): "
                "give the right base"
            )
        model = cls(base, CompressorConfig(**settings["config"]))
        model.load_trainable(folder)
        return model.eval()


def read_settings(folder: Path) -> dict[str, Any]:
    """`compressor.json` of a checkpoint, checked."""
    path = folder / "compressor.json"
    if not path.exists():
        raise CompressorError(f"{folder} is not a compressor checkpoint: it has no compressor.json")
    settings = read_json(path)
    kinds = {"format": int, "base": dict, "config": dict, "files": dict}
    wrong = [
        key for key, kind in kinds.items() if not isinstance(settings, dict) or not isinstance(settings.get(key), kind)
    ]
    if wrong or not {"path", "fingerprint"} <= set(settings["base"]):
        raise CompressorError(f"{path} lacks a proper {', '.join(wrong) or 'base'}; it may be damaged")
    if settings["format"] > FORMAT:
        raise CompressorError(
            f"{path} has format {settings['format']}, this version reads up to {FORMAT}: update the package"
        )
    missing = [name for name in NEEDED_SETTINGS if name not in settings["config"]]
    if missing:
        raise CompressorError(
            f"{path} has no {', '.join(missing)} in its config; it may be damaged: take the checkpoint from its source"
        )
    try:
        CompressorConfig(**settings["config"])
    except (TypeError, CompressorError) as error:
        raise CompressorError(
            f"{path} has settings this version does not know ({error}): update the package, or take the checkpoint "
            "from its source"
        ) from None
    return settings


def encoder_attention(lengths: Tensor, width: int, tokens: int, bidirectional: bool) -> Tensor:
    """Who may attend to whom in `passage ; memory tokens`.

    Passage tokens see the passage (causally or both ways); memory tokens see the passage and, causally, each other, so
    that the first j of k do not depend on the rest. Padding sees only itself, to keep its softmax finite.

    Returns:
        bool `[batch, width + tokens, width + tokens]`.
    """
    total = width + tokens
    index = torch.arange(total, device=lengths.device)
    real = (index[None] < lengths[:, None]) | (index[None] >= width)
    allowed = index[:, None] >= index[None, :]
    if bidirectional:
        allowed = allowed | ((index[:, None] < width) & (index[None, :] < width))
    return (allowed[None] & real[:, None, :]) | torch.eye(total, dtype=torch.bool, device=lengths.device)[None]


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", fill: int = 0, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Right-pad token ids: int64 `[batch, width]`, the width a multiple of `multiple`, and lengths, int64 `[batch]`."""
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    width = -(-int(lengths.max()) // multiple) * multiple
    padded = torch.full((len(sequences), width), fill, dtype=torch.int64)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return padded.to(device), lengths.to(device)


def _initial_memory(base: Base, config: CompressorConfig) -> Tensor:
    """Initial memory tokens, float32 `[memory_tokens, hidden]`."""
    noise = torch.randn(config.memory_tokens, base.hidden)
    if config.initialisation == "normal":
        return noise
    table = base.embeddings.weight.detach()
    sample = table[:: max(1, len(table) // 4096)].float().cpu()
    return sample.mean(0) + noise * sample.std(0)


def _parameter_name(key: str) -> str:
    """Name of a parameter of `Compressor` from its name in a PEFT file."""
    if key == "memory_embeddings":
        return key
    # The base is registered before PEFT's wrapper, so that the layers they share go by its names.
    return "base." + re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", key.removeprefix("base_model."))


def _fetch(path: str, revision: str | None) -> Path:
    """The folder of a checkpoint, downloaded if `path` is a hub id."""
    if Path(resolve(path)).is_dir():
        return Path(resolve(path))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise CompressorError(
            f"no compressor checkpoint at {path!r}: it is neither a folder nor a hub repository that can be reached "
            f"({type(error).__name__})"
        ) from None
