"""`compressor transcribe`: what is said in a WAV file."""

from __future__ import annotations

from typing import Any

from compressor.commands.options import TranscribeOptions
from compressor.data import speech
from compressor.files import atomic_file
from compressor.streams import write_output


def run(options: TranscribeOptions, switches: Any) -> None:
    """Write it down."""
    text = speech.transcribe(options.audio, options.speech, options.device)
    if not options.output:
        write_output(text)
        return
    with atomic_file(options.output) as path:
        path.write_text(text + "\n", encoding="utf-8")
