"""Checkpoints of a compressor: a folder of settings, PEFT adapter, encoder weights and a card; never base weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import CompressorError, as_path, require
from compressor.files import FolderKind, atomic_folder, bundled, read_json, sha256, unreadable, write_json
from compressor.model.base import Base
from compressor.model.bases import NAMED
from compressor.model.card import model_card
from compressor.model.config import BaseConfig, BaseMismatch, CompressorConfig, Decoding
from compressor.model.fingerprints import public_name
from compressor.model.load import load_base
from compressor.model.lora import READER
from compressor.processes import check_dtype
from compressor.progress import note_once
from compressor.provenance import VERSION

if TYPE_CHECKING:
    from compressor.model.network import Network

FORMAT = 1
NEEDED_SETTINGS = ("memory_tokens", "layout", "passage_attention", "lora_rank", "lora_alpha")
"""Settings without which a checkpoint would be read as another compressor."""
ADDED_SETTINGS = {"memory_attention": "passage", "writer_rank": 0}
"""What checkpoints from before there were such settings are."""
TEXT_ENCODER = "text_encoder"
"""Setting with the fingerprint of a frozen text encoder."""
AGAIN = "take the checkpoint from its source again"
ADAPTER, ENCODER = "adapter_model.safetensors", "memory_tokens.safetensors"
CHECKPOINT = FolderKind(
    "a compressor checkpoint",
    (
        "compressor.json",
        ENCODER,
        *(f"{part}{name}" for part in ("", "writer/") for name in ("adapter_config.json", ADAPTER, "README.md")),
    ),
)


def compressor_fingerprint(network: Network, settings: bool = False) -> str:
    """SHA-256 over the names, shapes and values of a compressor's trained weights, and, if asked for, its settings."""
    digest = hashlib.sha256(json.dumps(asdict(network.config), sort_keys=True).encode() if settings else b"")
    for name, tensor in sorted(network.trainable_state().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compressor_name(network: Network, checkpoint: str) -> str:
    """What memory files call a compressor: `NAME@SHA256`."""
    return f"{public_name(checkpoint)}@{compressor_fingerprint(network)}"


def save_checkpoint(
    model: Network, folder: str | Path, dtype: torch.dtype | None = None, about: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint folder, atomically; see `Compressor.save_pretrained`, which says what is known `about` it."""
    if dtype is not None:
        check_dtype(dtype)
    with atomic_folder(folder, CHECKPOINT) as path:
        files = [ENCODER]
        if model.peft is not None:
            # "auto" would ask the hub whether the base's vocabulary changed, at every checkpoint.
            model.peft.save_pretrained(str(path), save_embedding_layers=False)
            for name in model.peft.peft_config:
                part = path if name == READER else path / name  # as PEFT has it
                # PEFT lists the layers in the order of a set: sorted, the same training gives the same files.
                adapter = read_json(part / "adapter_config.json")
                adapter["target_modules"] = sorted(adapter["target_modules"])
                adapter["base_model_name_or_path"] = public_name(model.base.name)
                write_json(part / "adapter_config.json", adapter)
                if dtype is not None:
                    weights = load_file(part / ADAPTER)
                    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
                    save_file(rounded, part / ADAPTER, metadata={"format": "pt"})
                files.append((part / ADAPTER).relative_to(path).as_posix())
        state = {name: value.to(dtype=dtype).contiguous() for name, value in model.encoder.state_dict().items()}
        save_file(state, path / ENCODER)
        trained = sum(weight.numel() for weight in model.trainable_state().values())
        settings = {
            "format": FORMAT,
            "version": VERSION,
            "base": _base_record(model.base),
            "config": asdict(model.config),
            "files": {name: sha256(path / name) for name in files},
            "parameters": {"trained": trained, "base": sum(p.numel() for p in model.parameters()) - trained},
            "about": dict(about or {}),
            **({} if model.encoder.frozen_fingerprint is None else {TEXT_ENCODER: model.encoder.frozen_fingerprint}),
        }
        (path / "README.md").write_text(model_card(settings), encoding="utf-8")
        write_json(path / "compressor.json", settings)


def _base_record(base: Base) -> dict[str, Any]:
    """What finds and loads the base again with the same weights."""
    record = {
        "path": base.name,
        "fingerprint": base.fingerprint,
        "quantisation": base.quantization,
        "revision": base.revision,
    }
    if base.quantization != "none":
        # The type weights had when they were quantised is part of what is kept of them.
        record["dtype"] = base.dtype_name
    return record


def load_weights(model: Network, folder: Path) -> None:
    """Read adapter and encoder that `save_checkpoint` wrote into `model`, exactly.

    Raises:
        CompressorError: a missing or damaged file, or one that does not fit the model.
    """
    settings = read_settings(folder)
    if (trained := settings.get(TEXT_ENCODER)) and trained != model.encoder.frozen_fingerprint:
        raise CompressorError(
            f"checkpoint {folder} was trained with another text encoder (weights {str(trained)[:12]}) than "
            f"{model.config.text_encoder} now holds (weights {str(model.encoder.frozen_fingerprint)[:12]}): put the "
            "one it was trained with there"
        )
    found: dict[str, Tensor] = {}
    for name, digest in settings["files"].items():
        try:
            if sha256(folder / name) != digest:
                raise CompressorError(
                    f"{folder / name} is damaged: its checksum differs from compressor.json's; {AGAIN}"
                )
            state = load_file(folder / name)
        except PermissionError as error:
            raise unreadable(folder / name, error) from None
        except FileNotFoundError:
            raise CompressorError(f"{folder / name} is missing; {AGAIN}") from None
        except (OSError, SafetensorError) as error:
            raise CompressorError(f"{folder / name} is damaged: {error}; {AGAIN}") from None
        if Path(name).name == ADAPTER:
            which = READER if name == ADAPTER else Path(name).parent.name
            found.update({_adapter_parameter(key, which): value for key, value in state.items()})
        else:
            found.update({f"encoder.{key}": value for key, value in state.items()})
    wanted = model.trainable_state()
    if set(found) != set(wanted) or any(found[name].shape != wanted[name].shape for name in wanted):
        odd = sorted(set(found) ^ set(wanted))[:3] or "shapes"
        raise CompressorError(f"checkpoint {folder} does not fit its own settings and base (differs in: {odd})")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.copy_(found[name])


def _adapter_parameter(key: str, which: str) -> str:
    """Name of a parameter of `Network` from its name in the PEFT file of an adapter."""
    # The base is registered before PEFT's wrapper, so that the layers they share go by its names.
    return "base." + re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{which}.weight", key.removeprefix("base_model."))


def base_of(folder: Path, named: str) -> str:
    """The base a checkpoint names, or the one beside it if that is not here."""
    known = named in NAMED or Path(bundled(named)).exists()
    return named if known or not (folder.parent / "base").exists() else str(folder.parent / "base")


def find_base(
    path: str | Path,
    base: Base | str | None,
    device: str | torch.device,
    dtype: str,
    revision: str | None = None,
    attention: str = "auto",
    quantization: str | None = None,
    base_mismatch: str = "refuse",
    decoding: str = "auto",
) -> tuple[Path, Base]:
    """A checkpoint's folder and the base it was trained on, loaded; arguments as for `Compressor.from_pretrained`."""
    require(decoding in get_args(Decoding), "decoding", decoding, f"one of {', '.join(get_args(Decoding))}")
    folder = fetch_checkpoint(str(path), revision)
    trained_on = read_settings(folder)["base"]
    if not isinstance(base, Base):
        name = str(as_path(base)) if base else base_of(folder, trained_on["path"])
        if quantization is None:
            quantization = trained_on.get("quantisation", "none")
            dtype = trained_on.get("dtype", dtype)
        chosen = BaseConfig(
            path=name,
            revision=trained_on.get("revision") if name == trained_on["path"] else None,
            dtype=dtype,  # type: ignore[arg-type]
            attention=attention,  # type: ignore[arg-type]
            quantization=quantization,  # type: ignore[arg-type]
        )
        base = load_base(chosen, device)
    check_fingerprint(path, trained_on, base, base_mismatch)
    if decoding != "auto":  # a base that is given keeps its own
        base.decoding = decoding
    return folder, base


def check_fingerprint(checkpoint: str | Path, trained_on: dict[str, Any], base: Base, mismatch: str) -> None:
    """See to it that a base has the weights that a checkpoint was trained on, by the checkpoint's record of them.

    Args:
        mismatch: `refuse` or `allow`, which warns: weights that are nearly the same (a base before it was quantised, a
            later version of it) read and write memories nearly as well.

    Raises:
        CompressorError: other weights, unless they are allowed.
    """
    require(mismatch in get_args(BaseMismatch), "base_mismatch", mismatch, " or ".join(get_args(BaseMismatch)))
    if base.fingerprint == trained_on["fingerprint"]:
        return
    found = (
        f"checkpoint {checkpoint} was trained on the base {trained_on['path']} "
        f"(weights {trained_on['fingerprint'][:12]}, quantization {trained_on.get('quantisation', 'none')}) "
        f"but {base.name} has weights {base.fingerprint[:12]} (quantization {base.quantization})"
    )
    if mismatch == "allow":
        note_once(f"warning: {found}: what comes back may be worse")
        return
    name = trained_on["path"]
    get = f" (`compressor fetch {name}` gets it)" if name in NAMED else ""
    raise CompressorError(
        f"{found}: give the base that it was trained on{get}, or take this one all the same with --base-mismatch allow"
    )


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
        raise CompressorError(f"{path} has no {', '.join(missing)} in its config; it may be damaged; {AGAIN}")
    for name, before in ADDED_SETTINGS.items():
        settings["config"].setdefault(name, before)
    try:
        CompressorConfig(**settings["config"])
    except (TypeError, CompressorError) as error:
        raise CompressorError(
            f"{path} has settings this version does not know ({error}): update the package, or {AGAIN}"
        ) from None
    return settings


def fetch_checkpoint(path: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if `path` is a hub id."""
    if Path(bundled(path)).is_dir():
        return Path(bundled(path))
    if Path(path).exists():
        raise CompressorError(
            f"{path} is a file, and a checkpoint is a folder: name the folder with its compressor.json"
        )
    from huggingface_hub import snapshot_download  # start-up

    try:
        return Path(snapshot_download(path, revision=revision))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise CompressorError(
            f"no compressor checkpoint at {path!r}: there is no such folder, and no repository of that name could be "
            f"had from the hub ({type(error).__name__}). Give a folder that training wrote, or USER/NAME of the hub"
        ) from None
