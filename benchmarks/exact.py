"""Exact regeneration: bytes of the residual against memory tokens, memory and residual against lossless coding.

    python benchmarks/exact.py --calibration outputs/calibration.safetensors --output results/exact.json

The same unseen passages, cut to a length, are compressed to k memory tokens, stored by each codec and given a residual;
the row without tokens is the same coder without a memory. Sizes are bytes a passage, means with bootstrap intervals: of
the coded text alone, of the residual (with its checks), of the memory as `compressor pack --codec exact` stores it, of
that file, and of the memory file of `compressor compress --exact`. Beside them stand `compressor pack`, zstd -19 and
xz -9e on the same passages, and the positions of a decoder's context that a passage takes. `--verify` passages of each
row are restored and compared.
"""

from __future__ import annotations

import lzma
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.codecs.blocks import TEXT, zstandard
from compressor.codecs.calibration import Calibration
from compressor.codecs.codec import Codec
from compressor.codecs.command import CalibrateOptions, Progress, calibrate_codecs
from compressor.codecs.exact import IDENTITY_BYTES
from compressor.codecs.lossless import pack_bytes
from compressor.codecs.residual import as_stored, encode_residual, exact_base, parts, restore_texts, segments_of
from compressor.codecs.text import OVERHEAD, Needs, pack_texts, text_codec
from compressor.codecs.text_codecs import ExactCodec
from compressor.codecs.token_coder import encode_tokens
from compressor.data.records import load_texts
from compressor.errors import CompressorError, exits_cleanly
from compressor.evaluation.metrics import bootstrap, ratio
from compressor.files import write_json
from compressor.memory import Memory
from compressor.model import Compressor
from compressor.parsing import parse_config
from compressor.provenance import run_record


@dataclass
class Options:
    """What the benchmark takes."""

    output: str
    """JSON file to write."""
    checkpoint: str = "models/arxiv-mini/compressor"
    data: str = "arxiv-test"
    lengths: list[int] = field(default_factory=lambda: [96, 192])
    """Passages of at least so many tokens are cut to them."""
    tokens: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1])
    """Memory tokens."""
    codecs: list[str] = field(
        default_factory=lambda: ["bf16", "int4+ans", "lowrank:0.4", "lowrank:0.2", "lowrank:0.1", "lowrank:0.05"]
    )
    """How the memory is stored."""
    calibration: str | None = None
    """What `compressor calibrate` wrote, for lowrank; by default it is fitted on arxiv-train first."""
    limit: int = 50
    """Passages of each length."""
    verify: int = 2
    """Passages of each row that are restored and compared."""


def fitted(options: Options, folder: Path) -> Calibration:
    """The calibration that was named, or one fitted now."""
    if options.calibration is None:
        path = folder / "calibration.safetensors"
        calibrate_codecs(CalibrateOptions(str(path), checkpoint=options.checkpoint, limit=300))
        return Calibration.load(path)
    return Calibration.load(options.calibration)


def row_of(columns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Means over passages, with their intervals."""
    count = len(columns["text"])
    found = bootstrap({"passages": np.ones(count), **columns}, {name: ratio(name, "passages") for name in names})
    row: dict[str, Any] = {"n": count}
    for name, one in found.items():
        row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return row


def measure(model: Compressor, calibration: Calibration, options: Options, length: int) -> list[dict[str, Any]]:
    """Rows of one length."""
    tokenizer, exact = model.base.tokenizer, exact_base(model.base)
    encoded = tokenizer(list(load_texts(options.data)["text"]), add_special_tokens=False, verbose=False)["input_ids"]
    cut = [list(ids[:length]) for ids in encoded if len(ids) >= length]
    # Only text that tokenises to itself is a passage: cutting may leave half a character.
    texts = [text for text in tokenizer.batch_decode(cut) if "\ufffd" not in text][: options.limit]
    if not texts:
        raise CompressorError(f"{options.data} has no passage of {length} tokens: give shorter --lengths")
    ids = [list(one) for one in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    data = [text.encode() for text in texts]
    sizes = [len(one) for one in data]
    plain = [len(one) for one in encode_tokens(exact, None, ids)]
    zstd = zstandard().ZstdCompressor(level=19)
    columns = {
        "text": sizes,
        "coded": plain,
        "pack": [len(pack_bytes(one, exact)) for one in data],
        "zstd": [len(zstd.compress(one)) for one in data],
        "xz": [len(lzma.compress(one, preset=9 | lzma.PRESET_EXTREME)) for one in data],
        "decoder_tokens": [len(one) for one in ids],
    }
    rows = [{"length": length, "tokens": None, "codec": None, **row_of(columns, list(columns))}]
    print(f"{length} tokens, no memory: {rows[0]['coded']:.1f} bytes; pack {rows[0]['pack']:.1f}", flush=True)
    progress = Progress(len(options.tokens) * len(options.codecs), f"codecs, {length} tokens")
    for tokens in options.tokens:
        memories = model.compress_ids(ids, tokens)
        for name in options.codecs:
            codec = Codec.parse(name, calibration)
            needs = Needs(lambda: exact, memory_codec=name, load_calibration=lambda: calibration)
            writer = ExactCodec(needs)
            coded: list[Memory] = []
            columns = {key: [] for key in ("residual", "coded", "memory", "packed", "file", "as_tokens")} | {
                "text": sizes
            }
            with tempfile.TemporaryDirectory() as folder:
                for text, one, memory in zip(texts, ids, memories, strict=True):
                    stored = as_stored(memory, codec)
                    residual = encode_residual(exact, text, segments_of(one, stored), stored)
                    coded.append(replace(stored, residual=residual))
                    body = len(writer.encode(coded[-1]))
                    path = Path(folder) / "memory"
                    coded[-1].save(path, codec)
                    for key, value in (
                        ("residual", len(residual)),
                        ("coded", len(parts(residual)[4]) - IDENTITY_BYTES * (parts(residual)[0] == TEXT)),
                        ("memory", body - len(residual)),
                        ("packed", body + OVERHEAD),
                        ("file", path.stat().st_size),
                        ("as_tokens", parts(residual)[0] == TEXT),
                    ):
                        columns[key].append(value)
            if restore_texts(exact, coded[: options.verify]) != texts[: options.verify]:
                raise CompressorError(f"{name} at {tokens} tokens is not exact: this is a defect")
            row = {"length": length, "tokens": tokens, "codec": name, **row_of(columns, list(columns))}
            row["decoder_tokens"] = float(tokens * len(coded[0].segments))
            row["against_pack"] = row["packed"] / rows[0]["pack"]
            rows.append(row)
            print(
                f"{length} tokens, k = {tokens:2d}, {name:<12} coded {row['coded']:6.1f}  residual "
                f"{row['residual']:6.1f}  memory {row['memory']:8.1f}  "
                f"both {row['packed']:8.1f}, {row['against_pack']:.2f} x pack",
                flush=True,
            )
            progress.add(1)
    progress.close()
    # The command's own path, once: a file that was packed unpacks to its text.
    sample = Needs(lambda: exact, lambda: model, lambda: calibration, options.tokens[0], options.codecs[0])
    packed = pack_texts(texts[:1], text_codec("exact", sample))[0]
    if packed.text != texts[0]:
        raise CompressorError("compressor pack --codec exact does not give the text back: this is a defect")
    return rows


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    """Measure and write the figures."""
    options, _ = parse_config(Options, argv, "Bytes of exact memories.")
    model = Compressor.from_pretrained(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        calibration = fitted(options, Path(folder))
        rows: list[dict[str, Any]] = []
        for length in options.lengths:
            rows += measure(model, calibration, options, length)
            best = {}
            for row in rows:
                key = f"{row['length']} tokens, k = {row['tokens']}"
                if row["tokens"] is not None and row["packed"] < best.get(key, {"packed": 1e99})["packed"]:
                    best[key] = {
                        name: row[name] for name in ("codec", "coded", "residual", "memory", "packed", "against_pack")
                    }
            # After each length: a run that is stopped keeps what it measured.
            write_json(
                options.output,
                {
                    "data": options.data,
                    "rows": rows,
                    "best": best,
                    "calibration": calibration.digest,
                    "run": run_record(0),
                },
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
