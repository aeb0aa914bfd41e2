"""A small language model made from text, top to bottom, which the compressor then takes as its base.

    python examples/from_scratch.py --data arxiv-train --output outputs/my-base
    python train.py --config configs/arxiv-mini/mini.yaml --base.path outputs/my-base --output outputs/my-compressor

The steps are those of any beginners' text, in this order below: collect texts; learn a vocabulary; encode; choose an
architecture; make pairs of input and target; the loop; write on from a prompt. One thing is particular: a third of the
training rows hold a passage twice. A model that has learned to copy from its context is one that a compressor can make
read a memory instead of a passage; without those rows copying takes far more text to emerge.

The settings below read 2.5 million tokens, about a quarter of an hour on two CPU cores; the bundled base
(`models/arxiv-mini/base`) read 15 million, questions with their answers among them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from compressor.data.records import load_texts
from compressor.errors import CompressorError, require
from compressor.files import FolderKind, atomic_folder, check_folder
from compressor.streams import exits_cleanly

FOLDER = FolderKind("a base", ("config.json", "*.json", "model.safetensors"))


# -- 1. collect ------------------------------------------------------------------------------------------------------


def collect(sources: Sequence[str], limit: int | None) -> tuple[list[str], list[str]]:
    """Texts to train on, and a few held back to see whether the model has learned more than to recite.

    Sources are JSONL, Parquet, CSV or text files, folders, a shipped name or a hub id.
    """
    texts = list(load_texts(sources, split="train", limit=limit)["text"])
    held_back = max(1, min(100, len(texts) // 20))
    if len(texts) < 20:
        raise CompressorError(f"{', '.join(sources)} has {len(texts)} texts: give at least 20, better some thousands")
    return texts[:-held_back], texts[-held_back:]


# -- 2. vocabulary ---------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the 256 bytes, and the pairs that are joined most often. Any text tokenises back to itself.

    Digits stay single, so that numbers are spelled alike wherever they stand.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
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
        split_special_tokens=True,  # a text that spells <eos> is text
    )


# -- 3. encode -------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


# -- 4. architecture -------------------------------------------------------------------------------------------------


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, **more: Any
) -> LlamaForCausalLM:
    """A Llama with random weights: rotary positions and full attention, as the compressor needs them.

    Args:
        hidden: size of the hidden states, a multiple of `heads`.
        more: further settings of `LlamaConfig`; by default as many key and value heads as heads, MLPs of 2.5 times the
            hidden size, 2,048 positions, and embeddings that are also the output layer.
    """
    if hidden % heads or hidden // heads % 2:
        raise CompressorError(f"hidden = {hidden} and heads = {heads}: hidden / heads must be a whole, even number")
    settings = {
        "num_key_value_heads": heads,
        "intermediate_size": 5 * hidden // 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **(settings | more),
        )
    )


# -- 5. pairs of input and target ------------------------------------------------------------------------------------


def rows(encoded: Sequence[Sequence[int]], tokenizer: Any, width: int, seed: int) -> Iterator[list[int]]:
    """Rows of `width` tokens without end.

    Two thirds are texts one after the other, `BOS text EOS BOS text EOS ...`; the others a passage twice,
    `BOS passage BOS passage EOS`, of log-uniform length: copying is learned from short passages first.
    """
    rng = np.random.default_rng(seed)
    bos, eos, carry = tokenizer.bos_token_id, tokenizer.eos_token_id, list[int]()
    while True:
        if rng.random() < 1 / 3:
            row: list[int] = []
            while len(row) < width:
                passage = encoded[int(rng.integers(len(encoded)))] or [eos]
                longest = max(2, min(len(passage), (width - 3) // 2))
                length = int(np.exp(rng.uniform(math.log(min(8, longest)), math.log(longest + 1))))
                start = int(rng.integers(max(1, len(passage) - length + 1)))
                cut = list(passage[start : start + length])
                row += [bos, *cut, bos, *cut, eos]
            yield row[:width]
            continue
        while len(carry) < width:
            carry += [bos, *encoded[int(rng.integers(len(encoded)))], eos]
        yield carry[:width]
        carry = carry[width:]


def pairs(row: Tensor) -> tuple[Tensor, Tensor]:
    """Every token but the last is an input, and the token after it the target; int64 `[batch, width - 1]` both."""
    return row[:, :-1], row[:, 1:]


# -- 6. the loop -----------------------------------------------------------------------------------------------------


def nats(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, float32 `[batch, width - 1]`."""
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        reduction="none",
    )
    return losses.view(targets.shape)


def train(model: nn.Module, source: Iterator[list[int]], steps: int, batch: int, rate: float) -> list[float]:
    """Next-token training with AdamW; the rate rises over the first twentieth and falls to 0 along a cosine.

    Returns:
        The loss of each step, nats a token.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / steps),
    )
    losses, started = [], time.monotonic()
    for step in range(1, steps + 1):
        inputs, targets = pairs(torch.tensor([next(source) for _ in range(batch)], device=device))
        loss = nats(model, inputs, targets).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise CompressorError(f"the loss is {losses[-1]} at step {step}: give a lower --learning-rate")
        if step % max(1, steps // 20) == 0:
            shown = sum(losses[-20:]) / len(losses[-20:])
            print(
                f"step {step:,} of {steps:,}: {shown:.3f} nats a token, {time.monotonic() - started:.0f} s", flush=True
            )
    return losses


# -- 7. see what it has learned, and write on from a prompt ----------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """Code length of unseen texts under the model: 8 where nothing was learned, about 2 for bzip2."""
    device, total = next(model.parameters()).device, 0.0
    for ids in encode(tokenizer, texts):
        inputs, targets = pairs(torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]], device=device))
        total += float(nats(model, inputs, targets).sum())
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.no_grad()
def copying(model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int) -> float:
    """How often the first choice is right in the second copy of `BOS passage BOS passage`; unseen passages."""
    device, bos, right, count = next(model.parameters()).device, tokenizer.bos_token_id, 0, 0
    for ids in (one[:length] for one in encode(tokenizer, texts) if len(one) >= length):
        choice = (
            model(input_ids=torch.tensor([[bos, *ids, bos, *ids]], device=device)).logits[0, length + 1 : -1].argmax(-1)
        )
        right, count = right + int((choice.cpu() == torch.tensor(ids)).sum()), count + length
    return right / max(1, count)


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompt: str, tokens: int = 60, temperature: float = 0.8) -> str:
    """The prompt and what the model writes after it, token by token, drawn from its distribution."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    ids = [tokenizer.bos_token_id, *encode(tokenizer, [prompt])[0]]
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1].float().cpu()
        ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", nargs="+", default=["arxiv-train"], help="texts: files, folders, a shipped name, a hub id"
    )
    parser.add_argument("--output", default="outputs/my-base", help="folder to write")
    parser.add_argument("--limit", type=int, help="only the first so many texts")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--width", type=int, default=512, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--prompt", default="We study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    check_folder(options.output, FOLDER)
    smallest = {"vocabulary": 260, "width": 32, "steps": 1, "batch": 1, "layers": 1, "heads": 1}
    for name, least in smallest.items():
        require(getattr(options, name) >= least, f"--{name}", getattr(options, name), f"at least {least}")
    torch.manual_seed(options.seed)
    texts, unseen = collect(options.data, options.limit)
    tokenizer = train_tokenizer(texts, options.vocabulary)
    encoded = encode(tokenizer, texts)
    model = make_model(tokenizer, options.hidden, options.layers, options.heads).to(options.device)
    size = sum(map(len, encoded)) / 1e6
    print(f"{len(texts):,} texts, {size:.1f}M tokens of {len(tokenizer):,}; {model.num_parameters():,} parameters")
    source = rows(encoded, tokenizer, options.width, options.seed)
    train(model.train(), source, options.steps, options.batch, options.learning_rate)
    model.eval()
    print(f"{bits_per_byte(model, tokenizer, unseen):.3f} bits a byte of {len(unseen)} unseen texts")
    print(f"copying 96 tokens from its context: {copying(model, tokenizer, unseen, 96):.1%} right")
    print(f"sample: {write(model, tokenizer, options.prompt)}")
    with atomic_folder(options.output, FOLDER) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"wrote {options.output}: a base for train.py --base.path {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
