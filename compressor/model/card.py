"""The model card of a checkpoint, README.md with the hub's header, made from compressor.json; pushing to the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, first_line
from compressor.files import read_json
from compressor.model.bases import NAMED
from compressor.model.fingerprints import public_name

METRICS = {
    "rouge_l": ("rouge", "ROUGE-L", 3),
    "bleu": ("bleu", "BLEU", 1),
    "exact_match": ("exact_match", "exact match", 3),
    "f1": ("f1", "F1", 1),
    "em": ("exact_match", "exact match (%)", 1),
}
"""Figures that a card shows: type on the hub, name, decimals."""


def evaluated(folder: str | Path, method: str) -> list[dict[str, Any]]:
    """What a card keeps of an evaluation: task, data set, tokens, length, n and the figures of `METRICS` of each row.

    Args:
        folder: output of evaluate.py.
        method: whose rows are taken.

    Raises:
        CompressorError: there is no evaluation of this method.
    """
    path = Path(folder) / "metrics.json"
    found = read_json(path)
    rows = [
        {name: row.get(name) for name in ("dataset", "tokens", "length", "n")}
        | {"task": found["task"], "figures": {name: row[name] for name in METRICS if row.get(name) is not None}}
        for row in found["rows"]
        if row.get("method") == method and row.get("dataset") != "macro"
    ]
    if not any(row["figures"] for row in rows):
        raise CompressorError(f"{path} has no regeneration or answers of the method {method}: evaluate this compressor")
    return rows


def model_card(settings: Mapping[str, Any]) -> str:
    """README.md of a checkpoint from its `compressor.json`, whose `about` holds licence, data and figures."""
    from huggingface_hub import EvalResult, ModelCardData  # start-up

    config, base, about = settings["config"], settings["base"], settings.get("about", {})
    trained, frozen = settings["parameters"]["trained"], settings["parameters"]["base"]
    name = public_name(base["path"])
    hub = NAMED[name].hub if name in NAMED else name
    figures = [
        (row, *METRICS[key], value) for row in about.get("evaluation", []) for key, value in row["figures"].items()
    ]
    header = ModelCardData(
        base_model=hub if hub.count("/") == 1 and not Path(hub).exists() else None,
        library_name="peft",
        license=about.get("license"),
        datasets=about.get("datasets") or None,
        metrics=sorted({kind for _, kind, *_ in figures}) or None,
        tags=["prompt-compression", "kv-cache"],
        model_name="Prompt compressor",
        eval_results=[
            EvalResult(
                task_type="text-generation" if row["task"] == "regeneration" else "question-answering",
                dataset_type=row["dataset"],
                dataset_name=_measured(row),
                metric_type=kind,
                metric_name=label,
                metric_value=round(value, 4),
            )
            for row, kind, label, _, value in figures
        ]
        or None,
    )
    lora = f"LoRA rank {config['lora_rank']}" + (
        f" and {config['writer_rank']} for memory tokens" if config["writer_rank"] else ""
    )
    lines = [
        f"---\n{header.to_yaml()}\n---",
        "# Prompt compressor\n",
        f"Turns passages of up to {config['max_passage_tokens']} tokens into the keys and values of 1 to "
        f"{config['memory_tokens']} memory tokens of a frozen base, which regenerates them or answers from them.\n",
        "```python\nfrom compressor import Compressor\n",
        'model = Compressor.from_pretrained("THIS REPOSITORY")',
        'memory = model.compress("A passage of text.", tokens=4)\nprint(model.regenerate(memory))\n```\n',
        f"- Base: `{name}` (weights {base['fingerprint'][:12]}); it is not in here.",
        f"- Method `{config['method']}`: {config['memory_tokens']} memory tokens, layout `{config['layout']}`, "
        f"{config['passage_attention']} passage attention, {lora}; {trained:,} trained parameters, "
        f"{trained / frozen:.1%} of the base's.",
        *(
            [f"- Texts are cut into segments of at most {most} tokens where `segment_tokens` does not say otherwise."]
            if (most := config.get("segment_tokens"))
            else []
        ),
        f"- Trained on: {', '.join(about.get('datasets', [])) or 'not said'}.",
        f"- Licence: {about.get('license', 'not said')}.",
        "- Text unlike what it was trained on comes back worse; `compressor compress` says which share of a text does.",
        "- A memory gives its passage to whoever has the base.",
    ]
    if figures:
        lines += ["\n| measured on | n | figure | value |\n| --- | ---: | --- | ---: |"]
        lines += [f"| {_measured(row)} | {row['n']} | {label} | {v:.{d}f} |" for row, _, label, d, v in figures]
    lines += ["\nThe method is that of *500xCompressor* (arXiv 2408.03094), changed as the settings say."]
    return "\n".join(lines) + "\n"


def _measured(row: Mapping[str, Any]) -> str:
    length = f", {row['length']} tokens" if row["length"] else ""
    return f"{row['task']} of {row['dataset']}{length}, k = {row['tokens']}"


def push(folder: str | Path, repo_id: str | None = None, **options: Any) -> str:
    """Upload a checkpoint's folder to the hub.

    Args:
        repo_id: USER/NAME, or NAME in the user's own space; by default the folder's name.
        options: private, token, revision, commit_message, as of `huggingface_hub`.

    Returns:
        Address of the commit.

    Raises:
        CompressorError: the hub refuses it or cannot be reached, or there is no such option.
    """
    if unknown := set(options) - {"private", "token", "revision", "commit_message"}:
        raise CompressorError(
            f"save_pretrained knows no {', '.join(sorted(unknown))}: of the hub it takes repo_id, private, token, "
            "revision and commit_message"
        )
    from huggingface_hub import HfApi  # start-up

    repo_id = repo_id or Path(folder).resolve().name
    api = HfApi(token=options.pop("token", None))
    try:
        repo = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
        message = options.pop("commit_message", None) or "Upload compressor"
        done = api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message, **options)
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise CompressorError(
            f"cannot push {folder} to {repo_id} ({type(error).__name__}: {first_line(error)}): it is written "
            "here; check the name, the network, and `hf auth login` or token"
        ) from None
    return str(done.commit_url)
