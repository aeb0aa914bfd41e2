"""Every figure that a table can show: what it is called, which way is better, how many decimals."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """How a figure is called and shown."""

    label: str
    direction: int
    """1: higher is better, -1: lower is better, 0: neither."""
    decimals: int
    interval: bool = True
    """Whether tables show the interval."""


FIGURES = {
    "bleu": Figure("BLEU", 1, 1),
    "chrf": Figure("chrF", 1, 1),
    "rouge_l": Figure("ROUGE-L", 1, 3),
    "exact_match": Figure("exact match", 1, 3),
    "token_accuracy": Figure("token accuracy", 1, 3),
    "nll_per_token": Figure("nats/token", -1, 3),
    "token_ratio": Figure("token ratio", 0, 1, interval=False),
    "byte_ratio": Figure("byte ratio", 0, 4, interval=False),
    "em": Figure("EM", 1, 1),
    "f1": Figure("F1", 1, 1),
    "answerable_f1": Figure("F1, answerable", 1, 1),
    "unanswerable_f1": Figure("F1, unanswerable", 1, 1),
    "retention_em": Figure("EM / full", 1, 3, interval=False),
    "retention_f1": Figure("F1 / full", 1, 3, interval=False),
    "normalised_em": Figure("(EM - none) / (full - none)", 1, 3, interval=False),
    "retention_em_tuned": Figure("EM / full (tuned)", 1, 3, interval=False),
    "retention_f1_tuned": Figure("F1 / full (tuned)", 1, 3, interval=False),
    "normalised_em_tuned": Figure("(EM - none) / (full - none) (tuned)", 1, 3, interval=False),
    "answer_nats": Figure("nats/answer", -1, 2),
    "normalised_nats": Figure("(nats - none) / (full - none)", 1, 3, interval=False),
    "normalised_nats_tuned": Figure("(nats - none) / (full - none) (tuned)", 1, 3, interval=False),
    "nats_added": Figure("+ nats", -1, 2),
    "f1_lost": Figure("F1 lost", -1, 1),
    "agreement": Figure("agreement", 1, 1),
    "perplexity": Figure("perplexity", -1, 1),
    "rouge_1": Figure("ROUGE-1", 1, 3),
    "rouge_2": Figure("ROUGE-2", 1, 3),
    "source_overlap": Figure("ROUGE-L of the source", 0, 3),
    "list_precision": Figure("precision", 1, 1),
    "list_recall": Figure("recall", 1, 1),
    "list_f1": Figure("set F1", 1, 1),
    "accuracy": Figure("accuracy", 1, 1),
    "majority": Figure("majority", 0, 1, interval=False),
    "auc": Figure("AUC", 1, 3),
    "pearson": Figure("Pearson", 1, 3),
    "spearman": Figure("Spearman", 1, 3),
    "word_errors": Figure("word error rate", -1, 3),
    "mrr": Figure("MRR", 1, 3),
    "hit_1": Figure("hit@1", 1, 3),
    "chance_mrr": Figure("chance", 0, 3, interval=False),
    "candidates": Figure("candidates", 0, 1, interval=False),
    "loss": Figure("loss (nats)", -1, 3),
    "loss_increase": Figure("loss + nats", 0, 3),
    "attention_mass": Figure("attention", 0, 4),
    "flops_saved": Figure("FLOPs saved (%)", 1, 1, interval=False),
    "kv_saved": Figure("KV saved (%)", 1, 1, interval=False),
    "activations_saved": Figure("activations saved (%)", 1, 1, interval=False),
    "first_token_speedup": Figure("first token, x faster", 1, 2, interval=False),
    "time_saved": Figure("time saved (%)", 1, 1, interval=False),
    "tokens_per_second": Figure("tokens/s", 1, 1, interval=False),
    "full_tokens_per_second": Figure("tokens/s, full", 0, 1, interval=False),
    "peak_saved": Figure("peak memory saved (%)", 1, 1, interval=False),
}
"""Every figure a task can report. A new one is a line here and a function of sums in its task."""
for _name in ("f1", "rouge_l", "bleu", "chrf", "list_recall", "list_f1", "accuracy", "auc", "spearman"):
    _own = FIGURES[_name]
    FIGURES[f"{_name}_difference"] = Figure(f"{_own.label} - full", _own.direction, _own.decimals)
    for _bounds, _end in (("", ""), (" (tuned)", "_tuned")):
        _share = f"({_own.label} - none) / (full - none){_bounds}"
        FIGURES[f"normalised_{_name}{_end}"] = Figure(_share, 1, 3, interval=False)
