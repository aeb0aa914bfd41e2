"""Lossless packing against general-purpose tools: size, ratio and speed, on texts the base has not seen and on others.

    python benchmarks/lossless.py --abstracts arxiv-test --texts alice29.txt lcet10.txt --output results/lossless.json

Data: abstracts of `--since` and later, one a line, at least `--bytes` of them; the same abstracts of 600 to 1,500 bytes
each on its own, as people send small messages; files named by `--texts`; this project's Python files, one after the
other; random bytes. Every packed result is unpacked and compared. Sizes do not count the model, which both ends need:
its bytes stand beside them. Speeds are kB (1,000 bytes) of the original per second of this process's CPU time, on
`--threads` threads; packing includes the trial unpacking.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import lzma
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compressor.data.records import rows_of
from compressor.data.rows import BadRecords
from compressor.data.sources import resolve as resolve_data
from compressor.errors import CompressorError
from compressor.files import bundled, write_json
from compressor.model.bases import NAMED, fetch
from compressor.model.config import BaseConfig
from compressor.model.load import load_base
from compressor.packing.float64 import ExactBase
from compressor.packing.lossless import pack_bytes, unpack_bytes
from compressor.provenance import VERSION
from compressor.streams import exits_cleanly

PROJECT = Path(__file__).resolve().parents[1]
MIXING = "zpaq -m5"
"""A context-mixing packer, as slow to unpack as to pack: reported beside the general-purpose ones, not among them."""
MIXING_BYTES = 10_000
"""Smaller files are not given to it: its archives have a kilobyte of their own."""


def tools() -> dict[str, Callable[[bytes], bytes]]:
    """General-purpose packers that are here, each with its strongest setting or the one people use."""
    found: dict[str, Callable[[bytes], bytes]] = {
        "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
        "bzip2 -9": lambda data: bz2.compress(data, 9),
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    try:
        import zstandard

        for level in (19, 22):
            name = f"zstd -{level}" if level < 20 else f"zstd --ultra -{level}"
            found[name] = zstandard.ZstdCompressor(level=level).compress
    except ImportError:
        print("note: zstandard is not installed (pip install 'kv-compressor[codecs]')", file=sys.stderr)
    try:
        import brotli

        found["brotli -q 11"] = lambda data: brotli.compress(data, quality=11, lgwin=24)
    except ImportError:
        print("note: brotli is not installed (pip install brotli)", file=sys.stderr)
    if shutil.which("zpaq"):
        found[MIXING] = zpaq
    else:
        print("note: zpaq is not installed (apt install zpaq)", file=sys.stderr)
    return found


def zpaq(data: bytes) -> bytes:
    """The archive of one file, about a kilobyte of which is the archive's own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(data)
        subprocess.run(["zpaq", "add", "a.zpaq", "a", "-method", "5"], cwd=folder, check=True, capture_output=True)
        return (Path(folder) / "a.zpaq").read_bytes()


def cpu_seconds() -> float:
    """Processor time of this process and of those it ran."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def unseen(options: argparse.Namespace) -> list[str]:
    """Abstracts dated `--since` or later, in a random order that is always the same."""
    texts = []
    for source in resolve_data(options.abstracts, split="test"):
        for row in rows_of(source, "test", BadRecords()):
            if str(row.values.get("date", "")) >= options.since:
                text = str(row.values.get("abstract") or row.values.get("text") or "")
                texts += [text] if text else []
    if not texts:
        raise CompressorError(f"{options.abstracts} has no abstract with a date of {options.since} or later")
    random.Random(0).shuffle(texts)
    return texts


def data_sets(options: argparse.Namespace) -> dict[str, list[bytes]]:
    """Name to the byte strings that are packed apart."""
    texts = unseen(options)
    chosen, size = [], 0
    for text in texts:
        if size >= options.bytes:
            break
        chosen.append(text)
        size += len(text.encode()) + 1
    single = [text.encode() for text in texts if 600 <= len(text.encode()) <= 1500][: options.singles]
    sets = {
        f"abstracts since {options.since}, one file": [("\n".join(chosen) + "\n").encode()],
        f"abstracts since {options.since}, each apart": single,
    }
    for path in options.texts:
        data = Path(path).read_bytes()[: options.text_bytes]
        sets[Path(path).name] = [data.decode("utf-8", "ignore").encode() if options.text_bytes else data]
    sources = sorted((PROJECT / "compressor").rglob("*.py"))
    sets["this project's Python code"] = [b"".join(path.read_bytes() for path in sources)[: options.code_bytes]]
    sets["random bytes"] = [random.Random(0).randbytes(100_000)]
    return sets


def rates(items: list[bytes], packed: list[bytes], seconds: float) -> dict[str, Any]:
    """Bytes, bits a byte and kB/s of one packer on one data set."""
    size, small = sum(map(len, items)), sum(map(len, packed))
    return {"bytes": small, "bits_per_byte": 8 * small / size, "kilobytes_per_second": size / 1000 / max(seconds, 1e-9)}


def measure(items: list[bytes], exact: ExactBase, options: argparse.Namespace) -> dict[str, Any]:
    """All packers on one data set."""
    found: dict[str, Any] = {}
    for name, pack in tools().items():
        if name == MIXING and max(map(len, items)) < MIXING_BYTES:
            continue
        started = cpu_seconds()
        packed = [pack(item) for item in items]
        found[name] = rates(items, packed, cpu_seconds() - started)
    started = cpu_seconds()
    blobs = [pack_bytes(item, exact, options.lane_tokens, options.batch) for item in items]
    ours = rates(items, blobs, cpu_seconds() - started)
    started = cpu_seconds()
    if [unpack_bytes(blob, exact, options.batch) for blob in blobs] != items:
        raise CompressorError("a packed text did not come back: this is a defect")
    ours["unpack_kilobytes_per_second"] = sum(map(len, items)) / 1000 / max(cpu_seconds() - started, 1e-9)
    best = min((name for name in found if name != MIXING), key=lambda name: found[name]["bytes"])
    ours["best_other"], ours["smaller_than_best_other"] = best, 1 - ours["bytes"] / found[best]["bytes"]
    if "zstd -19" in found:
        ours["times_smaller_than_zstd_19"] = found["zstd -19"]["bytes"] / ours["bytes"]
    return {"n": len(items), "bytes": sum(map(len, items)), "packers": {"compressor pack": ours, **found}}


def commit() -> str:
    """The commit this runs at, if it is a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/arxiv-mini/base")
    parser.add_argument("--abstracts", default="arxiv-test", help="a file, a folder or a shipped name")
    parser.add_argument("--since", default="2026")
    parser.add_argument("--bytes", type=int, default=200_000, help="of the file of abstracts")
    parser.add_argument("--singles", type=int, default=100, help="abstracts packed apart")
    parser.add_argument("--code-bytes", type=int, default=100_000, help="of this project's code")
    parser.add_argument("--texts", nargs="*", default=[], help="further files, such as the Canterbury corpus's")
    parser.add_argument("--text-bytes", type=int, help="of each of these files, to a whole character; by default all")
    parser.add_argument("--lane-tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    exact = ExactBase(load_base(BaseConfig(path=options.base)))
    folder = Path(fetch(options.base) if options.base in NAMED else bundled(options.base))
    weights = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/lossless.py", *sys.argv[1:]]),
        "version": VERSION,
        "commit": commit(),
        "torch": torch.__version__,
        "threads": options.threads,
        "base": options.base,
        "fingerprint": exact.base.fingerprint,
        "model_bytes": weights,
        "sets": {},
    }
    for name, items in data_sets(options).items():
        report["sets"][name] = found = measure(items, exact, options)
        print(f"{name}: n = {found['n']}, {found['bytes']:,} bytes")
        for packer, one in found["packers"].items():
            speed = f"{one['kilobytes_per_second']:12,.1f} kB/s"
            if "unpack_kilobytes_per_second" in one:
                speed += f", unpacking {one['unpack_kilobytes_per_second']:.1f} kB/s"
            print(f"  {packer:<18} {one['bytes']:>10,}  {one['bits_per_byte']:.3f} bits a byte {speed}")
        ours = found["packers"]["compressor pack"]
        print(f"  {ours['smaller_than_best_other']:.1%} smaller than {ours['best_other']}", flush=True)
        if options.output:
            write_json(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
