"""`compressor compress`: a text into a memory file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compressor.commands.loading import load_model, read_passage
from compressor.commands.options import CompressOptions, MakeOptions
from compressor.commands.shown import tokens_named
from compressor.data import speech
from compressor.model.checkpoint import compressor_name
from compressor.model.memory import signed
from compressor.packing.float64 import ExactBase
from compressor.packing.lossless import pack_passage
from compressor.progress import note
from compressor.storage.memorise import chosen_codec, memories_of

MOST_PARAMETERS = 500_000_000
"""Parameters of the largest base under which kept texts are packed."""


def run(options: CompressOptions, switches: Any) -> None:
    """Compress one passage into a memory file, and print a line about it."""
    codec = chosen_codec(options)
    if speech.is_speech(options.text):
        passage = speech.transcribe(options.text, options.speech, options.device)
    else:
        passage = read_passage(options.text, as_written=options.keep_text)
    model = load_model(options)
    # A byte order mark is kept with the text, and is no part of what the memory says.
    (memory,), respelled = memories_of(options, model, [passage.removeprefix("\ufeff")], codec)
    memory = signed(memory, model.base, compressor_name(model, options.checkpoint))
    if options.keep_text:
        # A larger base would take long in float64; what rounded weights packed, those held otherwise cannot unpack.
        small = sum(parameter.numel() for parameter in model.base.parameters()) <= MOST_PARAMETERS
        exact = small and model.base.dtype == torch.float32
        memory = replace(memory, text=pack_passage(passage, ExactBase(model.base) if exact else None))
    size = len(passage.encode())
    memory.save(options.output, codec, size)
    text = "" if memory.text is None else f" (of which {len(memory.text):,} are the text)"
    share = "" if memory.fidelity is None else f"\n{memory.fidelity:.1%} of the text comes back"
    warn_of_losses({options.text: memory.fidelity}, respelled, options)
    print(
        f"{memory.passage_tokens} tokens -> {tokens_named(memory.tokens)} in {len(memory.segments)} segment(s); "
        f"{size:,} bytes of text -> {Path(options.output).stat().st_size:,} bytes{text}: {options.output}{share}"
    )


def warn_of_losses(shares: Mapping[str, float | None], respelled: Sequence[Any], options: MakeOptions) -> None:
    """Say on standard error of how many texts too little comes back, and what to do."""
    measured = {name: share for name, share in shares.items() if share is not None}
    threshold = options.warn_below if options.target_fidelity is None else options.target_fidelity
    short = {name: share for name, share in measured.items() if share < threshold}
    more = "" if options.tokens is None else "more --tokens, "  # by default all are in use
    advice = f"give {more}shorter segments (--segment-tokens) or --refine-steps"
    advice += "; the text is kept too" if options.keep_text else ", or keep the text in the file with --keep-text"
    if short:
        worst = min(short, key=lambda name: short[name])
        which = f"only {short[worst]:.1%} of {worst} comes back, where {threshold:.0%} is asked for"
        if len(shares) > 1:
            which = f"of {len(short):,} of {len(shares):,} texts less than {threshold:.0%} comes back"
            which += f" ({short[worst]:.1%} of {worst})"
        note(f"warning: {which}: {advice}")
    if respelled:
        which = (
            f"{len(respelled):,} of {len(shares):,} texts ({respelled[0]}{', ...' * (len(respelled) > 1)})"
            if len(shares) > 1
            else "the text"
        )
        note(
            f"warning: the base's tokenizer cannot spell {which} as it stands, so that it cannot come back in full "
            "whatever the memory holds: " + ("the text is kept" if options.keep_text else "keep it with --keep-text"),
        )
