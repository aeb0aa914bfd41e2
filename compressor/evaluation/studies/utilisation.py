"""Study `utilisation`: what each memory token, and each layer of the memory, holds.

Each is removed (nothing attends to it), and the loss that this adds is measured while the passage is written back (nats
a token) or while questions about it are answered (nats of the right answer). The claim of 500xCompressor, "not all the
compressed tokens are equally utilized" (arXiv 2408.03094v1, abstract), is tested on the added losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from compressor.api import Compressor
from compressor.data.batches import by_length
from compressor.data.prompts import answer_ids
from compressor.errors import CompressorError
from compressor.evaluation.items import LEFT_OUT, Item, Result, Task, data_names, describe_data, items_hash, run_batches
from compressor.evaluation.metrics import LEVEL, bootstrap, ratio
from compressor.evaluation.report import figure
from compressor.evaluation.settings import UtilisationSettings
from compressor.evaluation.studies import Findings
from compressor.evaluation.tasks.qa import QuestionAnswering
from compressor.evaluation.tasks.regeneration import Regeneration
from compressor.methods.interface import MemoryMethod, Method, Piece, check_tokens
from compressor.model.base import Base
from compressor.model.checkpoint import compressor_fingerprint, fetch_checkpoint, read_settings
from compressor.model.decoder import Prefix, score
from compressor.unfinished import Unfinished

DEFAULT_DATA = ("arxiv-test", "squad-dev", "arxivqa-test")
CLAIM = '"not all the compressed tokens are equally utilized" (500xCompressor, arXiv 2408.03094v1, abstract)'
PERMUTATIONS = 2000
ALPHA = 0.05


def utilisation(config: UtilisationSettings, accelerator: Accelerator, parts: Unfinished) -> Findings | None:
    """Run the study; data sets with questions are answered, others are written back.

    Raises:
        CompressorError: settings that mean nothing here, or data that is neither.
    """
    for name in ("tokens", "lengths"):
        if len(values := getattr(config, name)) > 1:
            raise CompressorError(f"{name} = {values} cannot be used with --task utilisation: give one")
    sources = list(config.data) or list(DEFAULT_DATA)
    with accelerator.main_process_first():
        loaded = {source: load(source, config) for source in sources}
    names = data_names(sources)
    held = read_settings(fetch_checkpoint(config.checkpoint))["config"]["memory_tokens"]
    check_tokens(config.tokens or [1], held, config.checkpoint)  # before a base is loaded, which takes long
    model = Compressor.from_pretrained(config.checkpoint, device=accelerator.device, **config.loading)
    tokens = config.tokens[0] if config.tokens else model.config.memory_tokens
    if not model.encoder.trained_for(tokens):
        raise CompressorError(f"{config.checkpoint} is not meant to compress to {tokens} tokens: leave tokens out")
    config = replace(config, question_template=config.question_template or model.config.question_template)
    method = MemoryMethod(model, config.batch_size, config.segment_tokens, config.refine_steps)
    rows: list[dict[str, Any]] = []
    verdicts: list[str] = []
    for number, (source, (task, records)) in enumerate(loaded.items()):
        items = [replace(item, dataset=source) for item in task.items(records, model.base.tokenizer, config)]
        parts.expect({f"items of {source}": items_hash(items), "weights": compressor_fingerprint(model, settings=True)})
        found = run_batches(task, method, items, [tokens], config.batch_size, accelerator, parts, f", {names[source]}")
        if found is not None:
            results = [one for one in found[tokens] if LEFT_OUT not in one]
            kind = "qa" if isinstance(task, AnswerProbe) else "regeneration"
            rows += make_rows(kind, names[source], results, tokens, config, number)
            verdicts += verdict(kind, names[source], results, tokens, config.seed)
    if not accelerator.is_main_process:
        return None
    metrics = {
        "keys": ["task", "dataset", "part", "index", "n"],
        "figures": ["loss", "loss_increase"],
        "rows": rows,
        "intervals": {"level": LEVEL, "resamples": config.resamples, "seed": config.seed, "over": "items"},
        "notes": [
            "loss + nats: added when a part of the memory is removed (nothing attends to it); nats a token for "
            "regeneration, nats of the first right answer for qa. "
            f"n: items; [low, high]: {LEVEL:.0%} bootstrap interval over items; {tokens} memory tokens.",
            *verdicts,
        ],
        "checkpoint": {"path": config.checkpoint, "fingerprint": compressor_fingerprint(model, settings=True)},
        "base": {"path": model.base.name, "fingerprint": model.base.fingerprint, "dtype": model.base.dtype_name},
        "data": [describe_data(source, config, records) for source, (_, records) in loaded.items()],
    }
    return Findings(metrics, lambda folder: draw(rows, folder))


def load(source: str, config: UtilisationSettings) -> tuple[Task, Any]:
    """The records of a data set and what is done with them: questions if it has them, else texts."""
    answer, regenerate = AnswerProbe(), RegenerationProbe()
    try:
        return answer, answer.load(source, config)
    except CompressorError as no_questions:
        try:
            return regenerate, regenerate.load(source, config)
        except CompressorError as no_texts:
            if str(no_questions) == str(no_texts):
                raise
            raise CompressorError(
                f"{source} holds neither questions nor texts. As questions: {no_questions}. As texts: {no_texts}"
            ) from None


@contextmanager
def hidden_from(base: Base, layer: int, slots: int) -> Iterator[None]:
    """Let nothing in one layer attend to the first `slots` keys, for the block.

    Raises:
        CompressorError: the layer is not given an attention mask by name, so that nothing could be hidden.
    """
    layers = next((m for m in base.model.get_decoder().children() if isinstance(m, nn.ModuleList)), None)
    if layers is None or len(layers) != base.layers:
        raise CompressorError(f"{base.name} ({base.model.config.model_type}) has no list of {base.layers} layers")

    def hide(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        mask = named.get("attention_mask")
        if mask is None:
            raise CompressorError(
                f"{base.name} ({base.model.config.model_type}) gives its layers no attention_mask, so a layer's memory "
                "cannot be removed: use a base of another family"
            )
        mask = mask.clone()
        mask[..., :slots] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return arguments, {**named, "attention_mask": mask}

    handle = layers[layer].register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def without_token(prefix: Prefix, token: int | None, tokens: int) -> Prefix:
    """The prefix without one memory token of each segment of `tokens`, or without all of them (None)."""
    kept = torch.zeros(prefix.slots, dtype=torch.bool, device=prefix.mask.device)
    if token is not None:
        kept = torch.arange(prefix.slots, device=prefix.mask.device) % tokens != token
    return replace(prefix, mask=prefix.mask & kept)


def probe(
    method: Method, rows: Sequence[Sequence[Piece]], prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[Result]:
    """Loss of each target under its memory and without each part of it.

    Returns:
        For each row `nats`, float64 `[1 + tokens + layers + 1]`: with all of the memory, without each token, without
        each layer, without any of it; and `tokens`, how many target tokens these are sums over.
    """
    base, count, own = method.base, rows[0][0].tokens, method.prefix(rows)

    def losses(prefix: Prefix) -> list[float]:
        return [-float(one[:, 0].double().sum()) for one in score(base, prefix, prompts, targets)]

    columns = [losses(own), *(losses(without_token(own, token, count)) for token in range(count))]
    for layer in range(base.layers):
        with hidden_from(base, layer, own.slots):
            columns.append(losses(own))
    columns.append(losses(without_token(own, None, count)))
    nats = torch.tensor(columns, dtype=torch.float64)
    return [{"nats": nats[:, row], "tokens": len(target)} for row, target in enumerate(targets)]


class RegenerationProbe(Regeneration):
    """What every removal costs in writing the passage back; segments are written apart and added up."""

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        flat = [(owner, piece) for owner, pieces in enumerate(contexts) for piece in pieces]
        results: list[Result] = [{} for _ in items]
        for places in by_length([len(piece.ids) for _, piece in flat], len(items)):
            chosen = [flat[i] for i in places]
            targets = [[*piece.ids, base.eos] for _, piece in chosen]
            found = probe(method, [[piece] for _, piece in chosen], [[base.bos]] * len(chosen), targets)
            for (owner, _), one in zip(chosen, found, strict=True):
                total = results[owner]
                results[owner] = {name: total[name] + one[name] for name in one} if total else one
        return results


class AnswerProbe(QuestionAnswering):
    """What every removal costs in the first right answer (its EOS included)."""

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        answers = answer_ids(base.tokenizer, [item.asked["answers"] for item in items])
        targets = [[*answer, base.eos] for answer in answers]
        return probe(method, contexts, [item.asked["prompt"] for item in items], targets)


def added(kind: str, results: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Nats that every removal adds, `[items, parts]`, and what they are divided by, `[items]`."""
    nats = torch.stack([result["nats"] for result in results]).numpy()
    per = np.array([float(result["tokens"]) if kind == "regeneration" else 1.0 for result in results])
    return nats[:, 1:] - nats[:, :1], per


def make_rows(
    kind: str, dataset: str, results: Sequence[Result], tokens: int, config: UtilisationSettings, number: int
) -> list[dict[str, Any]]:
    """One row for the whole memory (its loss, and what removing it adds) and one for each token and layer."""
    increases, per = added(kind, results)
    columns = {"per": per, "loss": torch.stack([result["nats"] for result in results]).numpy()[:, 0]}
    columns |= {str(place): increases[:, place] for place in range(increases.shape[1])}
    figures = {name: ratio(name, "per") for name in columns if name != "per"}
    found = bootstrap(columns, figures, config.resamples, config.seed + number)
    layers = increases.shape[1] - tokens - 1
    parts = [("memory", None), *(("token", i) for i in range(tokens)), *(("layer", i) for i in range(layers))]
    rows = []
    for place, (part, index) in enumerate(parts, start=-1):
        row: dict[str, Any] = {"task": kind, "dataset": dataset, "part": part, "index": index, "n": len(results)}
        shown = {"loss_increase": found[str(place if place >= 0 else increases.shape[1] - 1)]}
        if part == "memory":
            shown["loss"] = found["loss"]
        for name, one in shown.items():
            row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        rows.append(row)
    return rows


def permutation_test(increases: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """How likely token means differ as much as they do if the tokens of an item could change places.

    The statistic is the variance of the tokens' means, whose names are exchanged within each item (Good 2005,
    Permutation, Parametric and Bootstrap Tests of Hypotheses, chapter 5).

    Args:
        increases: nats that removing each token adds, `[items, tokens]`.
    """
    rng = np.random.default_rng(seed)
    observed = increases.mean(0).var()
    # Exchanged places give the same statistic up to rounding: that counts as reaching it.
    reached = observed - 1e-12 * max(1.0, abs(observed))
    beyond = sum(rng.permuted(increases, axis=1).mean(0).var() >= reached for _ in range(permutations))
    return (1 + int(beyond)) / (1 + permutations)


def verdict(kind: str, dataset: str, results: Sequence[Result], tokens: int, seed: int) -> list[str]:
    """Whether the tokens are used equally, in words; nothing where there is one token or one item."""
    increases, per = added(kind, results)
    if tokens < 2 or len(results) < 2:
        return []
    p = permutation_test(increases[:, :tokens] / per[:, None], seed=seed)
    means, unit = increases.sum(0) / per.sum(), "nats a token" if kind == "regeneration" else "nats an answer"
    outcome = "equal use is not refuted, so the published claim is not confirmed here"
    if means[-1] <= 0:
        outcome = f"removing the whole memory adds {means[-1]:.3f} {unit}: nothing follows for the claim"
    elif p < ALPHA:
        outcome = "the tokens are not used equally: the published claim holds here"
    most, least = int(means[:tokens].argmax()), int(means[:tokens].argmin())
    return [
        f"{kind}, {dataset} (n = {len(results)}): {outcome}. Permutation test: p = {p:.4f}. Removing token {most} adds "
        f"{means[most]:.3f} {unit}, removing token {least} {means[least]:.3f}. Claim: {CLAIM}."
    ]


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """`utilisation.png`: loss added without each token and each layer, relative to that without the whole memory."""
    canvas, axes = figure(height=4.0)
    for number, (task, dataset) in enumerate(dict.fromkeys((row["task"], row["dataset"]) for row in rows)):
        mine = [row for row in rows if (row["task"], row["dataset"]) == (task, dataset)]
        whole = max(abs(mine[0]["loss_increase"]), 1e-9)
        chosen = mine[1:]
        values, low, high = (
            np.array([row[f"loss_increase{end}"] for row in chosen]) / whole for end in ("", "_low", "_high")
        )
        # A percentile interval need not hold the estimate where few items dominate it.
        bars = [np.maximum(values - low, 0), np.maximum(high - values, 0)]
        places = np.arange(len(chosen)) + 0.2 * number
        axes.errorbar(places, values, bars, fmt="o", markersize=3, linewidth=0.8, label=f"{task}, {dataset}")
        names = [f"{row['part'][0]}{row['index']}" for row in chosen]
        axes.set_xticks(places, names, fontsize="x-small", rotation=90 if len(names) > 32 else 0)
    axes.set(xlabel="removed: token (t), layer (l)", ylabel="loss added, relative to no memory")
    axes.legend(frameon=False, fontsize="small")
    canvas.savefig(folder / "utilisation.png")
