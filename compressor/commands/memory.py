"""What `compressor compress`, `calibrate` and `inspect` do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError, require
from compressor.model.bases import default_checkpoint
from compressor.model.config import BaseMismatch
from compressor.progress import Progress, note
from compressor.storage.making import Making

if TYPE_CHECKING:
    from compressor.model.base import Base

MOST_PARAMETERS = 500_000_000
"""Parameters of the largest base under which kept texts are packed: it is evaluated in float64."""


@dataclass(kw_only=True)
class MakeOptions(Making):
    """What commands that make memories take."""

    output: str
    """What to write."""
    warn_below: float = 0.9
    """Warn of memories from which a smaller share of the text comes back."""
    checkpoint: str = ""
    """Compressor checkpoint: folder or hub id; by default the bundled one of smollm2-135m where this base is at hand
    (`compressor fetch smollm2-135m`), else that of arxiv-mini."""
    base: str | None = None
    """Frozen base: folder, hub id, GGUF file or name; by default the one the checkpoint names."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: take a base with other weights than the checkpoint was trained on, with a warning."""
    keep_text: bool = False
    """Keep the text with the memory."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checkpoint = self.checkpoint or default_checkpoint()
        require(0 <= self.warn_below <= 1, "warn_below", self.warn_below, "0 to 1")


@dataclass(kw_only=True)
class CompressOptions(MakeOptions):
    """What `compressor compress` takes."""

    text: str
    """File with the passage, or - for standard input."""
    output: str
    """Memory file to write."""
    keep_text: bool = False
    """Keep the text with the memory, packed under the base's predictions (about a second for each 100 tokens), for
    `compressor regenerate --exact`."""
    speech: str | None = None
    """Speech recogniser (folder or hub id) of a WAV file."""


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
    """Memory file, store or calibration."""


def is_corpus(source: str) -> bool:
    """Whether this holds many texts: a data file, a folder, a glob, several or a shipped name.

    A text file is one passage, by itself as in a folder.
    """
    from compressor.data.sources import kind_of, shipped_names

    path = Path(source)
    if path.exists():
        return path.is_dir() or kind_of(path) not in (None, ".txt")
    return kind_of(path) not in (None, ".txt") or any(mark in source for mark in "*?[,") or source in shipped_names()


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


def compress_text(options: CompressOptions) -> str:
    """Compress one passage into a memory file; returns a line about it."""
    from compressor.commands.shown import tokens_named
    from compressor.data.speech import is_speech, transcribe
    from compressor.data.text_files import read_text

    if is_corpus(options.text):
        raise CompressorError(
            f"{options.text} holds many texts: `compressor index {options.text} --output STORE` makes a store of them"
        )
    codec = options.chosen_codec()
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
    (memory,), respelled = options.memories(model, [passage], codec)
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


def warn_of_losses(shares: Mapping[str, float | None], respelled: Sequence[Any], options: MakeOptions) -> None:
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
