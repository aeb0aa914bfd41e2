"""`compressor pack` and `compressor unpack`: files to packed files and back, used as gzip is.

What gzip does is done: FILE becomes FILE.cz and is removed, `-k` keeps it, `-c` writes to standard output and `-o` to a
named file (both keep it), `-` or no file means standard input, `-d` unpacks, `-t` tests, `-f` replaces what exists. The
status is 0, 1 after an error, 2 if the worst was a file that was left alone. `--codec NAME` packs a text by a lossy
codec (`text.py`) and keeps the input.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, WriteError
from compressor.files import atomic_file, check_file, is_special
from compressor.packing.table import TEXT_CODECS
from compressor.progress import Progress, set_level
from compressor.streams import abandon_if_full, check_output, input_stream, write_output

SUFFIX = ".cz"
_ERROR, _LEFT_ALONE = 1, 2
_LONG = re.compile(r"--[a-z]+_[a-z]+")


class _LeftAlone(Exception):
    """A file that was not touched, for a reason that is a warning."""


def _parser(unpack: bool) -> argparse.ArgumentParser:
    name = "unpack" if unpack else "pack"
    what = "unpack what `compressor pack` packed" if unpack else "pack files, text best; without loss unless --codec"
    parser = argparse.ArgumentParser(prog=f"compressor {name}", description=what)
    parser.add_argument("files", nargs="*", metavar="FILE", help="- or none: standard input to standard output")
    parser.add_argument("-o", "--output", metavar="FILE", help="write here (one input), and keep the input")
    parser.add_argument("-c", "--stdout", action="store_true", help="write to standard output, and keep the input")
    parser.add_argument("-d", "--decompress", action="store_true", default=unpack, help="unpack")
    parser.add_argument("-t", "--test", action="store_true", help="unpack without writing anything")
    parser.add_argument("-k", "--keep", action="store_true", help="keep the input")
    parser.add_argument("-f", "--force", action="store_true", help="replace output files; write to a terminal")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no warnings")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what each file came to")
    parser.add_argument(
        "--base",
        help="the model that predicts: folder, hub id, GGUF file or name; by default models/arxiv-mini/base, and of "
        "text codecs smollm2-135m where it is at hand",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of the processor; any number gives the same bytes")
    parser.add_argument(
        "--batch", type=int, default=32, help="lanes decoded at a time; any number gives the same bytes"
    )
    parser.add_argument(
        "--lane-tokens", type=int, default=1024, help="packing: tokens decoded one after the other; more pack better"
    )
    group = parser.add_argument_group("text codecs", "lossy: the input is kept; any causal LM may be the --base")
    group.add_argument("--hex", action="store_true", help="packed data are written and read as hexadecimal digits")
    group.add_argument("--codec", default="lossless", choices=("lossless", *TEXT_CODECS), help="packing: what to store")
    group.add_argument("--tokens", type=int, help="packing: tokens that stand for each piece of the text")
    group.add_argument(
        "--checkpoint", default="models/arxiv-mini/methods/sentence-embedding", help="of sentence-embedding"
    )
    group.add_argument("--bits", type=int, default=8, help="packing: of a number of a sentence embedding")
    group.add_argument("--summariser", help="packing: seq2seq model (folder or hub id); else sentences are extracted")
    group.add_argument("--temperature", type=float, help="packing: 0 is greedy; by default the codec's own")
    group.add_argument("--top-p", type=float, help="packing: nucleus sampling")
    group.add_argument("--seed", type=int, default=0, help="packing: of the sampling")
    return parser


def unpack(argv: Sequence[str]) -> int:
    """`compressor unpack`, which is `compressor pack -d`."""
    return run(argv, unpack=True)


def run(argv: Sequence[str], unpack: bool = False) -> int:
    """Run the command; returns the exit status."""
    parser = _parser(unpack)
    try:
        options = parser.parse_args([one.replace("_", "-") if _LONG.fullmatch(one) else one for one in argv])
    except SystemExit as stop:
        return _ERROR if stop.code else 0
    options.decompress |= options.test
    files = options.files or ["-"]
    if options.output and (len(files) > 1 or options.stdout or options.test):
        return _complain("-o takes one input, and neither -c nor -t")
    for name in ("batch", "threads", "lane_tokens", "tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return _complain(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    set_level(options.quiet, options.verbose)
    status = 0
    for name in files:
        try:
            _one(name, options)
        except _LeftAlone as reason:
            if not options.quiet:
                print(f"compressor: {reason}", file=sys.stderr)
            status = status or _LEFT_ALONE
        except BrokenPipeError:
            raise
        except WriteError as error:  # names what could not be written, which is not the input
            abandon_if_full()
            status = _complain(error)
        except (CompressorError, OSError) as error:
            what = error.strerror or error if isinstance(error, OSError) else error
            status = _complain(f"{'standard input' if name == '-' else name}: {what}")
    return status


def _complain(reason: Any) -> int:
    print(f"compressor: {reason}", file=sys.stderr)
    return _ERROR


def _one(name: str, options: argparse.Namespace) -> None:
    """Pack or unpack one input."""
    source = None if name == "-" else Path(name)
    target = _target(source, options)
    if source is None and sys.stdin.isatty() and not options.force:
        raise CompressorError("nothing is read from a terminal; name a file, or use -f to force it")
    plain = options.test or options.decompress or options.force or options.hex
    if target is None and not plain and sys.stdout.isatty():
        raise CompressorError("packed data is not written to a terminal; use -f to force it")
    if target is not None:
        _may_write(target, source, options)
    elif not options.test:
        check_output()
    data = input_stream().read() if source is None else source.read_bytes()
    from compressor.commands.packer import convert  # start-up: torch

    if options.hex and options.decompress:
        try:
            data = bytes.fromhex(data.decode("ascii"))
        except ValueError:
            raise CompressorError("not hexadecimal digits: leave --hex out, or get it again") from None
    with _Stages(name) as progress:
        result = convert(data, options, progress)
    if options.hex and not options.decompress:
        result = result.hex().encode() + b"\n"
    if target is not None:
        with atomic_file(target) as temporary:
            temporary.write_bytes(result)
            if source is not None:
                shutil.copystat(source, temporary)
        lossy = not options.decompress and options.codec != "lossless"
        if source is not None and not (options.keep or options.output or lossy):
            source.unlink()
    elif not options.test:
        write_output(result)
    if options.verbose:
        large, small = (len(result), len(data)) if options.decompress else (len(data), len(result))
        bits = f", {8 * small / large:.3f} bits a byte" if large else ""
        print(f"{name}: {len(data):,} -> {len(result):,} bytes{bits}", file=sys.stderr)


def _target(source: Path | None, options: argparse.Namespace) -> Path | None:
    """The file to write; None for standard output, or when testing.

    Raises:
        _LeftAlone: gzip would leave this input alone.
    """
    if source is not None:
        mode = source.lstat().st_mode
        if stat.S_ISDIR(mode):
            raise _LeftAlone(f"{source} is a directory -- ignored")
        plain = options.stdout or options.test or options.output or options.force
        if not stat.S_ISREG(mode) and not plain:
            raise _LeftAlone(f"{source} is not a regular file -- ignored; use -f to force it")
    if options.output and options.output != "-":
        return Path(options.output)
    if source is None or options.stdout or options.test or options.output:
        return None
    if not options.decompress:
        if source.suffix == SUFFIX and not options.force:
            raise _LeftAlone(f"{source} already has {SUFFIX} suffix -- unchanged")
        return source.with_name(source.name + SUFFIX)
    if source.suffix != SUFFIX or source.name == SUFFIX:
        raise _LeftAlone(f"{source}: unknown suffix -- ignored; use -c or -o, or rename it to end with {SUFFIX}")
    return source.with_suffix("")


def _may_write(target: Path, source: Path | None, options: argparse.Namespace) -> None:
    """Raise unless `target` may be written: before the work, not after it."""
    check_file(target, inputs=[] if source is None else [source])
    if is_special(target):
        if not options.output:
            raise _LeftAlone(f"{target} is not a regular file -- ignored; use -o or -c to write to it")
    elif os.path.lexists(target) and not options.force:
        raise _LeftAlone(f"{target} already exists; not overwritten: use -f to replace it")
    if not target.parent.is_dir():
        raise CompressorError(f"there is no folder {target.parent}")


class _Stages:
    """Shows the stages of the work on one input, each with its own progress."""

    def __init__(self, name: str):
        self.name = "standard input" if name == "-" else name
        self.stage = ""
        self.progress: Progress | None = None

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes have gone through this stage."""
        if self.progress is None or stage != self.stage:
            self.__exit__()
            self.stage, self.progress = stage, Progress(f"{stage} {self.name}", total, "bytes")
        self.progress.reach(done)
