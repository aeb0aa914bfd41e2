"""What is in a memory file, a store or a calibration, and where its bytes go (`compressor inspect`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.storage import container
from compressor.storage import memory_file as artifact
from compressor.storage.calibration import Calibration
from compressor.storage.memory_table import is_store
from compressor.storage.store import Store


def byte_ledger(path: str | Path) -> dict[str, int]:
    """Bytes of a memory file: `header`, `memory` (keys and values) and `text` (0 if it is not kept).

    Raises:
        CompressorError: see `load_memory`.
    """
    content = artifact.read(path)
    text = content.tensors[artifact.TEXT].nbytes if artifact.TEXT in content.tensors else 0
    memory = content.total_bytes - content.header_bytes - text
    return {"header": content.header_bytes, "memory": memory, "text": text}


def describe(path: str | Path) -> str:
    """What is in a memory file, a store or a calibration, and where its bytes go.

    Raises:
        CompressorError: none of these, or damaged.
    """
    try:
        return _described(path)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        if isinstance(error, CompressorError):
            raise
        raise CompressorError(f"{path} is damaged: its header does not describe its content ({error!r})") from None


def _described(path: str | Path) -> str:
    if is_store(path):
        store = Store.open(path)
        fidelities, origins, sizes, tokens, coded = store.columns("fidelity", "source", "bytes", "tokens", "coded")
        head, size = f"store of {len(sizes):,} memories", sum(sizes)
        kept = "kept" if store.manifest["keep_text"] else "not kept"
        rows = _origin(store.manifest) | {"tokens": f"{sum(tokens):,} of text, which is {kept}"}
        rows["found by"] = store.manifest["encoder"]["name"]
        if shares := sorted(share for share in fidelities if share is not None):
            middle = shares[len(shares) // 2]
            rows["comes back"] = f"{middle:.1%} of a text (median of {len(shares):,}), at least {shares[0]:.1%}"
        for source in (json.loads(one) for one in dict.fromkeys(origins) if one):
            name, text = f"from {source['name']}", f"{source['records']:,} records {source['sha256'][:12]}"
            rows[name] = f"{rows[name]}; {text}" if name in rows else text
        files = sum(one.stat().st_size for one in Path(path).rglob("*") if one.is_file())
        ledger = {"memories": sum(coded), "other": files - sum(coded)}
    elif Path(path).is_dir():
        raise CompressorError(f"{path} is a folder and no store: name a store, a memory file or a calibration")
    elif container.kind(path) == "calibration":
        found = Calibration.load(path)
        head, size = f"calibration {found.digest[:12]}, fitted on {found.passages:,} passages", 0
        rows = {"base": f"weights {found.base[:12]}", "compressor": _compressor(found.compressor)}
        rows |= {"tokens": f"{found.slots} of {found.most}, layout {found.layout}"}
        ledger = {"file": Path(path).stat().st_size}
    else:
        settings, ledger = artifact.read(path).settings, byte_ledger(path)
        counts = [sum(part[place] for part in settings["segments"]) for place in (0, 1)]
        head = f"memory, format {settings['format']}, written by version {settings['version']}; its checksum fits"
        rows = _origin(settings) | {
            "tokens": f"{counts[1]:,} of text in {counts[0]} memory tokens, {len(settings['segments'])} segment(s)"
        }
        if settings.get("fidelity") is not None:
            rows["comes back"] = f"{settings['fidelity']:.1%} of the text"
        size = settings["passage_bytes"] or 0
    total = sum(ledger.values())
    rows |= {name: f"{count:,} bytes" for name, count in ledger.items()} | {"total": f"{total:,} bytes"}
    if size:
        rows["passages"] = f"{size:,} bytes; {total / size:,.{0 if total > 99 * size else 3}f} bytes a byte of text"
    width = max(map(len, rows), default=0) + 2
    return "\n".join([f"{path}: {head}", *(f"  {name:<{width}}{text}" for name, text in rows.items())])


def _compressor(name: str | None) -> str:
    """A compressor's name and the beginning of its hash, from `NAME@SHA256`."""
    stem, _, digest = (name or "not recorded").partition("@")
    return f"{stem} (weights {digest[:12]})" if digest else stem


def _origin(settings: dict[str, Any]) -> dict[str, str]:
    """Base, compressor, layout and codec, a line each."""
    base, codec = settings["base"], settings["codec"]
    coder = "" if codec["coder"] == "none" else f"+{codec['coder']}"
    rate = f":{codec['rate']:g}" if "rate" in codec else ""  # files of before it was noted have none
    fitted = f", calibration {codec['calibration'][:12]}" if codec["calibration"] else ""
    layers, heads, size = settings["shape"]
    return {
        "base": f"{base['name'] or 'unnamed'} (weights {base['weights'][:12]})",
        "compressor": _compressor(settings["compressor"]),
        "layout": f"{settings['layout']}, up to {settings['most']} memory tokens a segment",
        "shape": f"{layers} layers x {heads} heads x {size}, made in {settings['dtype']}",
        "codec": f"{codec['name']}{rate}{coder}{fitted}",
        **({"made with": ", ".join(f"{k} {v}" for k, v in settings["made"].items())} if "made" in settings else {}),
    }
