"""The command `compressor`: one sub-command for each thing people do with the project.

    compressor compress --text notes.txt --output notes.memory
    compressor regenerate --memory notes.memory
    compressor corpus --config configs/corpora/arxiv-snapshot.yaml --source FILE --output outputs/arxiv

`compressor --help` lists the sub-commands, `compressor corpus --help` the options of one. Each is a
function here that imports what it needs when it is called, so that the others need not wait for it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compressor import __version__
from compressor.errors import CompressorError, exits_cleanly

OVERWRITE = {"overwrite": "replace what is at --output if it exists"}


def _options(config: type, argv: list[str], command: Callable[[list[str]], int]) -> Any:
    """Options of a command that writes `output`, which it must not replace unless told to."""
    from compressor.parsing import parse_config

    name = command.__name__.replace("_", "-")
    options, switches = parse_config(config, argv, f"compressor {name}: {command.__doc__}", OVERWRITE)
    if Path(options.output).exists() and not switches.overwrite:
        raise CompressorError(f"{options.output} exists: choose another --output, or give --overwrite")
    return options


def corpus(argv: list[str]) -> int:
    """build a corpus of abstracts (Parquet shards and a manifest) from arXiv, files or the hub"""
    from compressor.data.corpora import CorpusConfig, build_corpus
    from compressor.parsing import parse_config

    flags = {"overwrite": "replace the output folder if it is a corpus built earlier"}
    config, options = parse_config(CorpusConfig, argv, f"compressor corpus: {corpus.__doc__}", flags)
    manifest = build_corpus(config, overwrite=options.overwrite)
    kept = sum(manifest["kept"].values())
    print(f"read {manifest['read']:,} records, kept {kept:,}")
    for reason, count in manifest["dropped"].items():
        print(f"  dropped {count:,}: {reason}")
    for name, split in manifest["splits"].items():
        dates = f", {split['dates']['first']} to {split['dates']['last']}" if split["dates"] else ""
        print(f"  {name}: {split['records']:,} records, {split['words']:,} words{dates}")
    print(f"wrote {config.output}")
    return 0


@dataclass
class CompressOptions:
    """What `compressor compress` takes."""

    text: str
    """File with the passage, or - for standard input."""
    output: str
    """Memory file to write."""
    tokens: int | None = None
    """Memory tokens for each segment; by default all the compressor has."""
    checkpoint: str = "models/arxiv-mini/compressor"
    """Compressor checkpoint: folder or hub id."""
    base: str | None = None
    """Frozen base: folder or hub id; by default the one the checkpoint names."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that keys and values are stored in."""
    device: str = "cpu"


def compress(argv: list[str]) -> int:
    """compress a text file into a memory file"""
    options = _options(CompressOptions, argv, compress)
    from compressor.demo import read_text

    passage = read_text(options.text)
    import torch

    from compressor.model import Compressor

    model = Compressor.from_pretrained(options.checkpoint, base=options.base, device=options.device)
    memory = model.compress(passage, options.tokens).to(dtype=getattr(torch, options.dtype))
    memory.save(options.output)
    print(
        f"{memory.passage_tokens} tokens -> {memory.tokens} memory tokens in {len(memory.segments)} segment(s); "
        f"{len(passage.encode()):,} bytes of text -> {Path(options.output).stat().st_size:,} bytes: {options.output}"
    )
    return 0


@dataclass
class RegenerateOptions:
    """What `compressor regenerate` takes."""

    memory: str
    """Memory file that `compressor compress` wrote."""
    base: str = "models/arxiv-mini/base"
    """The frozen base it was made with: folder or hub id. Adapters are not needed."""
    tokens: int | None = None
    """Use only the first so many memory tokens of each segment."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    seed: int = 0
    device: str = "cpu"


def regenerate(argv: list[str]) -> int:
    """write the passage of a memory file back"""
    from compressor.config import BaseConfig
    from compressor.parsing import parse_config

    options, _ = parse_config(RegenerateOptions, argv, f"compressor regenerate: {regenerate.__doc__}")
    from compressor import generation
    from compressor.base import load_base
    from compressor.memory import Memory

    memory = Memory.load(options.memory)
    if options.tokens is not None:
        memory = memory.truncate(options.tokens)
    base = load_base(BaseConfig(path=options.base), options.device)
    sampling = generation.Sampling(temperature=options.temperature, seed=options.seed)
    print(generation.regenerate(base, [memory], sampling)[0])
    return 0


@dataclass
class ExportOptions:
    """What `compressor export-base` takes."""

    run: str
    """Output folder of a finished `train.py` run of stage `base`."""
    output: str
    """Folder to write."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def export_base(argv: list[str]) -> int:
    """write a trained base as a small transformers model with a card"""
    options = _options(ExportOptions, argv, export_base)
    from compressor.pretraining import export

    export(Path(options.run), Path(options.output), options.dtype)
    print(f"wrote {options.output}")
    return 0


@dataclass
class ExportCompressorOptions:
    """What `compressor export-compressor` takes."""

    checkpoint: str
    """Compressor checkpoint, for instance OUTPUT/final of a training run."""
    output: str
    """Folder to write."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def export_compressor(argv: list[str]) -> int:
    """write a compressor's checkpoint rounded to bfloat16, half the size, for sharing"""
    options = _options(ExportCompressorOptions, argv, export_compressor)
    import torch

    from compressor.model import Compressor

    Compressor.from_pretrained(options.checkpoint).save_pretrained(options.output, getattr(torch, options.dtype))
    print(f"wrote {options.output}")
    return 0


@dataclass
class EvaluateBaseOptions:
    """What `compressor evaluate-base` takes."""

    output: str
    """JSON file to write."""
    base: str = "models/arxiv-mini/base"
    """Folder or hub id."""
    data: str = "arxiv-test"
    """Texts the base has not seen: a file, a corpus folder or a shipped name."""
    limit: int | None = None
    """Use only the first so many texts."""


def evaluate_base(argv: list[str]) -> int:
    """measure a base: bits per byte, in-context copying accuracy, a sample"""
    from compressor.parsing import parse_config

    options, _ = parse_config(EvaluateBaseOptions, argv, f"compressor evaluate-base: {evaluate_base.__doc__}")
    from compressor.files import write_json
    from compressor.pretraining import evaluate

    figures = evaluate(options.base, options.data, options.limit)
    write_json(options.output, figures)
    copying = ", ".join(f"{value:.1%} at {length} tokens" for length, value in figures["copying"].items())
    print(f"{figures['bits_per_byte']:.4f} bits per byte over {figures['n']} texts; copying {copying}")
    print(f"sample: {figures['sample']}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compress": compress,
    "regenerate": regenerate,
    "corpus": corpus,
    "export-base": export_base,
    "export-compressor": export_compressor,
    "evaluate-base": evaluate_base,
}


def usage() -> str:
    """What `compressor --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: compressor COMMAND [options]",
            "",
            *lines,
            "",
            "compressor COMMAND --help lists its options.",
        ]
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` (by default the process's own arguments) names first.

    Returns the exit status: 0, or 2 when the user can fix what was wrong (the message says how).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"compressor {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.0)
        raise CompressorError(
            f"there is no command {arguments[0]!r}; did you mean {near[0]}? There are: {', '.join(COMMANDS)}"
        )
    return command(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
