"""Contexts of questions as passages to regenerate: what is asked about a memory is not only abstracts.

    python runs/context-passages.py QUESTIONS [--tokens 96 192 500] --output FILE.jsonl

QUESTIONS: any source of questions for training (squad-train.jsonl.gz). Each context is cut as the answer stage cuts it
(`data.question_tokens`), once for each of the sizes; one passage a line, with `id` and `text`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from compressor.data.batches import equal_segments
from compressor.data.questions import load_questions
from compressor.files import atomic_file
from compressor.model.config import BaseConfig
from compressor.model.load import load_base
from compressor.streams import exits_cleanly


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions")
    parser.add_argument("--tokens", type=int, nargs="+", default=[96, 192, 500])
    parser.add_argument("--base", default="models/arxiv-mini/base")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    tokenizer = load_base(BaseConfig(path=options.base), "cpu").tokenizer
    contexts = list(dict.fromkeys(question.context for question in load_questions(options.questions)))
    count = 0
    with atomic_file(Path(options.output)) as path, path.open("w", encoding="utf-8") as file:
        for place, ids in enumerate(tokenizer(contexts, add_special_tokens=False, verbose=False)["input_ids"]):
            # A short context is the same segment at several sizes.
            segments = dict.fromkeys(tuple(one) for most in options.tokens for one in equal_segments(ids, most))
            for part, segment in enumerate(segments):
                text = tokenizer.decode(segment, skip_special_tokens=True).strip()
                file.write(json.dumps({"id": f"context-{place}-{part}", "text": text}, ensure_ascii=False) + "\n")
            count += len(segments)
    print(f"{len(contexts):,} contexts, {count:,} passages: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
