"""What `compressor compress`, `calibrate` and `inspect` do."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.errors import CompressorError, require
from compressor.files import owned
from compressor.model.bases import default_checkpoint
from compressor.model.config import BaseMismatch
from compressor.progress import Progress, note

if TYPE_CHECKING:
    from compressor.api import Compressor
    from compressor.model.base import Base
    from compressor.model.memory import Memory
    from compressor.storage.codec import Codec

MOST_PARAMETERS = 500_000_000
"""Parameters of the largest base under which kept texts are packed: it is evaluated in float64."""


@dataclass
class CompressOptions:
    """What `compressor compress` takes."""

    text: str
    """File with the passage (text, or speech in a WAV file), or - for standard input; or a corpus (JSONL, JSON, CSV,
    TSV, Parquet, a corpus folder, a shipped name), each record of which becomes a memory of a collection, as each text
    file of a folder does."""
    output: str
    """Memory file to write; for a corpus the folder of the collection, which is continued if it exists."""
    tokens: int | None = None
    """Memory tokens for each segment; by default all the compressor has."""
    segment_tokens: int | None = None
    """Compress in segments of at most so many tokens; by default segments are as long as the compressor takes."""
    refine_steps: int = 0
    """Gradient steps on each memory: 10 to 50 keep far more with few memory tokens, and take as many times as long."""
    target_fidelity: float | None = None
    """Take for each text the fewest memory tokens, up to --tokens, from which this share of it comes back."""
    warn_below: float = 0.9
    """Warn of memories from which a smaller share of the text comes back."""
    no_measure: bool = False
    """Do not regenerate from the memories to see how much comes back (which takes longer the less does)."""
    checkpoint: str = ""
    """Compressor checkpoint: folder or hub id; by default the bundled one of smollm2-135m where this base is at hand
    (`compressor fetch smollm2-135m`), else that of arxiv-mini."""
    base: str | None = None
    """Frozen base: folder, hub id, GGUF file or name; by default the one the checkpoint names."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: take a base with other weights than the checkpoint was trained on, with a warning."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that keys and values are stored in, where --codec does not say."""
    codec: str | None = None
    """float32, float16, bf16, int8, int4, int3, int2 or lowrank:RATE; with +ans, +range or +huffman it is coded."""
    calibration: str | None = None
    """What `compressor calibrate` wrote: for lowrank, and for integers without steps of their own."""
    drop_layers: list[int] = field(default_factory=list)
    """Layers that are not stored."""
    keep_text: bool = False
    """Keep the text with the memory, packed under the base's predictions (about a second for each 100 tokens), for
    `compressor regenerate --exact`."""
    speech: str | None = None
    """Speech recogniser (folder or hub id) of a WAV file."""
    device: str = "cpu"
    batch_size: int = 16
    """Segments compressed together."""
    shard_size: int = 256
    """Memories in a file of a collection: what a killed run loses at most, for each process."""
    text_field: str | None = None
    """Field of a corpus that holds the passage; by default text or abstract."""
    limit: int | None = None
    """Only the first so many records of a corpus."""
    skip_bad_records: bool = False
    """Leave records of a corpus out that are null, blank or broken, up to one in twenty, and count them in the
    collection; otherwise the first of them is an error."""

    def __post_init__(self) -> None:
        self.checkpoint = self.checkpoint or default_checkpoint()
        for name in ("batch_size", "shard_size", "segment_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.refine_steps >= 0, "refine_steps", self.refine_steps, "at least 0")
        require(0 <= self.warn_below <= 1, "warn_below", self.warn_below, "0 to 1")
        if self.target_fidelity is not None:
            require(0 < self.target_fidelity <= 1, "target_fidelity", self.target_fidelity, "above 0 and at most 1")
            require(not self.no_measure, "no_measure", True, "left out with target_fidelity, which is measured")


@dataclass
class CalibrateOptions:
    """What `compressor calibrate` takes."""

    output: str
    """Calibration to write, a safetensors file."""
    data: str = "arxiv-train"
    """Passages like those to be compressed, not those to be evaluated on: a file, corpus folder or shipped name."""
    checkpoint: str = ""
    """Compressor checkpoint: folder or hub id; by default the bundled one of smollm2-135m where this base is at hand
    (`compressor fetch smollm2-135m`), else that of arxiv-mini."""
    base: str | None = None
    """Frozen base; by default the one the checkpoint names."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: take a base with other weights than the checkpoint was trained on, with a warning."""
    tokens: int | None = None
    """Memory tokens; by default all the compressor has."""
    lengths: list[int] = field(default_factory=lambda: [96, 192, 384])
    """Passages are cut to these lengths in turn; those that are shorter are taken whole."""
    limit: int = 600
    """Passages to compress."""
    skip_bad_records: bool = False
    """Leave passages out that are null, blank or broken, up to one in twenty."""
    rank: int = 384
    """Most principal components."""
    sensitivity: int = 150
    """Passages on which the decoder's sensitivity is measured; 0 weighs all channels alike."""
    device: str = "cpu"
    resume: bool = False
    """Go on with a calibration that was interrupted, if there is one."""

    def __post_init__(self) -> None:
        self.checkpoint = self.checkpoint or default_checkpoint()
        require(self.limit >= 8, "limit", self.limit, "at least 8")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.sensitivity >= 0, "sensitivity", self.sensitivity, "at least 0")
        require(bool(self.lengths) and min(self.lengths) >= 1, "lengths", self.lengths, "token counts of at least 1")


@dataclass
class InspectOptions:
    """What `compressor inspect` takes."""

    file: str
    """Memory file, collection or calibration."""


def is_corpus(source: str) -> bool:
    """Whether `compress` makes a collection of this: a data file, a folder, a glob, several or a shipped name.

    A text file is one passage, by itself as in a folder.
    """
    from compressor.data.sources import kind_of, shipped_names

    path = Path(source)
    if path.exists():
        return path.is_dir() or kind_of(path) not in (None, ".txt")
    return kind_of(path) not in (None, ".txt") or any(mark in source for mark in "*?[,") or source in shipped_names()


def chosen_codec(options: CompressOptions) -> Any:
    """The `Codec` that the options describe."""
    from compressor.storage.codec import Codec

    name = options.codec or {"bfloat16": "bf16"}.get(options.dtype, options.dtype)
    return Codec.parse(name, options.calibration, options.drop_layers)


def text_packer(options: CompressOptions, base: Base) -> Callable[[str], bytes | None]:
    """What packs a text to be kept with its memory, if the options ask for it."""
    if not options.keep_text:
        return lambda text: None
    from compressor.packing.lossless import pack_passage

    if sum(parameter.numel() for parameter in base.parameters()) > MOST_PARAMETERS:
        return pack_passage
    from compressor.packing.float64 import ExactBase

    exact = ExactBase(base)
    return lambda text: pack_passage(text, exact)


def chosen_sizes(options: CompressOptions) -> dict[str, Any]:
    """Arguments of `Compressor.compress` that say how much is compressed to how little, and how much at a time."""
    return {name: getattr(options, name) for name in ("tokens", "batch_size", "segment_tokens", "refine_steps")}


def how_made(options: CompressOptions, model: Compressor) -> dict[str, float]:
    """Numbers that a collection's memories are made with, besides what each of them states."""
    most = model.config.max_passage_tokens
    return {
        "segment_tokens": min(options.segment_tokens or most, most),
        "refine_steps": options.refine_steps,
        **({} if options.target_fidelity is None else {"target_fidelity": options.target_fidelity}),
        **({"keep_text": 1} if options.keep_text else {}),
    }


def compress_text(options: CompressOptions) -> str:
    """Compress one passage into a memory file; returns a line about it."""
    from compressor.commands.shown import tokens_named
    from compressor.data.speech import is_speech, transcribe
    from compressor.data.text_files import read_text

    codec = chosen_codec(options)
    if is_speech(options.text):
        passage = transcribe(options.text, options.speech, options.device)
    else:
        passage = read_text(options.text, as_written=options.keep_text)
    from compressor.api import Compressor
    from compressor.model.checkpoint import compressor_name
    from compressor.model.memory import signed

    model = Compressor.from_pretrained(
        options.checkpoint, base=options.base, device=options.device, base_mismatch=options.base_mismatch
    )
    (memory,), respelled = compressed(model, [passage], options, codec)
    memory = signed(memory, model.base, compressor_name(model, options.checkpoint))
    memory = replace(memory, text=text_packer(options, model.base)(passage))
    size = len(passage.encode())
    memory.save(options.output, codec, size)
    text = "" if memory.text is None else f" (of which {len(memory.text):,} are the text)"
    share = "" if memory.fidelity is None else f"\n{memory.fidelity:.1%} of the text comes back"
    warn_of_losses({options.text: memory.fidelity}, respelled, options)
    return (
        f"{memory.passage_tokens} tokens -> {tokens_named(memory.tokens)} in {len(memory.segments)} segment(s); "
        f"{size:,} bytes of text -> {Path(options.output).stat().st_size:,} bytes{text}: {options.output}{share}"
    )


def compressed(
    model: Compressor, texts: Sequence[str], options: CompressOptions, codec: Codec
) -> tuple[list[Memory], list[int]]:
    """Memories of texts, with the share that comes back of each from what its file will hold.

    Returns:
        The memories, and the numbers of the texts that the tokenizer does not spell as they are.
    """
    from compressor.model.fidelity import compress_to_fidelity, fidelities
    from compressor.storage.memory_file import as_stored

    tokenizer, sizes = model.base.tokenizer, chosen_sizes(options)
    ids = model.base.tokenise(texts)
    if options.target_fidelity is not None:
        with warnings.catch_warnings():
            # Those that fall short are named together, when all are done.
            warnings.filterwarnings("ignore", message=".*reach a fidelity", category=UserWarning)
            memories = compress_to_fidelity(
                model, ids, options.target_fidelity, stored=lambda memory: as_stored(memory, codec), **sizes
            )
    else:
        memories = model.compress_ids(ids, **sizes)
        if not options.no_measure:
            shares = fidelities(model, [as_stored(memory, codec) for memory in memories], ids, options.batch_size)
            memories = [replace(memory, fidelity=share) for memory, share in zip(memories, shares, strict=True)]
    spelled = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    return memories, [
        i for i, (text, back) in enumerate(zip(texts, spelled, strict=True)) if text.strip() != back.strip()
    ]


def warn_of_losses(shares: Mapping[str, float | None], respelled: Sequence[Any], options: CompressOptions) -> None:
    """Say on standard error of how many texts too little comes back, and what to do."""
    measured = {name: share for name, share in shares.items() if share is not None}
    threshold = options.warn_below if options.target_fidelity is None else options.target_fidelity
    short = {name: share for name, share in measured.items() if share < threshold}
    advice = "give more --tokens, shorter segments (--segment-tokens) or --refine-steps"
    advice += "; the text is kept too" if options.keep_text else ", or keep the text in the file with --keep-text"
    if short:
        worst = min(short, key=lambda name: short[name])
        which = f"only {short[worst]:.1%} of {worst} comes back, where {threshold:.0%} is asked for"
        if len(shares) > 1:
            which = f"of {len(short):,} of {len(shares):,} texts less than {threshold:.0%} comes back"
            which += f" ({short[worst]:.1%} of {worst})"
        note(f"warning: {which}: {advice}")
    if respelled:
        which = f"{len(respelled):,} of {len(shares):,} texts ({respelled[0]}, ...)" if len(shares) > 1 else "the text"
        note(
            f"warning: the base's tokenizer cannot spell {which} as it stands, so that it cannot come back in full "
            "whatever the memory holds: " + ("the text is kept" if options.keep_text else "keep it with --keep-text"),
        )


def compress_corpus(options: CompressOptions) -> str:
    """Compress the records of a corpus into a collection, on all processes; returns lines about it."""
    codec = chosen_codec(options)
    if Path(options.output).is_file():
        raise CompressorError(f"{options.output} is a file: a corpus becomes a folder, choose another --output")
    from compressor.processes import make_accelerator

    accelerator = make_accelerator()
    with owned(options.output) if accelerator.is_main_process else nullcontext():
        return _compress_corpus(options, codec, accelerator)


def _compress_corpus(options: CompressOptions, codec: Any, accelerator: Any) -> str:
    import torch
    from accelerate.utils import gather_object

    from compressor.api import Compressor
    from compressor.data.left_out import LeftOut
    from compressor.data.records import load_texts
    from compressor.model.checkpoint import compressor_name
    from compressor.model.fingerprints import public_name
    from compressor.model.memory import signed
    from compressor.storage.collection import Collection, CollectionWriter, missing, text_hash
    from compressor.storage.inspection import describe

    device: Any = options.device
    if accelerator.num_processes > 1:
        device = accelerator.device
    left_out = LeftOut()
    with accelerator.main_process_first():
        records = load_texts(
            options.text,
            field=options.text_field,
            limit=options.limit,
            documents=True,
            skip_bad_records=options.skip_bad_records,
            left_out=left_out,
        )
    if left_out.total and accelerator.is_main_process:
        print(f"note: {left_out.line('records', len(records))}", file=sys.stderr)
    names, texts = list(records["id"]), list(records["text"])
    model = Compressor.from_pretrained(
        options.checkpoint, base=options.base, device=device, base_mismatch=options.base_mismatch
    )
    packed = text_packer(options, model.base)
    source: dict[str, Any] = {"name": public_name(options.text), "field": options.text_field, "limit": options.limit}
    source |= {"records": len(texts), "sha256": text_hash("\0".join([*names, *map(text_hash, texts)]))}
    if left_out.total:
        source["left_out"] = left_out.record()
    writer = CollectionWriter(options.output, codec, accelerator.process_index, source)
    stamp = signed(
        model.compress(texts[0], options.tokens, measure=False), model.base, compressor_name(model, options.checkpoint)
    )
    stamp = replace(stamp, made=stamp.made | how_made(options, model))
    if accelerator.is_main_process:
        writer.begin(stamp.to("cpu"))
    accelerator.wait_for_everyone()
    # Every process reads what is there before any of them adds to it.
    todo = missing(Collection(options.output, codec.calibration), names, texts)
    accelerator.wait_for_everyone()
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    progress = Progress("compressing", len(mine), "passages", accelerator.is_main_process)
    respelled: list[str] = []
    for start in range(0, len(mine), options.shard_size):
        chosen = mine[start : start + options.shard_size]
        memories = []
        for first in range(0, len(chosen), options.batch_size):
            together = chosen[first : first + options.batch_size]
            some = [texts[i] for i in together]
            found, odd = compressed(model, some, options, codec)
            respelled += [names[together[number]] for number in odd]
            for text, memory in zip(some, found, strict=True):
                origin = {name: getattr(stamp, name) for name in ("compressor", "tokenizer", "base_name")}
                memories.append(replace(memory.to("cpu", torch.float32), text=packed(text), **origin))
            progress.add(len(some))
        writer.write([names[i] for i in chosen], [texts[i] for i in chosen], memories)
    progress.close()
    respelled = gather_object(respelled)
    if not accelerator.is_main_process:
        return ""
    shares = Collection(options.output, codec.calibration).fidelities()
    warn_of_losses({names[i]: shares.get(names[i]) for i in todo}, respelled, options)
    done = f"compressed {len(todo):,} passages, {len(names) - len(todo):,} were there already\n"
    return done + describe(options.output)


def calibrate_codecs(options: CalibrateOptions, again: bool = False) -> str:
    """Fit a calibration and write it; returns lines about it.

    Args:
        again: start again where one was interrupted.
    """
    from compressor.api import Compressor
    from compressor.data.records import load_texts
    from compressor.model.checkpoint import compressor_name
    from compressor.storage.fitting import calibrate
    from compressor.storage.inspection import describe
    from compressor.unfinished import Unfinished

    parts = Unfinished(Path(f"{options.output}.unfinished"), options.resume, again)
    parts.start()
    records = load_texts(options.data, limit=options.limit, skip_bad_records=options.skip_bad_records)
    model = Compressor.from_pretrained(
        options.checkpoint, base=options.base, device=options.device, base_mismatch=options.base_mismatch
    )
    encoded = model.base.tokenise(records["text"])
    most = model.config.max_passage_tokens
    lengths = [min(length, most) for length in options.lengths]
    passages = [ids[: lengths[i % len(lengths)]] for i, ids in enumerate(encoded) if ids]
    progress = Progress("compressing", len(passages), "passages")
    name = compressor_name(model, options.checkpoint)
    parts.expect(
        {
            "settings": {"tokens": options.tokens, "sensitivity": options.sensitivity},
            "passages": hashlib.sha256(json.dumps(passages).encode()).hexdigest(),
            "compressor": name,
        }
    )
    with parts.interruptible("the same command with --resume goes on"):
        fitted = calibrate(
            model, passages, options.tokens, options.rank, options.sensitivity, name, progress.add, parts
        )
        progress.close()
        fitted.save(options.output)
    parts.remove()
    return describe(options.output)
