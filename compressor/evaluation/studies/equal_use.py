"""Whether the tokens of a memory are used equally: a test on what removing each of them costs, and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from compressor.evaluation.command import EvaluationConfig
from compressor.evaluation.metrics import bootstrap, ratio
from compressor.evaluation.tasks import Result

CLAIM = '"not all the compressed tokens are equally utilized" (500xCompressor, arXiv 2408.03094v1, abstract)'
PERMUTATIONS = 2000
ALPHA = 0.05


def added(results: Sequence[Result]) -> np.ndarray:
    """Nats that every change adds, `[items, changes]`."""
    nats = torch.stack([result["nats"] for result in results]).numpy()
    return nats[:, 1:] - nats[:, :1]


def permutation_test(increases: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """How likely token means differ as much as they do if the tokens of an item could change places.

    The statistic is the variance of the tokens' means; under the hypothesis of equal use the names of the tokens say
    nothing, and they are exchanged within each item (Good 2005, Permutation, Parametric and Bootstrap Tests of
    Hypotheses, chapter 5).

    Args:
        increases: nats that removing each token adds, `[items, tokens]`.

    Returns:
        p, at least 1 / (1 + permutations).
    """
    rng = np.random.default_rng(seed)
    observed = increases.mean(0).var()
    # Exchanged places give the same statistic up to rounding: that counts as reaching it.
    reached = observed - 1e-12 * max(1.0, abs(observed))
    beyond = sum(rng.permuted(increases, axis=1).mean(0).var() >= reached for _ in range(permutations))
    return (1 + int(beyond)) / (1 + permutations)


def verdict(
    kind: str, dataset: str, results: Sequence[Result], tokens: int, config: EvaluationConfig
) -> dict[str, Any]:
    """Whether the tokens are used equally: the test, and how unequal they are.

    The gap between the most and the least used token is measured on other items than the two were chosen on, because
    the largest of several means lies above the smallest even where all are equal.
    """
    per = np.array([float(result["tokens"]) if kind == "regeneration" else 1.0 for result in results])
    increases = added(results)[:, :tokens]
    p = permutation_test(increases / per[:, None], seed=config.seed) if len(results) > 1 else 1.0
    means = increases.sum(0) / per.sum()
    # A token whose removal helps is not used.
    shares = np.maximum(means, 0) / max(float(np.maximum(means, 0).sum()), 1e-30)
    positive = shares[shares > 0]
    # What removing the whole memory adds: the last of the removals, which come before the exchanges.
    changes = added(results)
    memory = changes[:, changes.shape[1] // 2 - 1]
    helped = bootstrap({"nats": memory, "per": per}, {"nats": ratio("nats", "per")}, config.resamples, config.seed)[
        "nats"
    ]
    found: dict[str, Any] = {"task": kind, "dataset": dataset, "n": len(results), "p": p}
    # Where a memory does not help, what its tokens add to the loss is not use.
    found["holds"] = p < ALPHA if helped.low > 0 else None
    found |= {"memory_nats": helped.value, "memory_nats_low": helped.low, "memory_nats_high": helped.high}
    found |= {"most": int(means.argmax()), "most_nats": float(means.max())}
    found |= {"least": int(means.argmin()), "least_nats": float(means.min())}
    found["ratio"] = float(means.max() / means.min()) if means.min() > 0 else None
    found["effective_tokens"] = float(np.exp(-(positive * np.log(positive)).sum())) if len(positive) else 0.0
    found |= {"tokens": tokens, "gap": None, "gap_low": None, "gap_high": None}
    choosing, measuring = slice(0, None, 2), slice(1, None, 2)
    if len(per[measuring]) > 1:
        chosen = increases[choosing].sum(0)
        gap = increases[measuring, chosen.argmax()] - increases[measuring, chosen.argmin()]
        columns = {"gap": gap, "per": per[measuring]}
        one = bootstrap(columns, {"gap": ratio("gap", "per")}, config.resamples, config.seed)["gap"]
        found |= {"gap": one.value, "gap_low": one.low, "gap_high": one.high}
    return found


def statement(found: dict[str, Any]) -> str:
    """The verdict in words."""
    unit = "nats a token" if found["task"] == "regeneration" else "nats an answer"
    outcome = {
        True: "the tokens are not used equally: the published claim holds here",
        False: "equal use is not refuted, so the published claim is not confirmed here",
        None: (
            f"removing the whole memory adds {found['memory_nats']:.3f} [{found['memory_nats_low']:.3f}, "
            f"{found['memory_nats_high']:.3f}] {unit}, so it is of no clear help here and nothing follows for the claim"
        ),
    }[found["holds"]]
    ratio_text = "" if found["ratio"] is None else f", {found['ratio']:.1f} times as much"
    gap = ""
    if found["gap"] is not None:
        gap = (
            f" Chosen on one half of the items and measured on the other, the gap is {found['gap']:.3f} "
            f"[{found['gap_low']:.3f}, {found['gap_high']:.3f}]."
        )
    return (
        f"{found['task']}, {found['dataset']} (n = {found['n']}): {outcome}. Permutation test: p = {found['p']:.4f}. "
        f"Removing token {found['most']} adds {found['most_nats']:.3f} {unit}, removing token {found['least']} "
        f"{found['least_nats']:.3f}{ratio_text}; by the entropy of their shares {found['effective_tokens']:.1f} of "
        f"{found['tokens']} tokens are in use.{gap} Claim: {CLAIM}."
    )
