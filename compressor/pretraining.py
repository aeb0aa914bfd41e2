"""Stage `base`: from text to a small Llama that can serve as a frozen base.

Tokenizer, packed rows (`compressor/data/packing.py`), next-token loss, and the figures that tell whether a compressor
can be trained on the result: bits per byte and in-context copying accuracy on unseen passages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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
from compressor.config import ArchitectureConfig, BaseConfig, RunConfig
from compressor.data.packing import COPYING_TOKENS, RowPacker, copying_rows, pack_rows, read_question_records
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.files import atomic_path, read_json
from compressor.training import Batch

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
TOKENIZER_TEXTS = 100_000
COPY_LENGTHS = (96, 240)


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
    """A causal LM whose forward returns the summed next-token loss of a batch of rows."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """`batch["rows"]` is int64 `[rows, length]`; returns the sum over `rows * (length - 1)` targets."""
        rows = batch["rows"]
        logits = self.model(input_ids=rows, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 16
) -> tuple[float, int, int]:
    """Code length of `texts` under the model, each on its own as `BOS text EOS`.

    Returns:
        Total bits, total bytes of UTF-8, total target tokens.
    """
    device = next(model.parameters()).device
    bits, size, tokens = 0.0, 0, 0
    encoded = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), batch_size):
        chunk = [encoded[i] for i in order[start : start + batch_size]]
        width = max(map(len, chunk))
        rows = torch.full((len(chunk), width), tokenizer.pad_token_id)
        for row, ids in zip(rows, chunk, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        labels = rows[:, 1:].clone()
        for label, ids in zip(labels, chunk, strict=True):
            label[len(ids) - 1 :] = -100
        logits = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten().to(device), reduction="sum", ignore_index=-100
        )
        bits += float(loss) / math.log(2)
        tokens += int((labels != -100).sum())
    size = sum(len(text.encode()) for text in texts)
    return bits, size, tokens


@torch.no_grad()
def copying_accuracy(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int, batch_size: int = 16
) -> tuple[int, int]:
    """How often the model's first choice is right in the second copy of `BOS passage BOS passage`.

    Returns:
        Correct tokens and all tokens, over texts of at least `length` tokens cut to `length`.
    """
    device = next(model.parameters()).device
    passages = [ids[:length] for ids in tokenizer(list(texts))["input_ids"] if len(ids) >= length]
    correct = 0
    for start in range(0, len(passages), batch_size):
        chunk = torch.tensor(passages[start : start + batch_size])
        bos = torch.full((len(chunk), 1), tokenizer.bos_token_id)
        rows = torch.cat([bos, chunk, bos, chunk], dim=1).to(device)
        choice = model(input_ids=rows, use_cache=False).logits[:, length + 1 : -1].argmax(-1)
        correct += int((choice == rows[:, length + 2 :]).sum())
    return correct, len(passages) * length


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Any, tokens: int = 60, temperature: float = 0.8) -> str:
    """A text drawn from the model, from BOS on; always with the same random numbers."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = [tokenizer.bos_token_id]
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        ids.append(int(torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=generator)))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True).replace("\n", " / ")


def evaluate(path: str, data: str, limit: int | None = None) -> dict[str, Any]:
    """Held-out figures of a base.

    Returns:
        `base`, `data`, `n`, `parameters`, `bits_per_byte`, `nats_per_token`, `copying` (length in tokens to accuracy
        in the second copy of a repeated passage) and `sample`.
    """
    base = load_base(BaseConfig(path=path))
    texts = list(load_texts(data, split="test", limit=limit)["text"])
    bits, size, tokens = bits_per_byte(base.model, base.tokenizer, texts)
    copying = {}
    for length in COPY_LENGTHS:
        correct, total = copying_accuracy(base.model, base.tokenizer, texts, length)
        copying[str(length)] = correct / max(1, total)
    return {
        "base": path,
        "fingerprint": base.fingerprint,
        "data": data,
        "n": len(texts),
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "bits_per_byte": bits / size,
        "nats_per_token": bits * math.log(2) / tokens,
        "copying": copying,
        "sample": sample(base.model, base.tokenizer),
    }


class BaseStage:
    """Trains the base; see `compressor.training.Stage`."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.config = config
        output = Path(config.output)
        with accelerator.main_process_first():
            train = load_texts(config.data.train, split="train", field=config.data.text_field, limit=config.data.limit)
            held_out = load_texts(config.data.validation, split="validation", field=config.data.text_field)
        texts = train["text"]
        self.validation_texts = list(held_out["text"][: config.data.validation_limit])
        questions = read_question_records(config.data.qa) if config.mixture.qa else []

        tokenizer_folder = output / "tokenizer"
        if accelerator.is_main_process and not tokenizer_folder.exists():
            order = np.random.default_rng(config.seed).permutation(len(texts))[:TOKENIZER_TEXTS]
            sample = [texts[int(i)] for i in order] + [context for context, _ in questions[: TOKENIZER_TEXTS // 10]]
            with atomic_path(tokenizer_folder) as path:
                train_tokenizer(sample, config.architecture.vocabulary).save_pretrained(path)
        accelerator.wait_for_everyone()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
        self.tokenizer.split_special_tokens = True  # as in `Base`
        if len(self.tokenizer) > min(config.architecture.vocabulary, 1 << 16):
            raise CompressorError(
                f"the tokenizer in {tokenizer_folder} has {len(self.tokenizer)} tokens but architecture.vocabulary is "
                f"{config.architecture.vocabulary}: delete it or use another --output"
            )

        self.micro_batches_a_step = config.training.accumulation * accelerator.num_processes
        self.ordinary = np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)
        self.lengths = config.mixture.row_tokens
        self.rows: dict[int, np.ndarray] = {}
        micro_batches = config.training.steps * self.micro_batches_a_step
        for length in sorted(set(self.lengths)):
            share = sum(1 for one in self.lengths if one == length)
            batches = math.ceil(micro_batches / len(self.lengths)) * share
            path = output / f"rows-{length}.npy"
            if accelerator.is_main_process and not path.exists():
                packer = RowPacker(
                    texts,
                    questions,
                    lambda chunk: self.tokenizer(list(chunk), verbose=False)["input_ids"],
                    self.tokenizer.bos_token_id,
                    self.tokenizer.eos_token_id,
                    len(self.tokenizer),
                    config.mixture,
                    seed=config.seed + length,
                )
                print(f"packing {batches * self._rows_per_batch(length):,} rows of {length} tokens", flush=True)
                with atomic_path(path) as temporary:
                    pack_rows(packer, temporary, batches * self._rows_per_batch(length), length)
            accelerator.wait_for_everyone()
            self.rows[length] = np.load(path, mmap_mode="r")
            if len(self.rows[length]) < batches * self._rows_per_batch(length):
                raise CompressorError(f"{path} holds too few rows for this configuration: delete it to pack again")
        torch.manual_seed(config.seed)
        self.module = NextToken(make_model(config.architecture, self.tokenizer))

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
        reduced = accelerator.reduce(torch.tensor(sums, dtype=torch.float64).to(accelerator.device), "sum").tolist()
        figures = {"loss": reduced[0] * math.log(2) / reduced[2], "bits_per_byte": reduced[0] / reduced[1]}
        for place, length in enumerate(COPY_LENGTHS):
            figures[f"copying_{length}"] = reduced[3 + 2 * place] / max(1.0, reduced[4 + 2 * place])
        samples = [f"sample: {sample(self.module.model, self.tokenizer)}"] if accelerator.is_main_process else []
        self.module.train()
        return figures, samples

    def save(self, folder: Path) -> None:
        """Checkpoints keep float32, so that a resumed run is exact; `export_base` writes the bundled bfloat16."""
        self.module.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.module.model.load_state_dict(loaded.state_dict())


def export(run: Path, output: Path, dtype: str = "bfloat16") -> None:
    """Write the finished base of a run as a transformers model folder with a generated card, atomically.

    Raises:
        CompressorError: the run has not finished.
    """
    if not (run / "final").exists():
        raise CompressorError(f"{run} has no finished model (final/): let the run end first")
    model = LlamaForCausalLM.from_pretrained(run / "final", dtype=getattr(torch, dtype))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "final")
    record = read_json(run / "run.json")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row][-1]
    held_out = [row for row in rows if "validation_bits_per_byte" in row][-1]
    copying = ", ".join(f"{held_out[f'validation_copying_{length}']:.1%} at {length} tokens" for length in COPY_LENGTHS)
    mixture = settings["mixture"]
    card = (
        "---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# arxiv-mini base\n\n"
        f"A Llama of {model.num_parameters():,} parameters with a byte-level BPE of {len(tokenizer)} tokens, trained "
        "from scratch on arXiv abstracts dated before 2026 (CC0) and SQuAD v1.1 training questions (CC BY-SA 4.0).\n\n"
        f"- Recipe: `configs/arxiv-mini/base.yaml`, {trained['step']:,} steps, {trained['tokens']:,} target tokens, "
        f"{trained['seconds'] / 60:.0f} minutes; mixture plain {mixture['plain']}, repeated {mixture['repeat']}, "
        f"question-answer {mixture['qa']}; package version {record['versions']['compressor']}, "
        f"commit {record['commit']}.\n"
        f"- Validation abstracts (January 2026, unseen): {held_out['validation_bits_per_byte']:.3f} bits per byte; "
        f"in-context copying accuracy {copying}.\n"
    )
    with atomic_path(output) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "README.md").write_text(card)
