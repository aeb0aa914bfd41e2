"""Study `rate-distortion`: every way of storing a text on the same unseen passages, bytes against what comes back.

Memories under several codecs, keywords, summaries and sentence embeddings that the
base expands, lossless packing, and gzip, xz and zstd. Bytes are those of the files that `compressor pack` writes, for
each passage apart. Neither the models nor the calibration, which both sides hold, are counted; nor is the header of
memory files (`compressor compress`), which a collection shares.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from compressor.codecs.artifact import compressor_name, public_name
from compressor.codecs.blocks import zstandard
from compressor.codecs.calibration import Calibration
from compressor.codecs.exact import ExactBase
from compressor.codecs.fitting import calibrate
from compressor.codecs.lossless import pack_bytes
from compressor.codecs.text import Needs, Packed, pack_texts, text_codec
from compressor.data.questions import load_questions
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.evaluation.command import EvaluationConfig
from compressor.evaluation.methods import checkpoint_fingerprint
from compressor.evaluation.metrics import (
    BLEU_COLUMNS,
    CORPUS_BLEU,
    LEVEL,
    FigureOf,
    answer_scores,
    bleu_signature,
    bleu_statistics,
    bootstrap,
    exact_match,
    ratio,
    rouge_l,
)
from compressor.evaluation.runner import Progress, data_names
from compressor.evaluation.studies import Findings
from compressor.evaluation.studies.plots import rate_distortion_plot
from compressor.evaluation.tasks.interface import tokenised
from compressor.evaluation.tasks.qa import QuestionAnswering
from compressor.generation import answer
from compressor.layouts import TRUNCATABLE
from compressor.memory import Memory, Prefix, memory_prefix
from compressor.methods.interface import check_tokens, token_prefix
from compressor.methods.registry import split_spec
from compressor.model import Compressor
from compressor.prompts import QUESTION

LENGTH = 96
"""Passage tokens where none are asked for, the shortest length of the published evaluation."""
CODECS = ("bf16", "int4+ans", "lowrank:0.15")
CALIBRATED_ON = 300
"""Passages of arxiv-train that a calibration is fitted to where none is named."""
EMBEDDING = "sentence-embedding"
KEYS = ["dataset", "length", "codec", "tokens", "n"]
FIGURES: dict[str, FigureOf] = {
    "bytes_per_byte": ratio("bytes", "text_bytes"),
    "decoder_ratio": ratio("decoder_tokens", "passage_tokens"),
    "bleu": CORPUS_BLEU,
    "rouge_l": ratio("rouge_l", "passages"),
    "exact_match": ratio("exact_match", "passages"),
    "f1": ratio("f1", "questions", 100),
    "text_f1": ratio("text_f1", "questions", 100),
}


@dataclass
class Passage:
    """A text to store, and what is asked about it."""

    text: str
    tokens: int
    questions: list[tuple[str, list[str]]] = field(default_factory=list)
    """Questions with their right answers."""


@dataclass(frozen=True)
class Scheme:
    """A way of storing texts, a row of the table."""

    codec: str
    tokens: int | None
    pack: Callable[[Sequence[Passage]], tuple[list[Packed], list[Memory] | None]]
    """Gives what is stored, and the memories that a decoder reads; None if it reads the text."""


def rate_distortion(config: EvaluationConfig, accelerator: Accelerator) -> Findings | None:
    """Run the study, on the main process alone: files are coded one after the other.

    Raises:
        CompressorError: settings that mean nothing here, or data without a passage that is long enough.
    """
    checkpoints = check_settings(config)
    if not accelerator.is_main_process:
        return None
    model = Compressor.from_pretrained(config.checkpoint, base=config.base, device=accelerator.device)
    sizes = config.tokens or [size for size in (16, 4, 1) if size <= model.config.memory_tokens]
    check_tokens(sizes, model.config.memory_tokens, config.checkpoint)
    groups = list(passages(config, model))
    schemes = list(all_schemes(config, model, sizes, checkpoints.get(EMBEDDING)))
    progress = Progress(len(schemes) * len(groups), True, "rate-distortion")
    rows: list[dict[str, Any]] = []
    for number, (dataset, length, chosen) in enumerate(groups):
        for scheme in schemes:
            packed, memories = scheme.pack(chosen)
            columns = columns_of(chosen, packed)
            if any(passage.questions for passage in chosen):
                columns |= answers_of(chosen, packed, memories, model, config)
            key = {"dataset": dataset, "length": length, "codec": scheme.codec, "tokens": scheme.tokens}
            rows.append({**key, "n": len(chosen), **row_of(columns, config, number)})
            progress.advance()
    progress.close()
    metrics = {
        "keys": KEYS,
        "figures": [name for name in FIGURES if any(row.get(name) is not None for row in rows)],
        "rows": rows,
        "notes": notes(config),
        "sacrebleu": bleu_signature(),
        "checkpoint": {"path": config.checkpoint, "fingerprint": checkpoint_fingerprint(model)},
        "base": {"path": model.base.name, "fingerprint": model.base.fingerprint, "bytes": model_bytes(model)},
    }
    return Findings(metrics, lambda folder: rate_distortion_plot(rows, folder))


def check_settings(config: EvaluationConfig) -> dict[str, str]:
    """Checkpoints of other methods; a `CompressorError` for settings that this study cannot follow."""
    for name in ("split_date", "published"):
        if getattr(config, name):
            raise CompressorError(f"{name} cannot be used with --task rate-distortion: leave it out")
    found: dict[str, str] = {}
    for spec in config.methods:
        name, place = split_spec(spec)
        if name != EMBEDDING or place is None:
            raise CompressorError(
                f"methods = {spec}: this study runs all codecs, and takes only the checkpoint of the sentence "
                f"embedding: write {EMBEDDING}=CHECKPOINT"
            )
        found[name] = place
    beside = Path(config.checkpoint).parent / "methods" / EMBEDDING
    if EMBEDDING not in found and beside.is_dir():
        found[EMBEDDING] = str(beside)
    return found


def passages(config: EvaluationConfig, model: Compressor) -> Iterator[tuple[str, int | None, list[Passage]]]:
    """Data sets, the lengths they are cut to, and their passages; questions' contexts are cut as in the task `qa`."""
    tokenizer = model.base.tokenizer
    sources = list(config.data) or ([] if config.questions else ["arxiv-test"])
    names = data_names([*sources, *([config.questions] if config.questions else [])])
    for source in sources:
        records = load_texts(source, split=config.split, field=config.text_field)
        for length in config.lengths or [min(LENGTH, model.config.max_passage_tokens)]:
            chosen: list[Passage] = []
            for _, ids in tokenised(records["text"], tokenizer):
                if len(ids) < length or (config.limit is not None and len(chosen) == config.limit):
                    continue
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                if "\ufffd" not in text:  # a cut may leave half a character, which no text holds
                    chosen.append(Passage(text, length))
            if not chosen:
                raise CompressorError(f"{source} has no passage of {length} tokens: ask for a smaller length")
            yield names[source], length, chosen
    if config.questions:
        found: dict[str, Passage] = {}
        asked = load_questions(config.questions, split=config.split, limit=config.limit)
        for item in QuestionAnswering().items(asked, tokenizer, config):
            text = tokenizer.decode(item.passage, skip_special_tokens=True)
            if "\ufffd" not in text:
                passage = found.setdefault(text, Passage(text, len(item.passage)))
                passage.questions.append((item.asked["question"], item.asked["answers"]))
        yield names[config.questions], None, list(found.values())


def all_schemes(
    config: EvaluationConfig, model: Compressor, sizes: Sequence[int], embedding: str | None
) -> Iterator[Scheme]:
    """Every way of storing a text."""
    exact = ExactBase(model.base)
    codecs = config.codecs or CODECS
    calibrations: dict[int, Calibration] = {}

    def calibration(tokens: int) -> Calibration | None:
        if all(name.split("+")[0] in ("float32", "float16", "bf16") for name in codecs):
            return None
        place = max(sizes) if model.encoder.memory_layout in TRUNCATABLE else tokens
        if place not in calibrations:
            calibrations[place] = fitted(config, model, place)
        return calibrations[place]

    def needs(tokens: int, of: Compressor = model, **more: Any) -> Needs:
        return Needs(
            lambda: exact,
            lambda: of,
            lambda: calibration(tokens),
            tokens,
            summariser=config.summariser,
            keyword_language=config.keyword_language,
            batch=config.batch_size,
            refine_steps=config.refine_steps,
            **more,
        )

    for name in codecs:
        for tokens in sizes:
            yield coded(f"memory, {name}", tokens, "memory", needs(tokens, memory_codec=name))
    for name in ("keywords", "summary"):
        for tokens in sizes:
            yield coded(name, tokens, name, needs(tokens))
    if embedding is not None:
        other = Compressor.from_pretrained(embedding, base=config.base, device=model.base.device)
        for bits in (8, 4, 2):
            most = other.config.memory_tokens
            yield coded(f"{EMBEDDING}, int{bits}", most, EMBEDDING, needs(most, other, bits=bits))
    yield Scheme("lossless", None, lambda chosen: (plainly(chosen, lambda data: pack_bytes(data, exact)), None))
    for name, tool in tools().items():
        yield Scheme(name, None, lambda chosen, tool=tool: (plainly(chosen, tool), None))  # type: ignore[misc]


def coded(name: str, tokens: int, codec_name: str, needs: Needs) -> Scheme:
    """The scheme of a text codec."""

    def pack(chosen: Sequence[Passage]) -> tuple[list[Packed], list[Memory] | None]:
        codec = text_codec(codec_name, needs)
        packed = pack_texts([passage.text for passage in chosen], codec)
        return packed, codec.memories([one.body for one in packed])

    return Scheme(name, tokens, pack)


def tools() -> dict[str, Callable[[bytes], bytes]]:
    """General-purpose packers."""
    return {
        "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": zstandard().ZstdCompressor(level=19).compress,
    }


def plainly(chosen: Sequence[Passage], tool: Callable[[bytes], bytes]) -> list[Packed]:
    """Passages packed without loss: a decoder reads all their tokens."""
    return [Packed(tool(p.text.encode()), p.text, p.tokens) for p in chosen]


def fitted(config: EvaluationConfig, model: Compressor, tokens: int) -> Calibration:
    """The calibration that was named, or one fitted to the shipped training excerpt."""
    if config.calibration is not None:
        return Calibration.load(config.calibration)
    texts = load_texts("arxiv-train", limit=CALIBRATED_ON)["text"]
    lengths = config.lengths or [min(LENGTH, model.config.max_passage_tokens)]
    ids = [ids[: lengths[place % len(lengths)]] for place, ids in tokenised(texts, model.base.tokenizer) if ids]
    return calibrate(model, ids, tokens, compressor_name=compressor_name(model, config.checkpoint))


def columns_of(chosen: Sequence[Passage], packed: Sequence[Packed]) -> dict[str, Any]:
    """What each passage adds to the figures."""
    pairs = [(one.text, passage.text) for one, passage in zip(packed, chosen, strict=True)]
    statistics = [bleu_statistics(written, wanted) for written, wanted in pairs]
    return {
        "passages": [1.0] * len(chosen),
        "bytes": [len(one.blob) for one in packed],
        "text_bytes": [len(passage.text.encode()) for passage in chosen],
        "decoder_tokens": [one.decoder_tokens for one in packed],
        "passage_tokens": [passage.tokens for passage in chosen],
        "rouge_l": [rouge_l(*pair) for pair in pairs],
        "exact_match": [float(exact_match(*pair)) for pair in pairs],
        **{name: [one[name] for one in statistics] for name in BLEU_COLUMNS},
    }


@torch.no_grad()
def answers_of(
    chosen: Sequence[Passage],
    packed: Sequence[Packed],
    memories: Sequence[Memory] | None,
    model: Compressor,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Summed F1 of each passage's answers, and their number: `f1` where the base reads the memory, if there is one, and
    `text_f1` where it reads the text that came back."""
    base, template = model.base, config.question_template or model.config.question_template or QUESTION

    def scored(prefix: Prefix, passage: Passage) -> float:
        answers = answer(base, prefix, [question for question, _ in passage.questions], template)
        rights = (right for _, right in passage.questions)
        return sum(answer_scores(one.text, right)[1] for one, right in zip(answers, rights, strict=True))

    with model.adapters(on=False):
        from_text = []
        for one, passage in zip(packed, chosen, strict=True):
            ids = base.tokenizer(one.text, add_special_tokens=False, verbose=False)["input_ids"]
            from_text.append(scored(token_prefix(base, [ids] * len(passage.questions)), passage))
        from_memory = from_text
        if memories is not None:
            read = zip(memories, chosen, strict=True)
            from_memory = [scored(memory_prefix(base, [one] * len(p.questions)), p) for one, p in read]
    return {"f1": from_memory, "text_f1": from_text, "questions": [len(passage.questions) for passage in chosen]}


def row_of(columns: dict[str, Any], config: EvaluationConfig, number: int) -> dict[str, Any]:
    """Figures with their intervals over passages."""
    figures = {name: figure for name, figure in FIGURES.items() if all(need in columns for need in figure.needs)}
    row: dict[str, Any] = {"bytes": float(np.mean(columns["bytes"]))}
    for name, one in bootstrap(columns, figures, config.resamples, config.seed + number).items():
        row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return row


def model_bytes(model: Compressor) -> int:
    """Bytes of the base in bfloat16, which both sides need."""
    return 2 * sum(p.numel() for name, p in model.base.model.named_parameters() if "lora_" not in name)


def notes(config: EvaluationConfig) -> list[str]:
    """How the rows are to be read."""
    fitted_on = f"fitted to {CALIBRATED_ON} passages of arxiv-train"
    if config.calibration:
        fitted_on = public_name(config.calibration)
    return [
        "bytes / byte: bytes of the packed file of each passage over UTF-8 bytes of the passage; the base, and for "
        "some codecs a checkpoint or a calibration, are on both sides and not counted. decoder tokens / token: "
        "positions of the decoder's context over passage tokens; of lossless codecs the passage itself. Memory codecs "
        f"are calibrated ({fitted_on}), bf16 needs none. F1: the decoder reads the memory, where there is one; F1 from "
        "the text: what comes back from the file.",
        f"BLEU: {bleu_signature()}. n: passages; [low, high]: {LEVEL:.0%} bootstrap interval over passages.",
    ]
