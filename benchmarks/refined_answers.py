"""What gradient steps on a memory do to the answers read from it, without and with what keeps them (`refinement.KEEP`).

    python benchmarks/refined_answers.py --output results/smollm2-135m/refined-answers.json

Windows of 96 tokens of SQuAD dev with several questions each: F1, exact match and nats a token of the first right
answer, and ROUGE-L and nats a token of the window written back; 95% bootstrap intervals over questions and windows.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from compressor.api import Compressor
from compressor.data.prompts import Placed, answer_ids, place_questions, question_ids
from compressor.data.questions import load_questions
from compressor.data.rows import LeftOut
from compressor.evaluation.metrics import answer_scores, bootstrap, ratio, rouge_l
from compressor.files import write_json
from compressor.model.decoder import score
from compressor.model.fidelity import passage_scores
from compressor.model.generation import answer, regenerate
from compressor.model.memory import Memory, memory_prefix
from compressor.model.refinement import refine
from compressor.streams import exits_cleanly

LIMIT = 16
"""Most tokens of a written answer: SQuAD's are shorter."""


def windows(model: Compressor, options: argparse.Namespace) -> list[list[Placed]]:
    """Windows of different contexts, each with its questions."""
    found: dict[int, list[Placed]] = {}
    placed = place_questions(load_questions(options.data), model.base.tokenizer, options.length, LeftOut())
    for one in placed:
        found.setdefault(id(one.ids), []).append(one)
    several = [group[: options.questions] for group in found.values() if len(group) >= options.questions]
    apart = list({group[0].context: group for group in several}.values())
    return apart[:: max(1, len(apart) // options.passages)][: options.passages]


def measure(model: Compressor, memories: list[Memory], groups: list[list[Placed]]) -> dict[str, Any]:
    """Figures with their intervals."""
    base = model.base
    rows = [(owner, one.question) for owner, group in enumerate(groups) for one in group]
    prefix = memory_prefix(base, memories)
    shared = prefix.share(torch.tensor([owner for owner, _ in rows]))
    asked, template = [question.question for _, question in rows], model.config.question_template
    answers = answer_ids(base.tokenizer, [list(question.answers) for _, question in rows])
    written = [one.text for one in answer(base, shared, asked, template, LIMIT)]
    prompts = question_ids(base.tokenizer, asked, template)
    scored = score(base, shared, prompts, [[*one, base.eos] for one in answers])
    judged = [answer_scores(text, question.answers) for text, (_, question) in zip(written, rows, strict=True)]
    questions: dict[str, list[float]] = {
        "em": [em for em, _ in judged],
        "f1": [f1 for _, f1 in judged],
        "answer_nats": [-float(one[:, 0].sum()) for one in scored],
        "answer_tokens": [len(one) for one in scored],
        "questions": [1] * len(rows),
    }
    passages = [group[0].ids for group in groups]
    back = regenerate(base, memories)
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in passages]
    nats = passage_scores(base, prefix, passages)
    written_back: dict[str, list[float]] = {
        "rouge_l": [rouge_l(one, text) for one, text in zip(back, texts, strict=True)],
        "nats": [-float(one[:, 0].sum()) for one in nats],
        "tokens": [len(one) for one in nats],
        "passages": [1] * len(back),
    }
    shares = {"f1": ratio("f1", "questions", 100), "em": ratio("em", "questions", 100)}
    shares |= {"answer_nats": ratio("answer_nats", "answer_tokens")}
    found = bootstrap(questions, shares)
    regenerated = {"rouge_l": ratio("rouge_l", "passages"), "nats_per_token": ratio("nats", "tokens")}
    found |= bootstrap(written_back, regenerated)
    row: dict[str, Any] = {"questions": len(rows), "passages": len(groups)}
    for name, one in found.items():
        row |= {name: round(one.value, 4), f"{name}_low": round(one.low, 4), f"{name}_high": round(one.high, 4)}
    return row | {"first_answers": written[:8]}


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="models/smollm2-135m/compressor")
    parser.add_argument("--data", default="squad-dev")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--questions", type=int, default=4, help="of each window")
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = Compressor.from_pretrained(options.checkpoint)
    groups = windows(model, options)
    passages = [group[0].ids for group in groups]
    rows = []
    for tokens in options.tokens:
        plain = model.compress_ids(passages, tokens)
        for keep in (None, *options.keep):
            started = time.process_time()
            memories = plain if keep is None else refine(model.base, plain, passages, options.steps, keep=keep)
            seconds = (time.process_time() - started) / len(passages)
            row = {"tokens": tokens, "steps": 0 if keep is None else options.steps, "keep": keep}
            rows.append(row | {"seconds_a_passage": round(seconds, 2)} | measure(model, memories, groups))
            print(rows[-1], flush=True)
            if options.output:
                settings = {name: value for name, value in vars(options).items() if name != "output"}
                write_json(options.output, {**settings, "torch": torch.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
