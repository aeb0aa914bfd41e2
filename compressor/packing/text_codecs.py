"""Text codecs: a text as keywords, a summary or an embedding, from which a causal language model writes one like it.

    magic | version and flags | codec | writer's identity | CRC-32 of the text | sampling | body | CRC-32 of all before

Nothing is placed among a model's keys and values, so any causal LM of transformers writes, GPT-2 too. It writes in
float64, with the sampling that the file states, so that a file stands for one text: its checksum is in the file, and
another text is never given.
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.data.batches import equal_segments, pad, start_token, tokenise
from compressor.errors import CompressorError, first_line
from compressor.methods.interface import TextMethod
from compressor.methods.keywords import Keywords
from compressor.methods.sentence_embedding import SentenceEmbeddingEncoder
from compressor.methods.summary import Summary
from compressor.model.bases import locate, remedy
from compressor.model.checkpoint import compressor_fingerprint
from compressor.model.generation import Sampling
from compressor.model.network import Network
from compressor.model.table import load
from compressor.packing.blocks import Damaged, Reader, read_varint
from compressor.packing.float64 import IDENTITY_BYTES, double_precision, identity_of
from compressor.packing.table import TEXT_CODECS
from compressor.processes import bars_on_terminals, check_device
from compressor.storage.entropy import varint
from compressor.storage.quantise import pack, unpack

MAGIC, VERSION = 0xCD, 0x30
_SAMPLED = 1
_HEAD = 3 + IDENTITY_BYTES + 4
SUMMARY_TOKENS = 48
"""Most tokens of a summary where none is asked for: a sentence takes more than a few keywords."""
PIECE = 480
"""Most tokens of a text that one prompt stands for."""
_MOST = 1 << 12
"""Most pieces of a text, and most tokens of a piece, that a file may have."""
_DIGEST = 8


class Writer:
    """A causal LM in float64, adapters off, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.double().eval(), tokenizer
        self.device = next(model.parameters()).device
        self.identity = identity_of(tokenizer, model)

    @staticmethod
    def load(path: str, device: str = "cpu") -> Writer:
        """Any causal LM that transformers loads: a folder, a hub id, or a base by name."""
        check_device(device)
        try:
            place = locate(path)
            with bars_on_terminals():
                model: Any = AutoModelForCausalLM.from_pretrained(place)
            return Writer(model.to(device), AutoTokenizer.from_pretrained(place))
        except CompressorError:
            raise
        except Exception as error:  # transformers, the hub and safetensors raise many kinds
            raise CompressorError(
                f"cannot load the base {path!r} ({type(error).__name__}: {first_line(error)}): {remedy(path)}"
            ) from None

    def embed(self, ids: list[int]) -> Tensor:
        """Input embeddings of token ids, float64 `[tokens, hidden]`."""
        return self.model.get_input_embeddings()(torch.tensor(ids, device=self.device))

    def write(self, embedded: Tensor, limit: int, sampling: Sampling) -> str:
        """What the model writes after input embeddings `[tokens, hidden]`, at most `limit` tokens."""
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        end = self.tokenizer.eos_token_id
        devices = [self.device] if self.device.type == "cuda" else []
        with double_precision(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed)
            mask = torch.ones(1, len(embedded), dtype=torch.int64, device=self.device)
            new = self.model.generate(
                inputs_embeds=embedded[None],
                attention_mask=mask,
                max_new_tokens=limit,
                pad_token_id=end,
                eos_token_id=end,
                **drawn,
            )
        return self.tokenizer.decode(new[0], skip_special_tokens=True)


class Words:
    """Keywords or a summary, after which the model goes on; the text begins with them."""

    sampling: ClassVar[Sampling] = Sampling(temperature=0.7, top_p=0.9)

    def __init__(self, writer: Writer, tokens: int = 16, choose: Callable[[Any], Any] = Keywords):
        """`tokens`: most of the prompt for each piece of a text; `choose` makes the method that finds it."""
        if tokens < 1:
            raise CompressorError(f"tokens = {tokens}: give at least 1")
        self.writer, self.tokens, self.choose = writer, tokens, choose

    def encode(self, text: str) -> bytes:
        """Number of pieces, and for each its length in tokens and the prompt's token ids."""
        pieces = equal_segments(tokenise(self.writer.tokenizer, [text])[0], PIECE)
        method = self.choose(self.writer)
        if isinstance(method, TextMethod):
            texts = [self.writer.tokenizer.decode(piece, skip_special_tokens=True).strip() for piece in pieces]
            found = method.stand_ins(texts, self.tokens)
            chosen = [
                fitting(self.writer.tokenizer, one.strip() or text, self.tokens)
                for one, text in zip(found, texts, strict=True)
            ]
        else:
            chosen = [one.held for (one,) in method.compress(pieces, [self.tokens])[0]]
        body, vocabulary = varint(len(pieces)), len(self.writer.tokenizer)
        for piece, held in zip(pieces, chosen, strict=True):
            number = 0
            for token in held:
                number = number * vocabulary + token
            body += varint(len(piece)) + varint(len(held)) + number.to_bytes(_id_bytes(len(held), vocabulary), "little")
        return body

    def decode(self, body: bytes, sampling: Sampling) -> str:
        """The text that the model writes from a body."""
        reader, tokenizer, texts = Reader(body), self.writer.tokenizer, []
        for _ in range(reader.number(1, _MOST)):
            length, count = reader.number(1, _MOST), reader.number(1, _MOST)
            number = int.from_bytes(reader.bytes(_id_bytes(count, len(tokenizer))), "little")
            ids: list[int] = []
            for _ in range(count):
                number, token = divmod(number, len(tokenizer))
                ids.insert(0, token)
            # No line break follows: a small base would begin another text.
            shown = tokenizer.decode(ids, skip_special_tokens=True)
            (asked,) = tokenise(tokenizer, [shown])
            embedded = self.writer.embed([start_token(tokenizer), *asked])
            texts.append(shown + self.writer.write(embedded, max(8, length - len(asked)), sampling))
        reader.end()
        return "\n".join(texts)


def fitting(tokenizer: Any, text: str, most: int) -> list[int]:
    """Tokens of the beginning of a text, at most `most`: whole sentences if one fits, else keywords, else words."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if len(encoded["input_ids"]) <= most:
        return list(encoded["input_ids"])
    beyond = encoded["offset_mapping"][most][0]
    for end in (r"(?<=[.!?])(?=\s)", r"(?=,\s)", r"(?<=\S)(?=\s)"):
        ends = [match.start() for match in re.finditer(end, text) if match.start() <= beyond]
        if ends:
            return tokenise(tokenizer, [text[: ends[-1]]])[0][:most]
    return list(encoded["input_ids"][:most])


def _id_bytes(count: int, vocabulary: int) -> int:
    return ((vocabulary**count - 1).bit_length() + 7) // 8


class Embedding:
    """The embedding of a frozen text encoder, whose projection the base reads (`sentence-embedding`).

    The projection begins with a norm, so an embedding's length does not matter and no scale is sent. Both sides need
    the checkpoint.
    """

    sampling: ClassVar[Sampling] = Sampling()

    def __init__(self, model: Network, tokens: int | None = None, bits: int = 8):
        """`bits`: of a number of the embedding, 8, 4, 3 or 2."""
        if not isinstance(model.encoder, SentenceEmbeddingEncoder):
            raise CompressorError(
                "the codec sentence-embedding needs a checkpoint of the method sentence-embedding, this one is of "
                f"{model.config.method}: name one with --checkpoint"
            )
        self.model, self.encoder = model, model.encoder
        self.tokens, self.bits = tokens or model.config.memory_tokens, bits
        if not 1 <= self.tokens <= model.config.memory_tokens or bits not in (8, 4, 3, 2):
            raise CompressorError(
                f"tokens = {tokens}, bits = {bits}: the checkpoint has 1 to {model.config.memory_tokens} tokens, and "
                "bits are 8, 4, 3 or 2"
            )
        self.digest = bytes.fromhex(compressor_fingerprint(model))[:_DIGEST]
        self.writer = Writer(copy.deepcopy(model.base.model), model.base.tokenizer)

    def encode(self, text: str) -> bytes:
        """Hash of the checkpoint, bits, tokens, number of segments, their lengths, and the embeddings' integers."""
        (ids,) = self.model.base.tokenise([text])
        padded, lengths = pad(self.model.segment(ids), self.model.base.device)
        found, half = self.encoder.embed(self.model, padded, lengths).double().cpu(), 1 << (self.bits - 1)
        found = found - found.mean(dim=1, keepdim=True)
        scaled = found / found.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) * half
        integers = torch.floor(scaled).clamp(-half, half - 1).to(torch.int64).flatten().numpy()
        body = self.digest + bytes([self.bits]) + varint(self.tokens) + varint(len(lengths))
        return body + b"".join(map(varint, lengths.tolist())) + pack(integers, self.bits).tobytes()

    def decode(self, body: bytes, sampling: Sampling) -> str:
        """The text that the base writes from a body."""
        reader, encoder, most = Reader(body), self.encoder, self.model.config.memory_tokens
        if (theirs := reader.bytes(_DIGEST)) != self.digest:
            raise CompressorError(
                f"this file was packed with another checkpoint ({theirs.hex()[:12]}) than this one "
                f"({self.digest.hex()[:12]}): name it with --checkpoint"
            )
        (bits,) = reader.bytes(1)
        if bits not in (8, 4, 3, 2):
            raise Damaged(f"it has numbers of {bits} bits")
        tokens = reader.number(1, most)
        lengths = [reader.number(1, _MOST) for _ in range(reader.number(1, _MOST))]
        count = len(lengths) * encoder.norm.normalized_shape[0]
        integers = unpack(np.frombuffer(reader.bytes(-(-count * bits // 8)), dtype=np.uint8), bits, count)
        reader.end()
        values = torch.from_numpy(integers).double().view(len(lengths), -1).to(self.writer.device) + 0.5
        with double_precision():
            norm, projection = (copy.deepcopy(part).double() for part in (encoder.norm, encoder.projection))
            embedded = projection(norm(values)).view(len(lengths), most, -1)[:, :tokens]
        start = self.writer.embed([start_token(self.writer.tokenizer)])
        rows = zip(embedded, lengths, strict=True)
        return " ".join(self.writer.write(torch.cat([row, start]), length, sampling).strip() for row, length in rows)


@dataclass(frozen=True)
class Options:
    """What text codecs are made from."""

    base: str
    """The model that writes: folder, hub id, GGUF file or name."""
    load: Callable[[], Network]
    """Gives the compressor of codecs that need one."""
    device: str = "cpu"
    tokens: int | None = None
    bits: int = 8
    """Of a number of an embedding."""
    summariser: str | None = None


def keywords(options: Options) -> Words:
    """The codec `keywords`."""
    return Words(Writer.load(options.base, options.device), options.tokens or 16, Keywords)


def summary(options: Options) -> Words:
    """The codec `summary`."""
    writer = Writer.load(options.base, options.device)
    return Words(writer, options.tokens or SUMMARY_TOKENS, lambda writer: Summary(writer, options.summariser))


def sentence_embedding(options: Options) -> Embedding:
    """The codec `sentence-embedding`."""
    return Embedding(options.load(), options.tokens, options.bits)


def text_codec(name: str, options: Options) -> Words | Embedding:
    """The codec of a name in `TEXT_CODECS`."""
    return load(TEXT_CODECS[name].place, "compressor.packing")(options)


def pack_text(text: str, name: str, codec: Words | Embedding, sampling: Sampling | None = None) -> tuple[bytes, str]:
    """A file's bytes, and the text that unpacking them gives.

    Raises:
        CompressorError: an empty text, or sampling that a file cannot state.
    """
    sampling = codec.sampling if sampling is None else sampling
    if not text.strip():
        raise CompressorError(f"the codec {name} takes text, and there is none: pack it without --codec")
    stated = [round(100 * sampling.temperature), round(100 * sampling.top_p)]
    if not (0 <= stated[0] <= 255 and 0 <= sampling.seed < 1 << 31 and sampling.top_k is None):
        raise CompressorError(f"sampling {sampling} cannot be stored: temperature is 0 to 2.55, seed at least 0")
    sampling = Sampling(stated[0] / 100, None, max(1, stated[1]) / 100, sampling.seed)
    settings = bytes(stated) + varint(sampling.seed) if sampling.temperature else b""
    body = codec.encode(text)
    written = codec.decode(body, sampling)
    head = bytes([MAGIC, VERSION | bool(settings), TEXT_CODECS[name].number]) + codec.writer.identity
    blob = head + zlib.crc32(written.encode()).to_bytes(4, "little") + settings + body
    return blob + zlib.crc32(blob).to_bytes(4, "little"), written


def unpack_text(blob: bytes, load: Callable[[str], Words | Embedding]) -> str:
    """The text that a packed file stands for, the same each time; `load` gives the codec of a name.

    Raises:
        CompressorError: no such file, one of another version, a damaged one, made with another base or checkpoint, or
            the model does not write here what it wrote when the text was packed.
    """
    if not blob or blob[0] != MAGIC or len(blob) < _HEAD + 4:
        raise CompressorError("this is not a file of a text codec: it does not begin as one, or is cut off")
    if blob[1] & 0xF0 != VERSION:
        raise CompressorError(f"this file has version {blob[1] >> 4}, this program reads {VERSION >> 4}: pack it again")
    if zlib.crc32(blob[:-4]).to_bytes(4, "little") != blob[-4:]:
        raise CompressorError("this file is damaged: its checksum does not match; get or make it again")
    names = [name for name, one in TEXT_CODECS.items() if one.number == blob[2]]
    if not names:
        raise CompressorError(f"this file needs a text codec (number {blob[2]}) that this version lacks: update it")
    codec = load(names[0])
    identity, check = blob[3 : 3 + IDENTITY_BYTES], blob[3 + IDENTITY_BYTES : _HEAD]
    if identity != codec.writer.identity:
        raise CompressorError(
            f"this file was packed with another base (weights and vocabulary {identity.hex()}) than this one "
            f"({codec.writer.identity.hex()}): give the one it was packed with by --base"
        )
    try:
        place, sampling = _HEAD, Sampling()
        if blob[1] & _SAMPLED:
            seed, place = read_varint(blob, _HEAD + 2)
            sampling = Sampling(blob[_HEAD] / 100, None, blob[_HEAD + 1] / 100, seed)
        text = codec.decode(blob[place:-4], sampling)
    except Damaged as error:
        raise CompressorError(f"this file is damaged: {error}") from None
    except (IndexError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CompressorError):
            raise
        raise CompressorError(f"this file is damaged: it does not describe a text ({error!r})") from None
    if zlib.crc32(text.encode()).to_bytes(4, "little") != check:
        raise CompressorError(
            "the base does not write here what it wrote when this file was packed (checksum): another version of torch "
            "or transformers, or another kind of processor, rounds otherwise; unpack it where it was packed"
        )
    return text
