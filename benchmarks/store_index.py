"""LanceDB's index alone: random vectors written, indexed and searched; time, size, memory, and recall of the search.

    python benchmarks/store_index.py [--vectors 1000000] [--output results/store-index.json]

Random directions are the worst case for any index: no vector is much nearer than the next. The questions are stored
vectors with noise, so that the right one is known and far nearer than the rest, as a paragraph is to its question.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compressor.files import write_json

SIZE, BATCH, QUESTIONS = 384, 50_000, 50


def main() -> int:
    import lancedb
    import pyarrow as pa
    from lancedb.index import IvfPq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--noise", type=float, default=1.0, help="length of what is added to a vector of length 1")
    parser.add_argument("--output", default="results/store-index.json")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp(prefix="store-index-"))
    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), SIZE))])
    table = lancedb.connect(str(folder)).create_table("vectors", schema=schema)
    asked = []
    started = time.perf_counter()
    for first in range(0, options.vectors, BATCH):
        count = min(BATCH, options.vectors - first)
        vectors = rng.standard_normal((count, SIZE), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), SIZE)
        table.add(pa.table({"id": pa.array(np.arange(first, first + count)), "vector": rows}, schema=schema))
        asked.append((first, vectors[0].copy()))
    written = time.perf_counter() - started
    cpu = time.process_time()
    started = time.perf_counter()
    table.create_index("vector", config=IvfPq(distance_type="cosine", sample_rate=64, max_iterations=10))
    built, built_cpu = time.perf_counter() - started, time.process_time() - cpu
    bytes_of = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    index_bytes = sum(one.stat().st_size for one in (folder / "vectors.lance" / "_indices").rglob("*") if one.is_file())
    found, seconds = 0, []
    for number, vector in (asked * QUESTIONS)[:QUESTIONS]:
        noise = rng.standard_normal(SIZE, dtype=np.float32)
        question = vector + options.noise * noise / np.linalg.norm(noise)
        started = time.perf_counter()
        query: Any = table.search(question)  # its type has no distance_type
        query = query.distance_type("cosine").nprobes(64).refine_factor(10).select(["id", "_distance"])
        found += any(row["id"] == number for row in query.limit(4).to_list())
        seconds.append(time.perf_counter() - started)
    result = {
        "vectors": options.vectors,
        "size": SIZE,
        "lancedb": lancedb.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "write_seconds": round(written, 1),
        "index_seconds": round(built, 1),
        "index_cpu_seconds": round(built_cpu, 1),
        "bytes": bytes_of,
        "index_bytes": index_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "questions": QUESTIONS,
        "noise": options.noise,
        "recall_at_4": found / QUESTIONS,
        "search_seconds_median": round(float(np.median(seconds)), 4),
    }
    shutil.rmtree(folder)
    write_json(options.output, result)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
