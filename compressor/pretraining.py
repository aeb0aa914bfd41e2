"""Stage `base`: from text to a small Llama that can serve as a frozen base.

Tokenizer, packed rows (`compressor/data/packing.py`), next-token loss; `compressor/evaluation/base_figures.py` has the
figures that tell whether a compressor can be trained on the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.base import load_base
from compressor.config import RunConfig
from compressor.data.packing import ANSWER_MARK, COPYING_TOKENS, RowPacker, copying_rows, pack_rows
from compressor.data.questions import questions_by_context
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.evaluation.base_figures import COPY_LENGTHS, bits_per_byte, copying_accuracy, encode, sample
from compressor.files import FolderKind, atomic_file, atomic_folder, read_json, write_json
from compressor.model_config import ArchitectureConfig, BaseConfig
from compressor.training import Batch

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
TOKENIZER_TEXTS = 100_000
DRY_RUN_TEXTS = 500
FOLDER = FolderKind("a base or its tokenizer", ("tokenizer_config.json", "*.json", "model.safetensors", "README.md"))
Questions = Sequence[tuple[str, list[tuple[str, str]]]]
"""Contexts with their (question, answer) pairs."""


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, so that any text tokenises back to itself exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def make_model(architecture: ArchitectureConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of this shape, embeddings tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=architecture.vocabulary,
            hidden_size=architecture.hidden,
            num_hidden_layers=architecture.layers,
            num_attention_heads=architecture.heads,
            num_key_value_heads=architecture.key_value_heads,
            intermediate_size=architecture.intermediate,
            max_position_embeddings=architecture.positions,
            rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class NextToken(nn.Module):
    """A causal LM whose forward returns the summed next-token loss of a batch of rows.

    Args:
        answer_weight: of the loss of tokens that carry `ANSWER_MARK`, relative to that of others. Weights are 1 on
            average over a batch.
    """

    def __init__(self, model: LlamaForCausalLM, answer_weight: float = 1.0):
        super().__init__()
        self.model, self.answer_weight = model, answer_weight

    def forward(self, batch: Batch) -> Tensor:
        """`batch["rows"]` is int64 `[rows, length]`; returns the sum over `rows * (length - 1)` targets."""
        rows, answers = batch["rows"] % ANSWER_MARK, batch["rows"] >= ANSWER_MARK
        logits = self.model(input_ids=rows, use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none"
        )
        weights = 1.0 + (self.answer_weight - 1.0) * answers[:, 1:].flatten()
        return (losses * weights).sum() / weights.mean()


class BaseStage:
    """Trains the base; see `compressor.training.Stage`.

    The tokenizer and the packed rows are written into the output folder and used again by a resumed run. A dry run
    writes nothing: it makes a tokenizer of a few texts and the rows of the first micro-batch.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, dry_run: bool = False):
        self.config = config
        data, mixture = config.data, config.mixture
        limit = min(data.limit or DRY_RUN_TEXTS, DRY_RUN_TEXTS) if dry_run else data.limit
        with accelerator.main_process_first():
            train = load_texts(data.train, split="train", field=data.text_field, limit=limit)
            held_out = load_texts(
                data.validation,
                split="validation",
                field=data.text_field,
                limit=data.validation_limit if dry_run else None,
            )
        texts = train["text"]
        self.validation_texts = list(held_out["text"][: data.validation_limit])
        questions = questions_by_context(data.qa, split="train") if mixture.qa and data.qa else []
        if mixture.qa and not questions and accelerator.is_main_process:
            print(f"note: data.qa is empty, so mixture.qa = {mixture.qa} goes to the other kinds of documents")
        self.micro_batches_a_step = config.training.accumulation * accelerator.num_processes
        self.lengths = mixture.row_tokens
        self.start = None if config.init is None else load_base(BaseConfig(path=config.init))
        self.rows: dict[int, np.ndarray] = {}
        if dry_run:
            self._use(self._tokenizer(texts, questions[: DRY_RUN_TEXTS // 10]))
            for length in set(self.lengths):
                rows = self._packer(texts, questions, length).rows(self._rows_per_batch(length), length)
                self.rows[length] = np.stack(list(rows))
        else:
            self._prepare(texts, questions, accelerator)
        torch.manual_seed(config.seed)
        model = make_model(config.architecture, self.tokenizer) if self.start is None else self.start.model
        self.module = NextToken(model.requires_grad_(True).train(), mixture.answer_weight)

    def _tokenizer(self, texts: Sequence[str], questions: Questions) -> PreTrainedTokenizerFast:
        """That of the base to start from or, without one, one trained on these texts and contexts."""
        if self.start is not None:
            return self.start.tokenizer
        return train_tokenizer([*texts, *(context for context, _ in questions)], self.config.architecture.vocabulary)

    def _prepare(self, texts: Sequence[str], questions: Questions, accelerator: Accelerator) -> None:
        """Tokenizer and rows from the output folder, where the main process makes those that are missing."""
        config, output = self.config, Path(self.config.output)
        folder = output / "tokenizer"
        if folder.exists() or any(output.glob("rows-*.npy")):
            self._refuse_other_rows(output)
        elif accelerator.is_main_process:
            write_json(output / "rows.json", self._row_settings())
        if accelerator.is_main_process and not folder.exists():
            order = np.random.default_rng(config.seed).permutation(len(texts))[:TOKENIZER_TEXTS]
            sample = [texts[int(i)] for i in order]
            with atomic_folder(folder, FOLDER) as path:
                self._tokenizer(sample, questions[: TOKENIZER_TEXTS // 10]).save_pretrained(path)
        accelerator.wait_for_everyone()
        self._use(PreTrainedTokenizerFast.from_pretrained(folder))
        most = config.architecture.vocabulary if self.start is None else len(self.start.embeddings.weight)
        if len(self.tokenizer) > min(most, ANSWER_MARK):
            raise CompressorError(
                f"the tokenizer in {folder} has {len(self.tokenizer)} tokens but the model has {most} (and rows hold "
                f"ids below {ANSWER_MARK}): delete it or use another --output"
            )
        micro_batches = config.training.steps * self.micro_batches_a_step
        for length in sorted(set(self.lengths)):
            batches = math.ceil(micro_batches / len(self.lengths)) * self.lengths.count(length)
            count, path = batches * self._rows_per_batch(length), output / f"rows-{length}.npy"
            if accelerator.is_main_process and not path.exists():
                print(f"packing {count:,} rows of {length} tokens", flush=True)
                with atomic_file(path) as temporary:
                    pack_rows(self._packer(texts, questions, length), temporary, count, length)
            accelerator.wait_for_everyone()
            self.rows[length] = np.load(path, mmap_mode="r")
            if len(self.rows[length]) < count:
                raise CompressorError(
                    f"{path} holds too few rows for this configuration ({len(self.rows[length]):,}, {count:,} are "
                    "needed): delete it to pack again"
                )

    def _use(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.split_special_tokens = True  # as in `Base`
        self.ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

    def _packer(self, texts: Sequence[str], questions: Questions, length: int) -> RowPacker:
        return RowPacker(
            texts,
            questions,
            lambda chunk: encode(self.tokenizer, chunk),
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            len(self.tokenizer),
            self.config.mixture,
            seed=self.config.seed + length,
        )

    def _row_settings(self) -> dict[str, Any]:
        """What the tokenizer and the packed rows depend on, by the settings' names."""
        config = self.config
        ignored = ("copying_start", "copying_steps", "answer_weight")
        mixture = {f"mixture.{k}": v for k, v in asdict(config.mixture).items() if k not in ignored}
        data = {f"data.{name}": getattr(config.data, name) for name in ("train", "text_field", "limit", "qa")}
        start = (
            {"architecture.vocabulary": config.architecture.vocabulary} if self.start is None else {"init": config.init}
        )
        return {"seed": config.seed, **start, **mixture, **data}

    def _refuse_other_rows(self, output: Path) -> None:
        """Raise a `CompressorError` if what lies in `output` was made with other settings (`rows.json` tells)."""
        path = output / "rows.json"
        if not path.exists():  # made by an earlier version
            return
        found, wanted = read_json(path), self._row_settings()
        if not isinstance(found, dict):
            raise CompressorError(f"{path} holds no settings; it may be damaged: delete it or use another --output")
        changed = [key for key, value in wanted.items() if found.get(key) != value]
        if changed:
            shown = ", ".join(f"{key} {found.get(key)!r}, now {wanted[key]!r}" for key in changed)
            raise CompressorError(
                f"the tokenizer and packed rows in {output} were made with other settings ({shown}): give those, use "
                "another --output, or delete tokenizer/, rows.json and rows-*.npy there to make them again"
            )

    def _rows_per_batch(self, length: int) -> int:
        return max(1, self.config.training.batch_tokens // length)

    def micro_batch(self, index: int) -> Batch:
        mixture, step = self.config.mixture, index // self.micro_batches_a_step
        if mixture.copying_start <= step < mixture.copying_start + mixture.copying_steps:
            rng = np.random.default_rng([self.config.seed, index])
            count = max(1, self.config.training.batch_tokens // (2 * COPYING_TOKENS + 2))
            rows = torch.from_numpy(copying_rows(rng, count, self.ordinary, self.tokenizer.bos_token_id))
            return {"rows": rows, "ids": ["random tokens"], "targets": rows[:, 1:].numel(), "passages": count}
        turn, place = divmod(index, len(self.lengths))
        length = self.lengths[place]
        share = self.lengths.count(length)
        number = turn * share + self.lengths[:place].count(length)
        size = self._rows_per_batch(length)
        rows = torch.from_numpy(self.rows[length][number * size : (number + 1) * size].astype(np.int64))
        ids = [f"rows-{length}[{number * size + i}]" for i in range(size)]
        return {"rows": rows, "ids": ids, "targets": size * (length - 1), "passages": size}

    def probe_batch(self) -> Batch:
        rows = self.micro_batch(0)["rows"][:1, :8]
        return {"rows": rows, "ids": [], "targets": 7, "passages": 1}

    def validate(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        self.module.eval()
        mine = self.validation_texts[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            sums: list[float] = list(bits_per_byte(self.module.model, self.tokenizer, mine))
            for length in COPY_LENGTHS:
                sums += copying_accuracy(self.module.model, self.tokenizer, mine, length)
        kind = torch.float32 if accelerator.device.type == "mps" else torch.float64  # there is no float64 there
        reduced = accelerator.reduce(torch.tensor(sums, dtype=kind).to(accelerator.device), "sum").tolist()
        figures = {"loss": reduced[0] * math.log(2) / reduced[2], "bits_per_byte": reduced[0] / reduced[1]}
        for place, length in enumerate(COPY_LENGTHS):
            figures[f"copying_{length}"] = reduced[3 + 2 * place] / max(1.0, reduced[4 + 2 * place])
        samples = [f"sample: {sample(self.module.model, self.tokenizer)}"] if accelerator.is_main_process else []
        self.module.train()
        return figures, samples

    def origin(self) -> dict[str, str]:
        return {"training.optimizer": self.config.training.optimizer}

    def save(self, folder: Path) -> None:
        """Checkpoints keep float32, so that a resumed run is exact; `export_base` writes the bundled bfloat16."""
        with atomic_folder(folder, FOLDER) as path:
            self.module.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)

    def load(self, folder: Path) -> None:
        loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.module.model.load_state_dict(loaded.state_dict())


def _names(sources: Sequence[str]) -> str:
    """Names of files, folders or data sets, without the directories they are in."""
    return ", ".join(f"`{Path(source).name}`" for source in sources)


def _described(sources: Sequence[str]) -> str:
    """The names, and what they are if all of them (or their folders) are called arxiv."""
    arxiv = all("arxiv" in "/".join(Path(source).parts[-2:]).lower() for source in sources)
    return f"arXiv abstracts ({_names(sources)}; CC0)" if arxiv else _names(sources)


def export(run: Path, output: Path, dtype: str = "bfloat16") -> None:
    """Write the finished base of a run as a transformers model folder with a generated card, atomically.

    Raises:
        CompressorError: the run has not finished.
    """
    if not (run / "final").exists():
        raise CompressorError(f"{run} has no finished model (final/): let the run end first")
    model = LlamaForCausalLM.from_pretrained(run / "final", dtype=getattr(torch, dtype))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "final")
    starts = read_json(run / "run.json")
    record = starts[-1] if isinstance(starts, list) else starts
    settings = yaml.safe_load((run / "config.yaml").read_text())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row][-1]
    held_out = [row for row in rows if "validation_bits_per_byte" in row][-1]
    copying = ", ".join(f"{held_out[f'validation_copying_{length}']:.1%} at {length} tokens" for length in COPY_LENGTHS)
    data, mixture = settings["data"], settings["mixture"]
    asked = bool(data["qa"]) and mixture["qa"] > 0
    start = f"from `{Path(settings['init']).name}`" if settings.get("init") else "from scratch"
    card = (
        "---\nlibrary_name: transformers\n---\n# Base language model\n\n"
        f"A Llama of {model.num_parameters():,} parameters with a byte-level BPE of {len(tokenizer)} tokens, trained "
        f"{start} on {_described(data['train'])}"
        + (f", and questions with answers from {_names(data['qa'])}" if asked else "")
        + ".\n\n"
        f"- {trained['step']:,} steps, {trained['tokens']:,} target tokens, {trained['seconds'] / 60:.0f} minutes; "
        f"mixture plain {mixture['plain']}, repeated {mixture['repeat']}, random {mixture['random']}, question-answer "
        f"{mixture['qa'] if asked else 0}; package version {record['versions']['compressor']}, "
        f"commit {record['commit']}.\n"
        f"- Validation on {_described(data['validation'])}: {held_out['validation_bits_per_byte']:.3f} bits per byte; "
        f"in-context copying accuracy {copying}.\n"
    )
    with atomic_folder(output, FOLDER) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "README.md").write_text(card)
