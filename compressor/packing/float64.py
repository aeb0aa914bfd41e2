"""The base evaluated in float64 throughout, in parallel or token by token, for coding that any machine can undo."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from compressor.data.batches import pad
from compressor.model.base import Base
from compressor.model.decoder import decode, empty_prefix
from compressor.model.fingerprints import FULL_HASH_VALUES
from compressor.packing.frequencies import check_vocabulary

IDENTITY_BYTES = 3
_LOGITS_AT_ONCE = 1 << 23


class DoublePrecision(TorchFunctionMode):
    """What a model's code does in float32 on purpose (norms, rotary angles, softmax) is done in float64.

    Without this a float64 model still rounds to float32 in every layer, and a sum ordered otherwise moves its logits
    by 1e-6 instead of 1e-13.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        for arg in args:  # looked at before anything is built: this runs for every operation of every layer
            if arg is torch.float32:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
                break
        if not kwargs:
            return func(*args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def double_precision() -> Iterator[None]:
    """Evaluate in float64 what the block evaluates with a float64 base; without gradients or autocast."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), DoublePrecision():
        yield


def _with_exact_angles(model: Any) -> None:
    """Recompute the rotary frequencies in float64: float32 powers differ by processor, and positions multiply that."""
    decoder = model.get_decoder()
    before = decoder.rotary_emb
    try:
        with DoublePrecision():
            after = type(before)(config=decoder.config).to(before.inv_freq.device)
        if torch.allclose(after.inv_freq, before.inv_freq.to(after.inv_freq), rtol=1e-5, atol=0):
            decoder.rotary_emb = after.double()
    except (TypeError, AttributeError):
        pass  # a family that builds its embedding in another way keeps the frequencies it has


class ExactBase:
    """A float64 copy of a base, and an identity that changes with its weights or its vocabulary.

    A compressor's adapters are off in the copy, and left out of the identity.

    Attributes:
        base: the copy; `base.tokenizer` and `base.fingerprint` are those of the original.
        identity: what a packed file says about the base it needs, `IDENTITY_BYTES` bytes.
        noise: applied to all logits, `[rows, vocabulary] -> [rows, vocabulary]`; tests simulate other kernels with it.
    """

    def __init__(self, base: Base):
        model: Any = copy.deepcopy(base.model).double()
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation("sdpa")
        _with_exact_angles(model)
        self.base = copy.copy(base)
        self.base._modules = {**base._modules, "model": model}
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = True
        self.vocabulary = self.base.embeddings.weight.shape[0]
        check_vocabulary(self.vocabulary)
        self.window = min(512, base.positions or 512)
        self.identity = identity_of(self.base.tokenizer, model)
        self.noise: Callable[[Tensor], Tensor] | None = None

    def logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Next-token logits after each token of each row (token ids, at least one each), evaluated in parallel.

        Returns:
            For each row float64 `[tokens, vocabulary]`.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        while order:
            # The longest rows first, as many as fit, so that the peak of memory comes at once.
            width = len(rows[order[-1]])
            taken = order[-max(1, _LOGITS_AT_ONCE // (width * self.vocabulary)) :]
            order = order[: -len(taken)]
            ids, _ = pad([rows[i] for i in taken], self.base.device)
            with double_precision():
                logits = decode(self.base, empty_prefix(self.base, len(taken)), ids).cpu()
            for row, i in zip(logits, taken, strict=True):
                found[i] = self._disturbed(row[: len(rows[i])])
        return found

    def _disturbed(self, logits: Tensor) -> Tensor:
        return logits if self.noise is None else self.noise(logits)


class Lockstep(DynamicCache):
    """Contexts of several rows that grow by a token or a few a step and start again at times of their own.

    A row's keys and values lie left-aligned, `lengths` slots of them. Room grows by `_CHUNK` slots.
    """

    _CHUNK = 128

    def __init__(self, exact: ExactBase, rows: int):
        super().__init__()
        self.exact, nothing = exact, empty_prefix(exact.base, rows)
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.slots = [[k, v] for k, v in zip(nothing.keys, nothing.values, strict=True)]
        """Keys and values of each layer, those of all rows, written at each row's own place."""
        self._place = torch.zeros(0, 0, dtype=torch.int64)
        self._used = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write the step's keys and values at each row's place; returns those of all rows, up to the longest."""
        slots = self.slots[layer_idx]
        rows = torch.arange(len(self._place), device=self._place.device)[:, None]
        for kind, states in enumerate((key_states, value_states)):
            if (lacking := self._used - (old := slots[kind]).shape[2]) > 0:
                room = old.new_zeros(*old.shape[:2], -(-lacking // self._CHUNK) * self._CHUNK, old.shape[3])
                slots[kind] = torch.cat([old, room], dim=2)
            slots[kind][rows, :, self._place] = states.transpose(1, 2)
        return slots[0][:, :, : self._used], slots[1][:, :, : self._used]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in use, as transformers asks for them."""
        return self._used

    def step(self, blocks: Sequence[Sequence[int]], skipped: Sequence[int]) -> list[Tensor]:
        """Feed each row a block of tokens, at least one, and hold them all; `rewind` takes back what was too much.

        Args:
            skipped: first tokens of each block after which no logits are wanted.

        Returns:
            Of each row the next token's logits after each of the others, float64 `[tokens, vocabulary]` on the CPU.
        """
        base, (ids, sizes) = self.exact.base, pad(blocks)
        width = ids.shape[1]
        base.check_window(0, torch.from_numpy(self.lengths) + sizes - 1)
        # What pads a short block lies beyond the row's length: nothing sees it, and the next step writes over it.
        self._place = torch.from_numpy(self.lengths).to(base.device)[:, None] + torch.arange(width, device=base.device)
        self._used = int(self.lengths.max()) + width
        allowed = torch.arange(self._used, device=base.device) <= self._place[:, :, None]
        places = torch.arange(width)
        wanted = (places >= torch.tensor(skipped)[:, None]) & (places < sizes[:, None])
        options = {
            "input_ids": ids.to(base.device),
            "position_ids": self._place,
            "attention_mask": base.attention_mask(allowed),
            "past_key_values": self,
            "use_cache": True,
        }
        with double_precision():
            if base.plain_head:
                states = base.model.get_decoder()(**options).last_hidden_state
                logits = base.logits(states[wanted.to(base.device)])
            else:
                logits = base.model(**options).logits[wanted.to(base.device)]
        self.lengths += sizes.numpy()
        return list(self.exact._disturbed(logits.cpu()).split(wanted.sum(1).tolist()))

    def rewind(self, row: int, tokens: int) -> None:
        """Forget a row's last tokens."""
        self.lengths[row] -= tokens

    def restart(self, row: int) -> None:
        """Forget a row's context."""
        self.lengths[row] = 0

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(rows, device=self.exact.base.device)
        self.lengths = self.lengths[list(rows)]
        self.slots = [[kind[index] for kind in slots] for slots in self.slots]


@torch.no_grad()
def identity_of(tokenizer: Any, model: torch.nn.Module) -> bytes:
    """Hash over the vocabulary and evenly spaced weights in full precision, adapters left out.

    `Base.fingerprint` takes a base held in bfloat16 and in float32 for the same; their logits differ.
    """
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(model.named_parameters()):
        if "lora_" not in name:
            name = name.replace(".base_layer", "")
            flat = tensor.flatten()[:: max(1, tensor.numel() // FULL_HASH_VALUES)]
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + flat.float().cpu().numpy().tobytes())
    return digest.digest()[:IDENTITY_BYTES]
