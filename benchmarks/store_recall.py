"""What a store finds: recall of the paragraph that a question was asked about, by vectors and by words.

    python benchmarks/store_recall.py [--data data/squad-dev.parquet] [--output results/store-recall.json]

The paragraphs of the data are the corpus, compressed by `--checkpoint` and coded as `index` does it; needs
`compressor fetch all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compressor.api import Compressor
from compressor.files import write_json
from compressor.model.text_encoder import MINILM, WORDS
from compressor.storage.making import Making
from compressor.storage.store import Store

TOP = (1, 2, 4, 8)


def main() -> int:
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/squad-dev.parquet")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--checkpoint", default="models/arxiv-mini/compressor")
    parser.add_argument("--codec", default="int4+ans")
    parser.add_argument("--output", default="results/store-recall.json")
    options = parser.parse_args()
    records = pq.read_table(options.data).to_pylist()
    contexts = list(dict.fromkeys(record["context"] for record in records))
    asked = records[:: max(1, len(records) // options.questions)][: options.questions]
    model = Compressor.from_pretrained(options.checkpoint)
    rows: list[dict[str, Any]] = []
    for encoder in (MINILM, WORDS):
        with tempfile.TemporaryDirectory() as folder:
            making = Making(codec=options.codec, no_measure=True)
            store = Store.open(Path(folder, "store"), model, making=making, encoder=encoder)
            started = time.perf_counter()
            store.add({str(number): text for number, text in enumerate(contexts)})
            made = time.perf_counter() - started
            found = []
            started = time.perf_counter()
            for record in asked:
                hits = [int(hit.id) for hit in store.search(record["question"], max(TOP))]
                right = contexts.index(record["context"])
                found.append(hits.index(right) if right in hits else max(TOP))
            searched = time.perf_counter() - started
            coded = store.columns("coded")[0]
            files = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file())
        rows.append(
            {
                "encoder": encoder,
                "passages": len(contexts),
                "questions": len(asked),
                **{f"recall_at_{top}": sum(rank < top for rank in found) / len(found) for top in TOP},
                "seconds_a_passage": round(made / len(contexts), 3),
                "seconds_a_search": round(searched / len(asked), 3),
                "memory_bytes_a_passage": round(sum(coded) / len(coded)),
                "bytes_a_passage": round(files / len(contexts)),
            }
        )
    settings = {"data": Path(options.data).name, "checkpoint": options.checkpoint, "codec": options.codec}
    write_json(options.output, {**settings, "load": round(os.getloadavg()[0], 1), "rows": rows})
    print(Path(options.output).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
