"""Where a store is, and what all its memories have in common: the manifest in its table's schema."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.files import owned

TABLE = "memories"


def text_hash(text: str) -> str:
    """Short hash that tells whether an id still stands for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a place on object storage."""
    return "://" in str(path)


def is_store(path: str | Path) -> bool:
    """Whether there is a store in the folder `path`, or it is a place on object storage."""
    return is_remote(path) or (Path(path) / f"{TABLE}.lance").is_dir()


def owned_store(path: str | Path) -> AbstractContextManager[None]:
    """`files.owned`; on object storage commits follow one another, and who writes is the users' to see to."""
    return nullcontext() if is_remote(path) else owned(path)


def compare(before: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    """Raise a `CompressorError` unless both manifests describe memories of one store; names may differ, hashes not."""

    def flat(settings: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in settings.items():
            found |= {f"{key}.{k}": f"{v}" for k, v in value.items()} if isinstance(value, dict) else {key: f"{value}"}
        del found["version"]
        found.pop("codec.drop_layers", None)  # of stores before 0.2.0
        return found | {key: f"{found.pop(key + '.name')}@{found.pop(key + '.weights')}" for key in ("base", "encoder")}

    old, new = flat(before), flat(now)
    what = ", ".join(
        f"{key}: {old.get(key, 'not recorded')}, now {new.get(key, 'not recorded')}"
        for key in sorted(old | new)
        if old.get(key, "").rpartition("@")[2] != new.get(key, "").rpartition("@")[2]
    )
    if what:
        short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", what)
        raise CompressorError(
            f"{path} is a store made with other settings ({short}): give the same to go on with it, or a new folder"
        )
