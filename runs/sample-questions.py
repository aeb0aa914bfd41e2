"""Draws data/squad-dev.parquet: whole contexts of SQuAD 1.1's development set with all their questions.

    python runs/sample-questions.py SQUAD_DEV OUTPUT

SQUAD_DEV is dev-v1.1.json of https://rajpurkar.github.io/SQuAD-explorer/, or JSON lines of it with a title. Contexts
are drawn by a hash, until there are 300 questions: the same data gives the same records in the same order.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from compressor.data.questions import load_questions
from compressor.data.rows import read_document, read_rows
from compressor.data.sources import kind_of
from compressor.files import atomic_file

WANTED = 300


def titles(path: Path) -> dict[str, str]:
    """The Wikipedia article of each context, which the licence asks to name."""
    if kind_of(path) != ".json":
        return {row.values["context"]: row.values["title"] for row in read_rows(path)}
    articles = read_document(path)["data"]
    return {paragraph["context"]: article["title"] for article in articles for paragraph in article["paragraphs"]}


def main(source: str, output: str) -> None:
    questions = load_questions(source)
    article = titles(Path(source))
    contexts = sorted(article, key=lambda context: hashlib.sha256(context.encode()).digest())
    rows: list[dict[str, object]] = []
    for context in contexts:
        if len(rows) >= WANTED:
            break
        for item in sorted((item for item in questions if item.context == context), key=lambda item: item.id):
            row = {"id": item.id, "dataset": item.dataset, "title": article[context], "context": context}
            rows.append({**row, "question": item.question, "answers": list(item.answers)})
    text = ("id", "dataset", "title", "context", "question")
    schema = pa.schema([*((name, pa.string()) for name in text), ("answers", pa.list_(pa.string()))])
    with atomic_file(output) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python runs/sample-questions.py SQUAD_DEV OUTPUT")
    main(sys.argv[1], sys.argv[2])
