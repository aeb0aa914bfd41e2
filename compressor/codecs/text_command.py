"""The text codecs behind `compressor pack --codec NAME` and `compressor unpack`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from compressor.codecs.text import TEXT_CODECS, Needs, pack_texts, text_codec, unpack_text
from compressor.errors import CompressorError
from compressor.generation import Sampling

DEFAULT_BASE = "models/arxiv-mini/base"
_WITH_MODEL = ("memory", "sentence-embedding")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the text codecs can be told; it goes into the file where a reader needs it."""
    group = parser.add_argument_group("text codecs", "lossy: the input is kept")
    group.add_argument("--codec", default="lossless", choices=["lossless", *TEXT_CODECS], help="packing: what to store")
    group.add_argument("--tokens", type=int, help="packing: tokens of the prompt or memory, for each piece of the text")
    group.add_argument("--checkpoint", default="models/arxiv-mini/compressor", help="of memory, sentence-embedding")
    group.add_argument("--memory-codec", default="bf16", help="packing: bf16, int4+ans, lowrank:0.15 ...")
    group.add_argument("--calibration", help="of the memory codec, by `compressor calibrate`")
    group.add_argument("--bits", type=int, default=8, help="packing: of a number of a sentence embedding")
    group.add_argument("--template", help="packing: prompt around keywords or summary, with {prompt} in it")
    group.add_argument("--summariser", help="packing: seq2seq model (folder or hub id); else sentences are extracted")
    group.add_argument("--temperature", type=float, help="packing: 0 is greedy; by default the codec's own")
    group.add_argument("--top-p", type=float, help="packing: nucleus sampling")
    group.add_argument("--top-k", type=int, help="packing: sample among the k most probable")
    group.add_argument("--seed", type=int, default=0, help="packing: of the sampling")


def _needs(options: argparse.Namespace, load: Callable[[], Any]) -> Needs:
    from compressor.codecs.calibration import Calibration

    def load_model() -> Any:
        from compressor.model import Compressor

        base = None if options.base == DEFAULT_BASE else options.base
        return Compressor.from_pretrained(options.checkpoint, base=base, device=options.device)

    needs = Needs(
        load,
        load_model,
        lambda: None if options.calibration is None else Calibration.load(options.calibration),
        options.tokens,
        options.memory_codec,
        options.bits,
        options.template,
        options.summariser,
        batch=options.batch,
    )
    if not options.decompress and options.codec in _WITH_MODEL:
        needs.load_base = lambda: needs.model.base
    return needs


def pack(data: bytes, options: argparse.Namespace, load: Callable[[], Any]) -> bytes:
    """Pack a text with the codec of the options.

    Raises:
        CompressorError: no text, or settings that mean nothing.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise CompressorError(f"not UTF-8 text, which the codec {options.codec} takes: leave --codec out") from None
    codec = text_codec(options.codec, _needs(options, load))
    own = codec.sampling
    sampling = Sampling(
        own.temperature if options.temperature is None else options.temperature,
        own.top_k if options.top_k is None else options.top_k,
        own.top_p if options.top_p is None else options.top_p,
        options.seed,
    )
    return pack_texts([text], codec, sampling)[0].blob


def unpack(blob: bytes, options: argparse.Namespace, load: Callable[[], Any]) -> bytes:
    """The text that a file of a text codec stands for."""
    return unpack_text(blob, _needs(options, load)).encode()
