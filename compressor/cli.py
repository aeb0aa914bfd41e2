"""The command `compressor`: one sub-command for each thing people do with the project.

    compressor corpus --config configs/corpora/arxiv-snapshot.yaml --source FILE --output outputs/arxiv

`compressor --help` lists the sub-commands, `compressor corpus --help` the options of one. Each is a
function here that imports what it needs when it is called, so that the others need not wait for it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from compressor import __version__
from compressor.errors import CompressorError, exits_cleanly


def corpus(argv: list[str]) -> int:
    """build a corpus of abstracts (Parquet shards and a manifest) from arXiv, files or the hub"""
    from jsonargparse import set_parsing_settings

    from compressor.config import parse_config
    from compressor.data.corpora import CorpusConfig, build_corpus

    # The texts under the fields of a configuration are what --help says about them.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
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


COMMANDS: dict[str, Callable[[list[str]], int]] = {"corpus": corpus}


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
