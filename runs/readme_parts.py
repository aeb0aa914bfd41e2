"""The generated parts of README.md and docs/: each a function from results/ to Markdown, and a line in `PARTS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from readme_answers import (
    compared,
    flagship_compared,
    instructed,
    interference,
    prompted,
    qa,
    qa_contexts,
    qa_sets,
    qa_short,
    qa_whole,
    refined_answers,
    studies,
    tasks,
)
from readme_regeneration import (
    base,
    bytes_kept,
    details,
    flagship,
    flagship_curve,
    flagship_details,
    headline,
    mini,
    out_of_domain,
    refined,
    share,
    snippet,
    which_k,
)
from readme_shared import FLAGSHIP
from readme_storing import (
    codecs,
    decoding,
    evaluation_time,
    lossless,
    sent,
    serving,
    store_codecs,
    store_found,
    store_together,
)

PARTS: dict[str, Callable[[], str]] = {
    "decoding": decoding,
    "evaluation-time": evaluation_time,
    "headline": headline,
    "flagship": flagship,
    "flagship-details": flagship_details,
    "flagship-curve": flagship_curve,
    "qa-short": qa_short,
    "which-k": which_k,
    "bytes": bytes_kept,
    "out-of-domain": out_of_domain,
    "share": share,
    "snippet": snippet,
    "base": base,
    "mini": mini,
    "details": details,
    "refined": refined,
    "qa": qa,
    "qa-whole": qa_whole,
    "qa-sets": qa_sets,
    "qa-contexts": qa_contexts,
    "methods": compared,
    "studies": studies,
    "lossless": lossless,
    "lossless-flagship": partial(lossless, f"{FLAGSHIP}/lossless.json"),
    "methods-flagship": flagship_compared,
    "refined-answers": refined_answers,
    "interference": interference,
    "codecs": codecs,
    "tasks": tasks,
    "prompted": prompted,
    "instructed": instructed,
    "sent": sent,
    "serving": serving,
    "store-together": store_together,
    "store-codecs": store_codecs,
    "store-found": store_found,
}
