"""Rate and distortion of memory codecs: bits a value and bytes a passage against ROUGE-L of regeneration.

    python benchmarks/codecs.py --calibration calibration.safetensors --output results/codecs.json

Every codec stores and loads the memories of the same unseen passages, and the base regenerates these greedily from what
came back. Losses are relative to float32 memories, with bootstrap intervals over passages.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.api import Compressor
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.evaluation.metrics import bootstrap, ratio, rouge_l
from compressor.files import write_json
from compressor.model.config import DType
from compressor.model.decoder import score
from compressor.model.generation import regenerate
from compressor.model.memory import Memory, memory_prefix
from compressor.parsing import parse_config
from compressor.progress import Progress
from compressor.provenance import run_record
from compressor.storage.calibration import Calibration
from compressor.storage.codec import Codec
from compressor.storage.inspection import byte_ledger
from compressor.streams import exits_cleanly

STORED = ("bf16", "int8", "int8+ans", "int4", "int4+ans", "int3", "int3+ans", "int2", "int2+ans")
FITTED = tuple(f"int{bits}{coder}" for bits in (8, 4, 3, 2) for coder in ("", "+ans", "+huffman"))
LOWRANK = tuple(f"lowrank:{rate}" for rate in (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.04))


@dataclass
class Options:
    """What the benchmark takes."""

    output: str
    """JSON file to write."""
    calibration: str
    """What `compressor calibrate` wrote, fitted on other passages than those of --data."""
    checkpoint: str = "models/arxiv-mini/compressor"
    dtype: DType = "float32"
    """Type the base computes in."""
    data: str = "arxiv-test"
    lengths: list[int] = field(default_factory=lambda: [96, 192])
    """Passages of at least so many tokens are cut to them."""
    tokens: list[int] = field(default_factory=lambda: [16, 4])
    """Memory tokens."""
    limit: int = 100
    """Passages of each length."""
    codecs: list[str] = field(default_factory=list)
    """Names of the rows to measure besides float32, as in the column `codec`; by default all."""
    batch_size: int = 25


def variants(calibration: Calibration) -> list[tuple[str, Codec]]:
    """Codecs with the names of their rows."""
    rows = [(name, Codec.parse(name)) for name in STORED]
    rows += [(f"{name}, calibrated", Codec.parse(name, calibration)) for name in FITTED]
    rows += [(name, Codec.parse(name, calibration)) for name in LOWRANK if float(name[8:]) >= calibration.rates[-1]]
    return [*rows, ("lowrank:0.2, huffman", Codec.parse("lowrank:0.2+huffman", calibration))]


def regenerated(model: Compressor, memories: list[Memory], ids: list[list[int]], batch: int) -> tuple[Any, Any]:
    """ROUGE-L of each passage, and its nats under its memory."""
    base = model.base
    wanted = [base.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    nats = []
    written = regenerate(base, memories, batch_size=batch)
    for start in range(0, len(ids), batch):
        some = [[*one, base.eos] for one in ids[start : start + batch]]
        prefix = memory_prefix(base, memories[start : start + batch])
        nats += [-float(row[:, 0].double().sum()) for row in score(base, prefix, [[base.bos]] * len(some), some)]
    return [rouge_l(a, b) for a, b in zip(written, wanted, strict=True)], nats


def measure(model: Compressor, calibration: Calibration, options: Options, length: int, tokens: int) -> list[Any]:
    """Rows of one length and one number of memory tokens."""
    tokenizer = model.base.tokenizer
    encoded = model.base.tokenise(load_texts(options.data)["text"])
    ids = [list(one[:length]) for one in encoded if len(one) >= length][: options.limit]
    if not ids:
        raise CompressorError(f"{options.data} has no passage of {length} tokens: give shorter --lengths")
    sizes = [len(tokenizer.decode(one, skip_special_tokens=True).encode()) for one in ids]
    memories = model.compress_ids(ids, tokens, options.batch_size)
    reference, nats = regenerated(model, memories, ids, options.batch_size)
    rows = variants(calibration)
    unknown = set(options.codecs) - {name for name, _ in rows}
    if unknown:
        raise CompressorError(f"codecs = {sorted(unknown)}: there are {', '.join(name for name, _ in rows)}")
    rows = [("float32", Codec.parse("float32")), *(row for row in rows if row[0] in (options.codecs or [row[0]]))]
    known: dict[Any, tuple[Any, Any]] = {}
    results = []
    progress = Progress(f"codecs, {length} tokens in {tokens}", len(rows), "codecs")
    with tempfile.TemporaryDirectory() as folder:
        for name, codec in rows:
            path, loaded, total, payload = Path(folder) / "memory", [], [], []
            for memory in memories:
                memory.save(path, codec)
                loaded.append(Memory.load(path, calibration))
                ledger = byte_ledger(path)
                total.append(sum(ledger.values()))
                payload.append(total[-1] - ledger["header"])
            # The entropy coder changes sizes only, which loading just showed: what came back is compared, not assumed.
            key = (codec.name, codec.calibration is None, codec.level)
            flat = torch.stack([torch.stack([memory.keys, memory.values]).float() for memory in loaded])
            if key not in known:
                known[key] = (flat, regenerated(model, loaded, ids, options.batch_size))
            elif not torch.equal(known[key][0], flat):
                raise CompressorError(f"{name} does not give the memories that its other entropy coders give")
            scores, lost = known[key][1]
            values = 2 * model.base.layers * model.base.kv_heads * model.base.head_size * tokens
            columns = {"passages": np.ones(len(ids)), "rouge": scores, "reference": reference, "nats": lost}
            columns |= {"tokens": [len(one) + 1 for one in ids], "payload": payload, "values": [values] * len(ids)}
            columns |= {"total": total, "text": sizes}
            figures = bootstrap(
                columns,
                {
                    "rouge_l": ratio("rouge", "passages"),
                    "relative_loss": lambda sums: 1 - sums["rouge"] / sums["reference"],
                    "nll_per_token": ratio("nats", "tokens"),
                    "bits_per_value": lambda sums: 8 * sums["payload"] / sums["values"],
                    "bytes": ratio("total", "passages"),
                    "bytes_per_passage_byte": ratio("total", "text"),
                },
            )
            row: dict[str, Any] = {"codec": name, "length": length, "tokens": tokens, "n": len(ids)}
            for figure, interval in figures.items():
                row[figure] = interval.value
                if figure in ("rouge_l", "relative_loss", "nll_per_token"):
                    row[f"{figure}_low"], row[f"{figure}_high"] = interval.low, interval.high
            row["nll_reference"] = sum(nats) / sum(columns["tokens"])
            results.append(row)
            print(
                f"{length:>4} {tokens:>3}  {name:<38} {row['bits_per_value']:7.3f} bits a value "
                f"{row['bytes']:9,.0f} bytes  ROUGE-L {row['rouge_l']:.3f}, loss {row['relative_loss']:+.2%} "
                f"[{row['relative_loss_low']:+.2%}, {row['relative_loss_high']:+.2%}]  nats {row['nll_per_token']:.4f}",
                flush=True,
            )
            progress.add(1)
    progress.close()
    return results


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    """Measure every codec and write the figures."""
    options, _ = parse_config(Options, argv, "Rate and distortion of memory codecs.")
    calibration = Calibration.load(options.calibration)
    model = Compressor.from_pretrained(options.checkpoint, dtype=options.dtype)
    rows = []
    for length in options.lengths:
        for tokens in options.tokens:
            rows += measure(model, calibration, options, length, tokens)
            # After each block: a run that is stopped keeps what it measured.
            fitted = {"digest": calibration.digest, "passages": calibration.passages}
            fitted["bytes"] = Path(options.calibration).stat().st_size
            fitted["rank"] = len(calibration.transform.codes)
            write_json(
                options.output,
                {
                    "data": options.data,
                    "checkpoint": options.checkpoint,
                    "dtype": model.base.dtype_name,
                    "calibration": fitted,
                    "rows": rows,
                    "run": run_record(0),
                },
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
