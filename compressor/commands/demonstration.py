"""What the demo and its page show: a passage compressed, then regenerated, or asked about, with its figures."""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.data.text_files import read_text
from compressor.errors import require
from compressor.model.bases import default_checkpoint
from compressor.model.config import BaseMismatch

if TYPE_CHECKING:
    from compressor.api import Compressor
    from compressor.data.examples import Example
    from compressor.model.memory import Memory

EXAMPLE_TOKENS = 96
"""A shipped abstract is cut to this length, the shortest of the published evaluation."""
SHOWN_STEPS = 10
"""Gradient steps after which the shipped example is shown too."""


@dataclass
class DemoConfig:
    """Options of the demo."""

    text: str | None = None
    """File with the passage, or - for standard input; by default an unseen abstract that ships with the project."""
    tokens: int | None = None
    """Memory tokens; by default all the compressor has."""
    length: int | None = None
    """Use the first so many tokens of the passage; by default 96 of the shipped abstract, all of your own text and all
    of what a question is about."""
    segment_tokens: int | None = None
    """Compress in segments of at most so many tokens, each to `tokens` memory tokens; by default of as many as the
    compressor takes."""
    refine_steps: int | None = None
    """Gradient steps on the memory: 10 to 50 keep far more with few memory tokens; by default none, and the shipped
    example is shown after 10 too."""
    question: str | None = None
    """Answer this question about the passage instead of regenerating it."""
    example: str = "abstract"
    """A text that ships with the project: `abstract`, `published` (the example of the 500xCompressor paper, with its
    question), or the number of another test abstract."""
    checkpoint: str = ""
    """Compressor checkpoint: folder or hub id; by default the bundled one of smollm2-135m where this base is at hand
    (`compressor fetch smollm2-135m`), else that of arxiv-mini."""
    base: str | None = None
    """Frozen base: folder, hub id, GGUF file or name; by default the one the checkpoint names."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: take a base with other weights than the checkpoint was trained on, with a warning."""
    device: str = "cpu"
    port: int | None = None
    """Port of the page (--web); by default the first free one from 7860 on. It is served to this machine alone."""

    def __post_init__(self) -> None:
        self.checkpoint = self.checkpoint or default_checkpoint()
        require(self.port is None or 1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        require(self.tokens is None or self.tokens >= 1, "tokens", self.tokens, "at least 1")
        require(
            self.segment_tokens is None or self.segment_tokens >= 1, "segment_tokens", self.segment_tokens, "at least 1"
        )
        require(self.refine_steps is None or self.refine_steps >= 0, "refine_steps", self.refine_steps, "at least 0")
        require(self.length is None or self.length >= 1, "length", self.length, "at least 1")


def read_passage(config: DemoConfig) -> Example:
    """The passage that the options name."""
    from compressor.data.examples import Example, example  # which imports datasets: a second

    if config.text is None:
        return example(config.example)
    source = "standard input" if config.text == "-" else config.text
    return Example(read_text(config.text), source)


def differences(passage: str, regeneration: str) -> list[tuple[str, str | None]]:
    """Stretches of words that the passage and its regeneration share (None), or that are "missing" or "added"."""
    old, new = re.findall(r"\S+\s*", passage), re.findall(r"\S+\s*", regeneration)
    runs: list[tuple[str, str | None]] = []
    matcher = difflib.SequenceMatcher(a=[w.strip() for w in old], b=[w.strip() for w in new], autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            runs.append(("".join(new[c:d]), None))
            continue
        if a < b:
            runs.append(("".join(old[a:b]), "missing"))
        if c < d:
            runs.append(("".join(new[c:d]), "added"))
    return runs


def load_model(config: DemoConfig) -> Compressor:
    """The compressor that the options name."""
    from compressor.api import Compressor

    return Compressor.from_pretrained(
        config.checkpoint, base=config.base, device=config.device, base_mismatch=config.base_mismatch
    )


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Load the compressor, and compress and regenerate the passage or answer the question.

    Returns:
        What `demonstrate` returns, `source`, and `seconds` (in all); of an example also `refined`, what comes
        back after `SHOWN_STEPS` gradient steps, where that is not asked for and one pass does not bring all.
    """
    text, source, asked = read_passage(config)
    started = time.perf_counter()
    model = load_model(config)
    load = round(time.perf_counter() - started, 3)
    shipped = config.text is None and config.question is None
    length = config.length or (EXAMPLE_TOKENS if shipped and not asked else None)
    sizes = config.tokens, length, config.segment_tokens
    question = config.question or (asked if shipped else None)
    made = demonstrate(model, text, *sizes, question, config.refine_steps or 0, both=shipped)
    made["timings"] = {"load": load, **made["timings"]}
    if shipped and config.refine_steps is None and made["regeneration"] != made["passage"]:
        made["refined"] = demonstrate(model, text, *sizes, None, SHOWN_STEPS)
    return {"source": source, **made, "seconds": round(time.perf_counter() - started, 3)}


def demonstrate(
    model: Compressor,
    text: str,
    tokens: int | None = None,
    length: int | None = None,
    segment_tokens: int | None = None,
    question: str | None = None,
    refine_steps: int = 0,
    both: bool = False,
) -> dict[str, Any]:
    """Compress a text, and regenerate it or answer a question about it.

    Args:
        tokens, segment_tokens, refine_steps: see `Compressor.compress`.
        length: use the first so many tokens of the text; by default all.
        both: regenerate it also where there is a question.

    Returns:
        `passage`, `tokens`, `segments`, `refine_steps`, `passage_tokens`, `text_tokens` (before cutting), `timings`
        (seconds to compress, regenerate, answer) and `memory_bytes` (bfloat16); what `regenerate` returns, of a
        question what `answer_question` returns.
    """
    import torch

    started = time.perf_counter()
    tokenizer = model.base.tokenizer
    (ids,) = model.base.tokenise([text])
    cut = ids[:length]
    memory = model.compress_ids([cut], tokens, segment_tokens=segment_tokens, refine_steps=refine_steps)[0]
    passage = tokenizer.decode(cut, skip_special_tokens=True)
    made: dict[str, Any] = {}
    timings = {"compress": round(time.perf_counter() - started, 3)}
    for work in ("regenerate", "answer"):
        started = time.perf_counter()
        if work == "answer" and question is not None:
            made |= answer_question(model, memory, cut, question)
        elif work == "regenerate" and (question is None or both):
            made |= regenerate(model, memory, passage)
        else:
            continue
        timings[work] = round(time.perf_counter() - started, 3)
    return {
        "passage": passage,
        "tokens": memory.tokens,
        "segments": len(memory.segments),
        "refine_steps": refine_steps,
        "passage_tokens": len(cut),
        "text_tokens": len(ids),
        **made,
        "timings": timings,
        "memory_bytes": memory.to(dtype=torch.bfloat16).nbytes,
    }


def regenerate(model: Compressor, memory: Memory, passage: str) -> dict[str, Any]:
    """`regeneration`, `bleu` and `chrf` (0-100) and `rouge_l` (0-1) of a passage written back from its memory."""
    import numpy as np

    from compressor.evaluation.metrics import bleu, bleu_statistics, chrf, chrf_statistics, rouge_l

    regeneration = model.regenerate(memory)
    statistics = bleu_statistics(regeneration, passage) | chrf_statistics(regeneration, passage)
    counts = {name: np.array([float(value)]) for name, value in statistics.items()}
    return {
        "regeneration": regeneration,
        "bleu": round(float(bleu(counts)[0]), 2),
        "chrf": round(float(chrf(counts)[0]), 2),
        "rouge_l": round(rouge_l(regeneration, passage), 4),
    }


def answer_question(model: Compressor, memory: Memory, passage: list[int], question: str) -> dict[str, Any]:
    """The question and its answers from what stands for the passage, each with its natural log-probability.

    Returns:
        `question`; `answer` and `logprob` from the memory; and with a suffix those from the text that the memory
        regenerates (`_recite`), from the whole passage (`_full`) and from no passage (`_none`).
    """
    from compressor.methods.interface import token_prefix
    from compressor.methods.recite import recited_prefix
    from compressor.model.generation import answer
    from compressor.model.memory import memory_prefix

    base, template = model.base, model.config.question_template
    prefixes = {
        "": memory_prefix(base, [memory]),
        "_recite": recited_prefix(base, [memory]),
        "_full": token_prefix(base, [passage]),
        "_none": token_prefix(base, [[]]),
    }
    answers = {suffix: answer(base, prefix, [question], template)[0] for suffix, prefix in prefixes.items()}
    result: dict[str, Any] = {"question": question}
    for suffix, found in answers.items():
        result |= {f"answer{suffix}": found.text, f"logprob{suffix}": round(found.logprob, 4)}
    return result


def tokens_named(count: int) -> str:
    """1 memory token, 16 memory tokens."""
    return f"{count} memory token" + "s" * (count > 1)


def answers_of(result: dict[str, Any]) -> list[tuple[str, str, float]]:
    """What the base read, its answer, and the answer's log-probability, of each answer in `result`."""
    read = {
        "": tokens_named(result["tokens"]),
        "_recite": "what they regenerate",
        "_full": "the whole passage",
        "_none": "no passage",
    }
    return [(label, result[f"answer{suffix}"], result[f"logprob{suffix}"]) for suffix, label in read.items()]
