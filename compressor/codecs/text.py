"""Text codecs: a text as something short from which the base writes it again, alike (lossy) or the same.

prepare -> encode -> transmit -> decode: what stands for the text is chosen (keywords, a summary, an embedding, a
memory), becomes bytes, and a base that both sides have writes a text from them. It does so in float64, with the
sampling that the file states, so that a file stands for one text: its checksum is in the file, and another text is
never given.

    magic | version and flags | codec | base's identity | CRC-32 of the text | sampling | body | CRC-32 of all before

A new codec is a subclass of `TextCodec` and a line in `TEXT_CODECS`.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from compressor.codecs.blocks import Damaged, read_varint, varint
from compressor.codecs.exact import IDENTITY_BYTES, ExactBase, double_precision
from compressor.errors import CompressorError
from compressor.generation import Sampling, generate
from compressor.memory import Memory, Prefix

if TYPE_CHECKING:
    from compressor.base import Base
    from compressor.codecs.calibration import Calibration
    from compressor.model import Compressor

MAGIC, VERSION = 0xCD, 0x10
_SAMPLED = 1
_HEAD = 3 + IDENTITY_BYTES + 4
OVERHEAD = _HEAD + 4
"""Bytes of a file besides sampling and body."""
MOST_PIECES = 1 << 12
"""Most pieces of a text that a file may have."""
MOST_TOKENS = 1 << 12
"""Most tokens of a piece."""
TEXT_CODECS: dict[str, str] = {
    "keywords": "text_prompts:KeywordsCodec",
    "summary": "text_prompts:SummaryCodec",
    "sentence-embedding": "text_codecs:EmbeddingCodec",
    "memory": "text_codecs:MemoryCodec",
}
"""Where each codec is."""


@dataclass
class Needs:
    """What codecs work with; each is loaded when a codec first asks for it.

    Attributes:
        load_base: gives the base that writes.
        load_model: gives the compressor, for codecs that need one.
        load_calibration: gives the calibration of the memory's codec, None where there is none.
        tokens: size of what stands for a text (for each piece of it): tokens of the prompt, or memory tokens.
        memory_codec: how memories are coded (`Codec.parse`).
        bits: of each number of an embedding, 8, 4, 3 or 2.
        template: prompt around keywords or summary, with `{prompt}` in it; None for the codec's own.
        summariser: see `methods.summary`.
        keyword_language: see `methods.keywords`.
        batch: rows the base writes at a time.
        refine_steps: gradient steps on each memory (`compressor/refinement.py`).
    """

    load_base: Callable[[], Base | ExactBase]
    load_model: Callable[[], Compressor] | None = None
    load_calibration: Callable[[], Calibration | None] = lambda: None
    tokens: int | None = None
    memory_codec: str = "bf16"
    bits: int = 8
    template: str | None = None
    summariser: str | None = None
    keyword_language: str = "en"
    batch: int = 16
    refine_steps: int = 0

    @cached_property
    def exact(self) -> ExactBase:
        """The base in float64."""
        base = self.load_base()
        return base if isinstance(base, ExactBase) else ExactBase(base)

    @cached_property
    def model(self) -> Compressor:
        """The compressor."""
        if self.load_model is None:
            raise CompressorError("this codec needs a compressor's checkpoint: name it with --checkpoint")
        return self.load_model()

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration of the memory's codec."""
        return self.load_calibration()


class TextCodec(ABC):
    """A way of sending a text. Lists hold an entry for each text, so that the base writes several at a time."""

    name: ClassVar[str]
    number: ClassVar[int]
    """By which files name the codec; never reused."""
    sampling: ClassVar[Sampling] = Sampling()
    """How the base writes, where nothing else is asked for."""

    def __init__(self, needs: Needs):
        self.needs = needs

    @abstractmethod
    def prepare(self, texts: Sequence[str]) -> list[Any]:
        """What will stand for each text."""

    @abstractmethod
    def encode(self, prepared: Any) -> bytes:
        """What was prepared for one text, as bytes."""

    @abstractmethod
    def decode(self, bodies: Sequence[bytes], sampling: Sampling) -> list[str]:
        """The texts that the base writes from what `encode` returned.

        Raises:
            CompressorError: a body is damaged, or was made with something else than what is there.
        """

    @abstractmethod
    def decoder_tokens(self, prepared: Any) -> int:
        """Positions of the decoder's context that stand for the text."""

    def memories(self, bodies: Sequence[bytes]) -> list[Memory] | None:
        """What a decoder reads instead of the texts, if it is memories."""
        return None

    def write(
        self, prefix: Prefix, prompts: Sequence[Sequence[int]], limits: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """Token ids that the base writes after each row of a float64 prefix, at most `limits`."""
        found: list[list[int]] = []
        base, step = self.needs.exact.base, max(1, self.needs.batch)
        for start in range(0, len(prompts), step):
            rows = slice(start, start + step)
            with double_precision():
                chosen = prefix.select(_range(prefix, start, min(start + step, len(prompts))))
                written = generate(base, chosen, prompts[rows], limits[rows], sampling)
            found += [one.ids for one in written]
        return found


def _range(prefix: Prefix, start: int, end: int) -> Any:
    import torch

    return torch.arange(start, end, device=prefix.mask.device)


@dataclass(frozen=True)
class Packed:
    """A text that was packed."""

    blob: bytes
    """What is stored or sent."""
    text: str
    """What `unpack_text` gives."""
    decoder_tokens: int
    """Positions of the decoder's context that stand for the text."""
    body: bytes = b""
    """What the codec made of the text, which is in the file."""


def text_codec(name: str, needs: Needs) -> TextCodec:
    """The codec of a name in `TEXT_CODECS`."""
    if name not in TEXT_CODECS:
        raise CompressorError(f"there is no text codec {name!r}: choose lossless, {', '.join(TEXT_CODECS)}")
    module, _, attribute = TEXT_CODECS[name].partition(":")
    return getattr(import_module(f"compressor.codecs.{module}"), attribute)(needs)


def pack_texts(texts: Sequence[str], codec: TextCodec, sampling: Sampling | None = None) -> list[Packed]:
    """Pack texts, each apart; the base writes them as unpacking will, and the checksum of that goes into the file.

    Raises:
        CompressorError: an empty text, no valid Unicode, or what the codec needs is missing.
    """
    sampling = quantised(codec.sampling if sampling is None else sampling)
    for text in texts:
        try:
            empty = not text.encode().strip()
        except UnicodeEncodeError:
            raise CompressorError("a text holds lone surrogates, which no file of text can: remove them") from None
        if empty:
            raise CompressorError(f"the codec {codec.name} takes text, and there is none: pack it without --codec")
    prepared = codec.prepare(texts)
    bodies = [codec.encode(one) for one in prepared]
    written = codec.decode(bodies, sampling)
    settings, flags = b"", 0
    if sampling.temperature > 0:
        flags = _SAMPLED
        settings = bytes([_hundredths(sampling.temperature, "temperature"), _hundredths(sampling.top_p, "top_p")])
        settings += varint(sampling.top_k or 0) + varint(sampling.seed)
    packed = []
    for one, body, text in zip(prepared, bodies, written, strict=True):
        head = bytes([MAGIC, VERSION | flags, codec.number]) + codec.needs.exact.identity
        blob = head + zlib.crc32(text.encode()).to_bytes(4, "little") + settings + body
        packed.append(Packed(blob + zlib.crc32(blob).to_bytes(4, "little"), text, codec.decoder_tokens(one), body))
    return packed


def quantised(sampling: Sampling) -> Sampling:
    """The sampling as a file can state it: temperature and top_p in hundredths."""
    temperature = _hundredths(sampling.temperature, "temperature") / 100
    top_p = _hundredths(sampling.top_p, "top_p") / 100
    if not 0 <= sampling.seed < 1 << 31:
        raise CompressorError(f"seed = {sampling.seed}: give a whole number from 0 to {(1 << 31) - 1}")
    return Sampling(temperature, sampling.top_k, top_p, sampling.seed)


def _hundredths(value: float, name: str) -> int:
    if not 0 <= round(value * 100) <= 255 or (value > 0 and round(value * 100) == 0):
        raise CompressorError(f"sampling {name} = {value} cannot be stored: give 0, or 0.01 to 2.55")
    return round(value * 100)


def is_text_file(blob: bytes) -> bool:
    """Whether this begins as a file of a text codec."""
    return len(blob) > 1 and blob[0] == MAGIC and blob[1] & 0xF0 == VERSION


def unpack_text(blob: bytes, needs: Needs) -> str:
    """The text that a packed file stands for, the same each time.

    Raises:
        CompressorError: no such file, a newer one, a damaged one, made with another base or compressor, or the base
            does not write here what it wrote when the text was packed.
    """
    if not blob or blob[0] != MAGIC or len(blob) < _HEAD + 4:
        raise CompressorError("this is not a file of a text codec: it does not begin as one, or is cut off")
    if blob[1] & 0xF0 != VERSION:
        raise CompressorError(f"this file has version {blob[1] >> 4}, this program reads {VERSION >> 4}: update it")
    if zlib.crc32(blob[:-4]).to_bytes(4, "little") != blob[-4:]:
        raise CompressorError("this file is damaged: its checksum does not match; get or make it again")
    by_number: dict[int, TextCodec] = {}
    for name in TEXT_CODECS:
        codec = text_codec(name, needs)
        by_number[codec.number] = codec
    if blob[2] not in by_number or blob[1] & 0x0F & ~_SAMPLED:
        raise CompressorError(f"this file needs a text codec (number {blob[2]}) that this version lacks: update it")
    codec = by_number[blob[2]]
    identity, check = blob[3 : 3 + IDENTITY_BYTES], blob[3 + IDENTITY_BYTES : _HEAD]
    exact = needs.exact
    if identity != exact.identity:
        raise CompressorError(
            f"this file was packed with another base (weights and vocabulary {identity.hex()}) than {exact.base.name} "
            f"({exact.identity.hex()}): give the one it was packed with by --base"
        )
    try:
        place, sampling = _HEAD, Sampling()
        if blob[1] & _SAMPLED:
            temperature, top_p = blob[place] / 100, blob[place + 1] / 100
            top_k, place = read_varint(blob, place + 2)
            seed, place = read_varint(blob, place)
            sampling = Sampling(temperature, top_k or None, top_p, seed)
        (text,) = codec.decode([blob[place:-4]], sampling)
    except Damaged as error:
        raise CompressorError(f"this file is damaged: {error}") from None
    except (IndexError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        if isinstance(error, CompressorError):
            raise
        raise CompressorError(f"this file is damaged: it does not describe a text ({error!r})") from None
    if zlib.crc32(text.encode()).to_bytes(4, "little") != check:
        raise CompressorError(
            "the base does not write here what it wrote when this file was packed (checksum): another version of torch "
            "or transformers, or another kind of processor, rounds otherwise; unpack it where it was packed"
        )
    return text
