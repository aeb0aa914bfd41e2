"""What `compressor pack` does to the bytes of an input, by the model that its options name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from transformers.utils import logging

from compressor.api import Compressor
from compressor.errors import CompressorError
from compressor.model.bases import SMALL_BASE, default_writer
from compressor.model.config import BaseConfig
from compressor.model.generation import Sampling
from compressor.model.load import load_base
from compressor.packing.float64 import ExactBase
from compressor.packing.lossless import pack_bytes, unpack_bytes
from compressor.packing.text_codecs import MAGIC, Options, pack_text, text_codec, unpack_text


def convert(data: bytes, options: Namespace, progress: Callable[[str, int, int], None]) -> bytes:
    """Pack or unpack; the first byte tells files of text codecs from others."""
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    load = partial(exact_base, options.base or SMALL_BASE, options.device)
    if options.codec != "lossless" or (options.decompress and data[:1] == bytes([MAGIC])):
        return _text(data, options)
    if options.decompress:
        return unpack_bytes(data, load, options.batch, progress=progress)
    return pack_bytes(data, load(), options.lane_tokens, options.batch, progress)


@lru_cache(maxsize=1)
def exact_base(path: str, device: str) -> ExactBase:
    """The base, loaded for the first of several inputs."""
    return ExactBase(load_base(BaseConfig(path=path), device))


def _text(data: bytes, options: Namespace) -> bytes:
    def load(name: str) -> Any:
        chosen = (options.tokens, options.bits, options.summariser)
        compressor = partial(Compressor.from_pretrained, options.checkpoint, device=options.device)
        return text_codec(name, Options(options.base or default_writer(), compressor, options.device, *chosen))

    if options.decompress:
        return unpack_text(data, load).encode()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise CompressorError(f"not UTF-8 text, which the codec {options.codec} takes: leave --codec out") from None
    given = {name: getattr(options, name) for name in ("temperature", "top_p") if getattr(options, name) is not None}
    Sampling(seed=options.seed, **given)  # what is wrong with it shows before a model is loaded
    codec = load(options.codec)
    return pack_text(text, options.codec, codec, replace(codec.sampling, seed=options.seed, **given))[0]
