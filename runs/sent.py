"""Ways to send a text, side by side: bytes, what comes back and how true it is. Writes results/sent.json.

    python runs/sent.py && python runs/readme.py

One abstract, one draw of each: an illustration, no measurement.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from compressor.api import Compressor
from compressor.data.records import load_texts
from compressor.evaluation.metrics import rouge_scores
from compressor.model.bases import SMALL_BASE, default_checkpoint, default_writer
from compressor.model.config import BaseConfig
from compressor.model.generation import Sampling
from compressor.model.load import load_base
from compressor.packing.float64 import ExactBase
from compressor.packing.lossless import pack_bytes
from compressor.packing.text_codecs import Options, pack_text, text_codec

ROOT = Path(__file__).resolve().parents[1]
EMBEDDING = "models/arxiv-mini/methods/sentence-embedding"
WORDS = (60, 90)


def main() -> None:
    texts = load_texts("arxiv-test")["text"]
    text = next(one for one in texts if WORDS[0] <= len(one.split()) <= WORDS[1] and "$" not in one)
    rows = []

    def add(way: str, writer: str, sent: int, back: str) -> None:
        scores = {name: round(value, 3) for name, value in rouge_scores(back, [text]).items()}
        rows.append({"way": way, "writer": writer, "bytes": sent, **scores, "text": back})
        print(way, sent, scores, back[:200], sep=" | ", flush=True)

    for name in ("summary", "keywords", "sentence-embedding"):
        writer = "arxiv-mini" if name == "sentence-embedding" else default_writer()
        codec = text_codec(name, Options(writer, partial(Compressor.from_pretrained, EMBEDDING)))
        sampling = Sampling(codec.sampling.temperature, None, codec.sampling.top_p, seed=1)
        blob, back = pack_text(text, name, codec, sampling)
        add(name, writer, len(blob), back)
        del codec
    model = Compressor.from_pretrained(default_checkpoint())
    memory = model.compress(text, tokens=16)
    add("memory of 16 tokens, bfloat16", model.base.name, memory.nbytes // 2, model.regenerate(memory))
    del model
    packed = pack_bytes(text.encode(), ExactBase(load_base(BaseConfig(path=SMALL_BASE), "cpu")))
    add("pack, without loss", "arxiv-mini", len(packed), text)
    found = {"text": text, "bytes": len(text.encode()), "rows": rows}
    written = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "results" / "sent.json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
