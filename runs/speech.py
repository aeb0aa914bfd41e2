"""Word error rates of a synthetic voice's transcript, and of what its memory writes back. Writes results/speech.json.

    python examples/whisper_tiny_en.py outputs/whisper-tiny.en
    python runs/speech.py outputs/whisper-tiny.en && python runs/readme.py

Needs `espeak-ng`, which reads the first sentences of shipped abstracts aloud.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from compressor.api import Compressor
from compressor.data.records import load_texts
from compressor.data.speech import transcribe
from compressor.evaluation.metrics import bootstrap, ratio, word_errors
from compressor.model.bases import default_checkpoint
from compressor.streams import exits_cleanly

ROOT = Path(__file__).resolve().parents[1]
SENTENCES, WORDS = 16, (8, 30)
TOKENS = (16, 4)


@exits_cleanly
def main() -> int:
    firsts = (re.split(r"(?<=[.!?]) ", text)[0] for text in load_texts("arxiv-test")["text"])
    # Sentences that a voice can say: no formulas, no figures, no abbreviations in capitals.
    plain = [
        one for one in firsts if re.fullmatch(r"[A-Z][a-z ,'-]+\.", one) and WORDS[0] <= len(one.split()) <= WORDS[1]
    ]
    spoken = plain[:SENTENCES]
    with tempfile.TemporaryDirectory() as folder:
        voice = str(Path(folder) / "voice.wav")
        heard = []
        for sentence in spoken:
            subprocess.run(["espeak-ng", "-w", voice, sentence], check=True)
            heard.append(transcribe(voice, sys.argv[1]))
    model = Compressor.from_pretrained(default_checkpoint())
    written = {"transcript": heard}
    for tokens in TOKENS:
        memories = model.compress(heard, tokens=tokens, measure=False)
        written[f"memory, k = {tokens}"] = model.regenerate(memories)
    rows = []
    for way, texts in written.items():
        errors = [word_errors(text, sentence) for text, sentence in zip(texts, spoken, strict=True)]
        columns = {"wrong": [wrong for wrong, _ in errors], "words": [words for _, words in errors]}
        rate = bootstrap(columns, {"wer": ratio("wrong", "words")})["wer"]
        rows.append({"way": way, "n": len(spoken), "wer": rate.value, "wer_low": rate.low, "wer_high": rate.high})
        print(rows[-1], flush=True)
    found = {
        "voice": "espeak-ng, synthetic",
        "base": model.base.name,
        "rows": rows,
        "spoken": spoken,
        "written": written,
    }
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "results" / "speech.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
