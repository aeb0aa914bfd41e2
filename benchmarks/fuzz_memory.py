"""Mutate memory files and see that none crashes, hangs, or is taken for a memory it is not.

    python benchmarks/fuzz_memory.py --files 105000

Half of the mutants keep their old checksum (damage) and must be refused; the other half are signed again (an adversary)
and must be refused or give a memory that is whole. `inspect` reads them too. Exits with status 1 and names the first
mutant for which that does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compressor.errors import CompressorError
from compressor.model.memory import Memory, Segment
from compressor.storage.calibration import Calibration
from compressor.storage.codec import Codec
from compressor.storage.container import _BLANK, _DIGEST
from compressor.storage.fitting import fit_calibration
from compressor.storage.inspection import describe

CODECS = (
    *("float32", "bf16", "float16", "int8", "int4", "int3+ans", "int2+ans", "int4+huffman"),
    *("int3, fitted", "int2+ans, fitted", "lowrank:1", "lowrank:0.5+ans", "lowrank:0.7+huffman"),
)
INTERESTING = (0, 1, -1, 7, 255, 256, 4096, 65535, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 53, 1 << 63, 1 << 64, 10**30)
SECONDS = 10
"""Longest a file may take to be read."""
GIBIBYTES = 8
"""Address space of the process: an allocation that the file's size does not justify fails loudly."""


def make_memory(seed: int, tokens: int = 4) -> Memory:
    """A memory of 2 layers, 2 heads and head size 8 with correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 2 * 2 * 2 * 8, generator=torch.Generator().manual_seed(0))
    flat = torch.randn(tokens, 6, generator=generator) @ mixing
    pair = flat.reshape(tokens, 2, 2, 2, 8).movedim(0, 3)
    parts = (Segment(tokens, 40 + seed % 7),)
    return Memory(pair[0].clone(), pair[1].clone(), parts, "nested", 4, "a" * 64, "tiny@" + "b" * 64, "c" * 64, "tiny")


def originals(folder: Path) -> tuple[list[bytes], Calibration]:
    """A file of every codec, and the calibration they need."""
    calibration = fit_calibration([make_memory(seed) for seed in range(64)])
    found = []
    for number, name in enumerate(CODECS):
        name, fitted = name.removesuffix(", fitted"), name.endswith("fitted") or name.startswith("lowrank")
        path = folder / f"original-{number}"
        memory = make_memory(number)
        if number % 3 == 0:
            memory = Memory.concatenate([memory, make_memory(number + 100)])
        memory.save(path, Codec.parse(name, calibration if fitted else None), 123)
        found.append(path.read_bytes())
    return found, calibration


def signed_again(data: bytes) -> bytes:
    """The file with a checksum that fits."""
    length = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    place = _DIGEST.search(data[:length])
    if place is None:
        return data
    blank = data[: place.start(1)] + _BLANK + data[place.end(1) :]
    return data[: place.start(1)] + hashlib.sha256(blank).hexdigest().encode() + data[place.end(1) :]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key within a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """The file with one value of its header, or of the settings in it, replaced."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    settings = json.loads(header["__metadata__"]["memory"])
    inside = rng.random() < 0.7
    holder, key = rng.choice(list(places(settings if inside else header)))
    choices: list[Any] = [
        *INTERESTING,
        0.5,
        float("nan"),
        "",
        "x" * 200,
        None,
        [],
        {},
        True,
        [[1, 1]] * 50,
        "int4",
        "ans",
    ]
    old = holder[key]
    if isinstance(old, int):
        choices += [old + 1, old - 1, old * 2, -old]
    if rng.random() < 0.1 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = rng.choice(choices)
    if isinstance(header.get("__metadata__"), dict) and inside:
        header["__metadata__"]["memory"] = json.dumps(settings)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data[8 + length :]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A damaged version of a file."""
    kind = rng.randrange(8)
    changed = bytearray(data)
    length = 8 + int.from_bytes(data[:8], "little")
    if kind == 0:  # one bit
        place = rng.randrange(len(changed))
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 1:  # bits of the payload
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(length, len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 2:  # truncation
        del changed[rng.randrange(len(changed)) :]
    elif kind == 3:  # bytes put in, taken out or repeated
        place, size = rng.randrange(len(changed)), rng.randrange(1, 40)
        changed[place : place + rng.choice((0, size))] = rng.choice((b"", rng.randbytes(size), changed[:size]))
    elif kind == 4:  # the length of the header
        changed[:8] = (rng.choice(INTERESTING) % (1 << 64)).to_bytes(8, "little")
    elif kind == 5:  # bytes of the header
        for _ in range(rng.randrange(1, 5)):
            changed[rng.randrange(8, length)] = rng.randrange(256)
    else:
        return edit_header(data, rng)
    return bytes(changed)


def check(path: Path, calibration: Calibration, damaged: bool) -> str:
    """What reading the file came to: `refused` or `accepted`; anything else raises."""
    with contextlib.suppress(CompressorError):
        describe(path)
    try:
        memory = Memory.load(path, calibration)
    except CompressorError:
        return "refused"
    if damaged:
        raise AssertionError("a damaged file was accepted")
    if not bool(torch.isfinite(memory.keys).all() and torch.isfinite(memory.values).all()):
        raise AssertionError("a memory with values that are not finite was accepted")
    if memory.keys.numel() > 1 << 24:
        raise AssertionError("a small file became a vast memory")
    return "accepted"


def fuzz(files: int, seed: int, folder: Path) -> Counter[str]:
    """Read `files` mutants; number i depends on the seed and i alone.

    Raises:
        AssertionError: names the mutant that was neither refused nor whole.
    """
    sources, calibration = originals(folder)
    path = folder / "mutant"
    counts: Counter[str] = Counter()
    for number in range(files):
        rng = random.Random(f"{seed}:{number}")
        source = rng.choice(sources)
        mutant = mutate(source, rng)
        resigned = number % 2 == 1
        if resigned:
            mutant = signed_again(mutant)
        if mutant == source:
            counts["unchanged"] += 1
            continue
        path.write_bytes(mutant)
        started = time.perf_counter()
        try:
            outcome = check(path, calibration, damaged=not resigned)
        except Exception as error:
            raise AssertionError(f"mutant {number} of seed {seed}: {error!r}") from error
        if time.perf_counter() - started > SECONDS:
            raise AssertionError(f"mutant {number} of seed {seed} took over {SECONDS} seconds")
        counts[f"{'signed again' if resigned else 'damaged'}, {outcome}"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    signal.alarm(3600 + options.files // 10)  # a hang ends the process
    started = time.perf_counter()
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        try:
            counts = fuzz(options.files, options.seed, Path(folder))
        except AssertionError as error:
            print(f"FAILED: {error}")
            return 1
    for outcome, count in sorted(counts.items()):
        print(f"{count:>9,} {outcome}")
    print(
        f"{options.files:,} files in {time.perf_counter() - started:.0f} s: no crash, no hang, no damaged file accepted"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
