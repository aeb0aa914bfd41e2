"""The command `compressor`: one sub-command for each thing people do with the project.

    compressor compress notes.txt -o notes.memory
    compressor regenerate notes.memory
    compressor corpus --config configs/corpora/arxiv-snapshot.yaml --source FILE --output outputs/arxiv

`compressor --help` lists the sub-commands, `compressor corpus --help` the options of one. Each is a line of `COMMANDS`
and a module here with the function `run`, which is imported when its options are known to be good: torch and
transformers take seconds. The three scripts are the sub-commands of their names.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from compressor.errors import CompressorError, unknown
from compressor.files import check_file
from compressor.model.table import load
from compressor.parsing import parse_config
from compressor.progress import note
from compressor.provenance import VERSION
from compressor.streams import exits_cleanly

PACKAGE = "compressor.commands"
OVERWRITE = {"overwrite": "replace what is at --output if it exists"}


class Command(NamedTuple):
    """A sub-command."""

    group: str
    """What it is for."""
    summary: str
    example: str
    options: str | None
    """Place of the dataclass that it takes, or of a function that chooses one from the arguments; None where the
    command takes the arguments as they are."""
    plain: tuple[str, ...] = ()
    """Options that may be given without their names, in this order."""
    flags: dict[str, str] | None = None
    """Further switches, and what --help says of them; `OVERWRITE` guards a file that the command writes."""
    place: str | None = None
    """Of the function that does it, with options and switches; by default `run` of the module of its name."""
    passes_on: bool = False
    """What follows -- is another program's: the switch `rest`."""
    needs_options: bool = False
    """Whether it is refused without any, because its defaults take hours."""


COMMANDS = {
    "demo": Command(
        "try",
        "compress an example or a text of yours and show what comes back; --web opens a page",
        "python demo.py notes.txt --question 'What is proposed?'",
        "options:DemoConfig",
        ("text",),
        {"json": "print one JSON object instead of text", "web": "open a page in the browser (extra web)"},
    ),
    "fetch": Command(
        "try",
        "get a base by name (smollm2-135m), from a hub or out of a GGUF file, or a text encoder, ready to load",
        "compressor fetch smollm2-135m",
        "options:FetchOptions",
        ("base",),
    ),
    "compress": Command(
        "memories",
        "compress a text into a memory file",
        "compressor compress notes.txt -o notes.memory --tokens 8",
        "options:CompressOptions",
        ("text",),
        OVERWRITE,
    ),
    "regenerate": Command(
        "memories",
        "write the passage of a memory file back",
        "compressor regenerate notes.memory",
        "options:RegenerateOptions",
        ("memory",),
    ),
    "ask": Command(
        "memories",
        "answer a question, or follow an instruction, from a memory file or records of a store that are like it",
        "compressor ask notes.memory 'What is proposed?'",
        "options:AskOptions",
        ("memory", "question"),
    ),
    "inspect": Command(
        "memories",
        "show what is in a memory file, a store or a calibration, and where its bytes go",
        "compressor inspect notes.memory",
        "options:InspectOptions",
        ("file",),
    ),
    "index": Command(
        "memories",
        "compress the texts of a corpus into a store, to be asked and added to",
        "compressor index corpus.jsonl --output store/",
        "options:IndexOptions",
        ("source",),
    ),
    "serve": Command(
        "memories",
        "serve memories to any OpenAI client, by vLLM (what follows -- goes to vLLM as it is)",
        "compressor serve --memories outputs/memories --port 8000",
        "options:ServeOptions",
        flags={"dry_run": "print vLLM's command line, then stop"},
        passes_on=True,
    ),
    "calibrate": Command(
        "memories",
        "fit what low-rank and calibrated codecs need to know about a compressor's memories",
        "compressor calibrate arxiv-train -o calibration.safetensors",
        "options:CalibrateOptions",
        ("data",),
        OVERWRITE,
    ),
    "transcribe": Command(
        "memories",
        "write down what is said in a WAV file",
        "compressor transcribe speech.wav",
        "options:TranscribeOptions",
        ("audio",),
        OVERWRITE,
    ),
    "train": Command(
        "compressors",
        "train a compressor: stage regenerate, then answer; the same as train.py",
        "accelerate launch train.py --config configs/smollm2-135m/regenerate.yaml --data.train my.jsonl",
        "compressor.training.config:RunConfig",
        flags={"dry_run": "show settings, batch arithmetic, parameter counts and memory, then stop"},
        needs_options=True,
    ),
    "evaluate": Command(
        "compressors",
        "measure a compressor: regeneration, questions, tasks, studies; the same as evaluate.py",
        "python evaluate.py --task regeneration --data arxiv-test --lengths 96 --limit 10 --output outputs/it",
        "options:evaluation_settings",
        flags={
            "overwrite": "replace the output folder if it holds an earlier evaluation",
            "resume": "go on with an evaluation that was interrupted, if there is one in the output folder",
            "wandb": "give settings, table and figures to wandb as a run of its own, too (extra tracking)",
        },
        needs_options=True,
    ),
    "corpus": Command(
        "data",
        "build a corpus of abstracts (Parquet files and a manifest) from arXiv, files or the hub",
        "compressor corpus --config configs/corpora/arxiv-snapshot.yaml --source FILE --output outputs/arxiv",
        "compressor.data.builders.choice:CorpusConfig",
        ("source",),
        {"overwrite": "replace the output folder if it is a corpus built earlier"},
        place="building:corpus",
    ),
    "questions": Command(
        "data",
        "build extractive questions about abstracts (by rules, or an instruct model) and a manifest",
        "compressor questions outputs/arxiv --config configs/corpora/arxivqa-rules.yaml --output outputs/questions",
        "compressor.data.builders.arxivqa:ArxivQAConfig",
        ("source",),
        {"overwrite": "replace the output folder if this command built it earlier"},
        place="building:questions",
    ),
    "entities": Command(
        "data",
        "make instructions that ask for the names in texts, labelled by spaCy, by columns or spans, or by questions",
        "compressor entities texts.jsonl --output outputs/entities.jsonl",
        "compressor.data.builders.entities:EntitiesConfig",
        ("source",),
        OVERWRITE,
        "building:entities",
    ),
    "pack": Command(
        "text without loss",
        "pack files, used as gzip is: without loss under the base's predictions, or by a text codec (--codec)",
        "compressor pack notes.txt",
        None,
    ),
    "unpack": Command(
        "text without loss",
        "unpack what `compressor pack` packed",
        "compressor unpack notes.txt.cz",
        None,
        place="pack:unpack",
    ),
}
"""In the order in which people come to them. A new one is a module and a line here."""


def usage() -> str:
    """The sub-commands in their groups, with a line each."""
    width, group = max(map(len, COMMANDS)), ""
    lines = ["usage: compressor COMMAND [options]"]
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<{width}}  {command.summary}")
    last = "compressor COMMAND --help lists its options and shows an example, compressor --version tells the version."
    return "\n".join([*lines, "", last])


def run(name: str, argv: list[str]) -> int:
    """Run a sub-command with its arguments; returns the exit status."""
    command = COMMANDS[name]
    if command.needs_options and not argv:
        raise CompressorError(
            f"{name} was given no option, and its defaults run for long: say what to {name}, for example\n"
            f"  {command.example}\n(compressor {name} --help lists the options)"
        )
    place = command.place or f"{name}:run"
    if command.options is None:
        return load(place, PACKAGE)(argv)
    own, rest = (argv[: (at := argv.index("--"))], argv[at + 1 :]) if command.passes_on and "--" in argv else (argv, [])
    config = load(command.options, PACKAGE)
    kind = config if isinstance(config, type) else config(own)
    options, switches = parse_config(kind, own, f"compressor {name}: {command.summary}", command.flags, command.plain)
    switches.argv, switches.rest = own, rest
    if command.flags is OVERWRITE and options.output:
        read = [getattr(options, one, None) for one in (*command.plain, "calibration")]
        check_file(options.output, switches.overwrite, [one for one in read if one is not None])
    return load(place, PACKAGE)(options, switches) or 0


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` (by default the process's own arguments) names first.

    Returns the exit status: 0, or 2 when the user can fix what was wrong (the message says how).
    """
    # Large tensors in pages of 2 MiB: a tenth less time for a training step on a CPU. torch reads this once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if argv is None:
        warn_plainly()
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else 2
    if name == "--version":
        print(f"compressor {VERSION}")
        return 0
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    try:
        return run(name, rest)
    finally:
        if {"-h", "--help"} & set(rest):
            print(f"\nexample:\n  {COMMANDS[name].example}")


def warn_plainly() -> None:
    """Python's warnings as this process's commands have theirs: without the file and the line that they come from."""
    warnings.showwarning = lambda message, *where, **more: note(f"warning: {message}")


def script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the script of this name, which is the sub-command; returns the exit status."""
    if argv is None:
        warn_plainly()
    return main([name, *(sys.argv[1:] if argv is None else argv)])


train_main, evaluate_main, demo_main = (partial(script, name) for name in ("train", "evaluate", "demo"))

if __name__ == "__main__":
    sys.exit(main())
