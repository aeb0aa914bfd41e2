"""What the demo and its page show: a passage compressed, then regenerated, or asked about, with its figures."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from compressor.api import Compressor
from compressor.commands.loading import load_model, read_passage
from compressor.commands.options import DemoConfig
from compressor.data.examples import Example, example
from compressor.evaluation.metrics import bleu, bleu_statistics, chrf, chrf_statistics, rouge_l
from compressor.methods.recite import recited_prefix
from compressor.model.cartridge import text_prefix
from compressor.model.decoder import token_prefix
from compressor.model.generation import answer
from compressor.model.memory import Memory, memory_prefix

SHOWN_STEPS = 10
"""Gradient steps after which the shipped example is shown too."""


def passage_of(config: DemoConfig) -> Example:
    """The passage that the options name."""
    if config.text is None:
        return example(config.example)
    source = "standard input" if config.text == "-" else config.text
    return Example(read_passage(config.text), source)


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Load the compressor, and compress and regenerate the passage or answer the question.

    Returns:
        What `demonstrate` returns, `source`, and `seconds` (in all). Of an example its question is answered beside, and
        `refined` is what comes back after `SHOWN_STEPS` gradient steps, where that is not asked for and one pass does
        not bring all. `one_pass` is what comes back without the gradient steps that are asked for.
    """
    text, source, asked, most = passage_of(config)
    started = time.perf_counter()
    model = load_model(config)
    load = round(time.perf_counter() - started, 3)
    shipped = config.text is None and config.question is None
    sizes = config.tokens, config.length or (most if shipped else None), config.segment_tokens
    question = config.question or (asked if shipped else None)
    made = demonstrate(model, text, *sizes, question, config.refine_steps or 0, both=shipped)
    made["timings"] = {"load": load, **made["timings"]}
    if shipped and config.refine_steps is None and made["regeneration"] != made["passage"]:
        made["refined"] = demonstrate(model, text, *sizes, None, SHOWN_STEPS)
    elif config.refine_steps and "regeneration" in made:
        made["one_pass"] = demonstrate(model, text, *sizes)
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
        both: regenerate it also where there is a question, and leave out the answer from what is regenerated.

    Returns:
        `passage`, `tokens`, `segments`, `refine_steps`, `passage_tokens`, `text_tokens` (before cutting), `timings`
        (seconds to compress, regenerate, answer) and `memory_bytes` (bfloat16); what `regenerate` returns, of a
        question what `answer_question` returns.
    """
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
            made |= answer_question(model, memory, cut, question, recited=not both)
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
    regeneration = model.regenerate(memory)
    statistics = bleu_statistics(regeneration, passage) | chrf_statistics(regeneration, passage)
    counts = {name: np.array([float(value)]) for name, value in statistics.items()}
    return {
        "regeneration": regeneration,
        "bleu": round(float(bleu(counts)[0]), 2),
        "chrf": round(float(chrf(counts)[0]), 2),
        "rouge_l": round(rouge_l(regeneration, passage), 4),
    }


def answer_question(
    model: Compressor, memory: Memory, passage: list[int], question: str, recited: bool = True
) -> dict[str, Any]:
    """The question and its answers from what stands for the passage, each with its natural log-probability.

    Returns:
        `question`; `answer` and `logprob` from the memory; and with a suffix those from the text that the memory
        regenerates (`_recite`, if `recited`), from the whole passage (`_full`) and from no passage (`_none`).
    """
    base, template = model.base, model.config.question_template
    prefixes = {
        "": memory_prefix(base, [memory]),
        **({"_recite": recited_prefix(base, [memory])} if recited else {}),
        "_full": text_prefix(base, [passage]),
        "_none": token_prefix(base, [[]]),
    }
    answers = {suffix: answer(base, prefix, [question], template)[0] for suffix, prefix in prefixes.items()}
    result: dict[str, Any] = {"question": question}
    for suffix, found in answers.items():
        result |= {f"answer{suffix}": found.text, f"logprob{suffix}": round(found.logprob, 4)}
    return result
