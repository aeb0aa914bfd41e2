"""What `compressor` alone prints, and the example at the end of each command's `--help`."""

from __future__ import annotations

from collections.abc import Mapping

GROUPS = {
    "try": ("demo", "fetch"),
    "memories": ("compress", "regenerate", "ask", "inspect", "index", "serve", "calibrate", "transcribe"),
    "compressors": ("train", "evaluate"),
    "data": ("corpus", "questions", "entities"),
    "text without loss": ("pack", "unpack"),
}
"""Commands by what they are for, in the order in which people come to them."""
EXAMPLES = {  # those of train, evaluate and demo stand where these scripts begin
    "fetch": "compressor fetch smollm2-135m",
    "compress": "compressor compress notes.txt -o notes.memory --tokens 8",
    "regenerate": "compressor regenerate --memory notes.memory",
    "ask": "compressor ask --memory notes.memory --question 'What is proposed?'",
    "inspect": "compressor inspect notes.memory",
    "index": "compressor index corpus.jsonl --output store/",
    "calibrate": "compressor calibrate arxiv-train -o calibration.safetensors",
    "transcribe": "compressor transcribe speech.wav",
    "corpus": "compressor corpus --config configs/corpora/arxiv-snapshot.yaml --source FILE --output outputs/arxiv",
    "questions": "compressor questions --config configs/corpora/arxivqa-rules.yaml --source outputs/arxiv "
    "--output outputs/questions",
    "entities": "compressor entities texts.jsonl --output outputs/entities.jsonl",
    "serve": "compressor serve --memories outputs/memories --port 8000",
    "pack": "compressor pack notes.txt",
    "unpack": "compressor unpack notes.txt.cz",
}


def usage(summaries: Mapping[str, str]) -> str:
    """Commands in their groups with a line each.

    Args:
        summaries: of the commands there are, by name.
    """
    width = max(map(len, summaries))
    lines = ["usage: compressor COMMAND [options]"]
    for heading, names in GROUPS.items():
        lines += [
            "",
            f"{heading}:",
            *(f"  {name:<{width}}  {summaries[name].strip()}" for name in names if name in summaries),
        ]
    return "\n".join([*lines, "", "compressor COMMAND --help lists its options and shows an example."])
