"""What is in a memory file, a collection or a calibration, and where its bytes go (`compressor inspect`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.codecs import artifact, container
from compressor.codecs.calibration import Calibration
from compressor.codecs.collection import Collection, is_collection
from compressor.errors import CompressorError
from compressor.memory import Memory


def values_of(settings: Mapping[str, Any]) -> int:
    """Keys and values of the memory that a file's settings describe."""
    tokens = sum(count for count, _ in settings["segments"])
    layers, heads, size = settings["shape"]
    return 2 * layers * heads * tokens * size


def byte_ledger(path: str | Path) -> dict[str, int]:
    """Where the bytes of a memory file are: `header`, `layer 0` ... or `all layers`, in the order of the file.

    The calibration is not needed. Entries sum to the size of the file.

    Raises:
        CompressorError: see `load_memory`.
    """
    if artifact.format_of(path) == 1:
        memory = Memory.load(path)
        layers = memory.keys.shape[0]
        ledger = {"header": Path(path).stat().st_size - memory.nbytes}
        return ledger | {f"layer {layer}": memory.nbytes // layers for layer in range(layers)}
    content = container.read(path, "memory", artifact.WHAT, artifact.FORMAT)
    ledger = {"header": content.header_bytes}
    try:
        record, layers = content.settings["codec"], content.settings["shape"][0]
        text = content.tensors.get(artifact.TEXT)
        kept_text = {} if text is None else {artifact.TEXT: text.nbytes}
        kept = [
            layer
            for layer in range(artifact.whole(layers, 1, artifact.MOST_LAYERS))
            if layer not in record["drop_layers"]
        ]
        if record["name"] == "lowrank":
            coded = content.total_bytes - content.header_bytes - sum(kept_text.values())
            return ledger | {"all layers": coded} | kept_text
        sizes = record.get("sizes", [0] * len(kept))
        own = ("payload", artifact.TEXT)
        shared = sum(t.nbytes // len(kept) for name, t in content.tensors.items() if name not in own)
        for place, layer in enumerate(kept):
            ledger[f"layer {layer}"] = shared + int(sizes[place])
        ledger |= kept_text
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CompressorError(f"{path} is damaged: its header does not describe a memory ({error!r})") from None
    return ledger


def describe(path: str | Path) -> str:
    """What is in a memory file, a collection or a calibration, and where its bytes go.

    Raises:
        CompressorError: none of these, or damaged.
    """
    if is_collection(path):
        kind = _describe_collection
    elif container.kind(path) == "calibration":
        kind = _describe_calibration
    else:
        kind = _describe_memory
    try:
        return kind(path)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, CompressorError):
            raise
        raise CompressorError(f"{path} is damaged: its header does not describe its content ({error!r})") from None


def _describe_memory(path: str | Path) -> str:
    ledger = byte_ledger(path)
    settings = container.read_header(path, "memory", "a memory file")[0]
    lines = [f"{path}: memory, format {settings['format']}, written by version {settings.get('version', 'unknown')}"]
    lines += _origin(settings)
    segments = settings["segments"]
    tokens, passage = sum(k for k, _ in segments), sum(n for _, n in segments)
    lines.append(_row("tokens", f"{passage:,} of text in {tokens} memory tokens, {len(segments)} segment(s)"))
    if settings.get("fidelity") is not None:
        lines.append(_row("comes back", f"{settings['fidelity']:.1%} of the text"))
    lines += [_row("checksum", f"{settings['sha256'][:12]}, fits"), "bytes"]
    total = sum(ledger.values())
    values = values_of(settings) if "shape" in settings else 2 * Memory.load(path).keys.numel()
    lines += [_row(name, f"{count:>10,}") for name, count in ledger.items()]
    lines.append(_row("total", f"{total:>10,}  ({8 * total / values:.3f} bits a value, {values:,} values)"))
    if settings.get("passage_bytes"):
        size = settings["passage_bytes"]
        lines.append(_row("passage", f"{size:>10,}  ({total / size:.3f} bytes per passage byte)"))
    return "\n".join(lines)


def _describe_collection(path: str | Path) -> str:
    collection = Collection(path)
    ledger = collection.ledger()
    count, shards = ledger.pop("memories"), ledger.pop("shards")
    tokens, size = ledger.pop("passage_tokens"), ledger.pop("passage_bytes")
    total = sum(ledger.values())
    lines = [f"{path}: collection of {count:,} memories in {shards:,} shards"]
    lines += [*_origin(collection.settings), _row("tokens", f"{tokens:,} of text")]
    for source in collection.sources():
        used = "".join(f", {key} {source[key]}" for key in ("field", "limit") if source.get(key) is not None)
        lines.append(_row("source", f"{source['name']}{used}: {source['records']:,} records {source['sha256'][:12]}"))
    if shares := sorted(collection.fidelities().values()):
        middle, count_of = shares[len(shares) // 2], f"{len(shares):,} memories"
        lines.append(_row("comes back", f"{middle:.1%} of a text (median of {count_of}), at least {shares[0]:.1%}"))
    lines.append("bytes")
    lines += [_row(name, f"{size_of:>14,}") for name, size_of in ledger.items()]
    each = f"  ({(total - ledger['calibration']) / max(1, count):,.0f} a memory without calibration)"
    lines.append(_row("total", f"{total:>14,}{each}"))
    stored = ledger["headers"] + ledger["payload"]
    lines.append(_row("passages", f"{size:>14,}  ({stored / max(1, size):.3f} bytes per passage byte)"))
    return "\n".join(lines)


def _describe_calibration(path: str | Path) -> str:
    found = Calibration.load(path)
    shown = list(zip(found.levels, found.rates, strict=True))[:: max(1, len(found.levels) // 8)]
    return "\n".join(
        [
            f"{path}: calibration {found.digest[:12]}, fitted on {found.passages:,} passages",
            _row("base", f"weights {found.base[:12]}"),
            _row("compressor", found.compressor or "not recorded"),
            _row("tokens", f"{found.slots} of {found.most}, layout {found.layout}"),
            _row(
                "rank", f"{len(found.transform.codes)} principal components of {found.transform.synthesis.shape[1]:,}"
            ),
            _row("lowrank", "bits a value " + ", ".join(f"{rate:.3f}" for _, rate in shown)),
            _row("total", f"{Path(path).stat().st_size:,} bytes"),
        ]
    )


def _origin(settings: dict[str, Any]) -> Sequence[str]:
    """Lines about base, tokenizer, compressor, layout and codec."""
    base = settings["base"]
    if isinstance(base, str):  # format 1
        return [_row("base", f"weights {base[:12]}"), _row("layout", settings["layout"]), _row("codec", "as held")]
    codec = settings["codec"]
    coder = "" if codec["coder"] == "none" else f"+{codec['coder']}"
    fitted = f", calibration {codec['calibration'][:12]}" if codec["calibration"] else ""
    dropped = f", without layers {codec['drop_layers']}" if codec["drop_layers"] else ""
    layers, heads, size = settings["shape"]
    return [
        _row("base", f"{base['name'] or 'unnamed'} (weights {base['weights'][:12]})"),
        _row("tokenizer", settings["tokenizer"][:12] or "not recorded"),
        _row("compressor", settings["compressor"] or "not recorded"),
        _row("layout", f"{settings['layout']}, up to {settings['most']} memory tokens a segment"),
        _row("shape", f"{layers} layers x {heads} heads x {size}, made in {settings['dtype']}"),
        _row("codec", f"{codec['name']}{coder}{fitted}{dropped}"),
        *(
            [_row("made with", ", ".join(f"{k} {v}" for k, v in settings["made"].items()))]
            if "made" in settings
            else []
        ),
    ]


def _row(name: str, text: str) -> str:
    return f"  {name:<12}{text}"
