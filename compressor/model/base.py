"""The frozen base: measures what the compressor relies on, refuses what cannot work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from compressor.data.batches import start_token, tokenise
from compressor.errors import CompressorError, first_line
from compressor.model.fingerprints import fingerprint
from compressor.model.kernels import GROUPED
from compressor.model.support import NO_ROPE, fit_tokenizer, refuse_unsupported, window_of


class Base(nn.Module):
    """A causal LM whose memory keys can be taken, moved and put back.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        name: the path or hub id it was loaded from.
        quantization, revision: how it was loaded, as in `BaseConfig`.
        layers, kv_heads, head_size, hidden: shape of the keys and of the embeddings.
        window: positions that layers with a sliding window attend over, None without such layers. What is read
            together must fit into it (`check_window`): then these layers do as layers with full attention do.
        rotated: for each layer, whether its keys carry RoPE (SmolLM3 leaves it out in some).
        interleaved: whether RoPE turns neighbouring dimensions (Cohere, GLM) rather than the two halves of a key.
        doubled: whether the model lists each angle twice in a row rather than all of them twice.
        fingerprint: hash of the weights as they are stored (`fingerprint`).
        plain_head: whether `logits` gives what the model makes of its last hidden states.
        decoding: how it writes token by token, `Decoding` of `config.py`; may be set at any time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str,
        quantization: str = "none",
        revision: str | None = None,
        stored: str | None = None,
    ):
        """`stored` is the fingerprint of the weights before they were given the model's type."""
        super().__init__()
        refuse_unsupported(model.config, name)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.quantization, self.revision = quantization, revision
        self.window = window_of(model.config)
        self.decoding = "auto"
        self._compiled: Any = None
        self.model.requires_grad_(False)
        self.model.eval()
        if tokenizer.eos_token_id is None:
            raise CompressorError(f"the tokenizer of {name} has no end-of-text token (eos_token), which ends a passage")
        # Text that spells a special token is text: "</s>" in a passage must not end it.
        self.tokenizer.split_special_tokens = True
        fit_tokenizer(tokenizer, self.embeddings.weight.shape[0], name)
        if getattr(model.get_decoder(), "rotary_emb", None) is None:
            raise CompressorError(f"{name} ({model.config.model_type}) is not supported: {NO_ROPE}")
        try:
            self.layers, self.kv_heads, self.head_size, self.rotated = self._probe()
        except (CompressorError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a family whose model takes or gives something else
            raise CompressorError(
                f"{name} ({model.config.model_type}) cannot be read as a base ({type(error).__name__}: "
                f"{first_line(error)}): use one of another family"
            ) from None
        self.hidden = self.embeddings.weight.shape[1]
        self.fingerprint = fingerprint(model) if stored is None else stored
        settings = model.config.get_text_config()
        # Cohere multiplies, Granite divides.
        self._logit_factor: float = getattr(settings, "logit_scale", None) or 1 / (
            getattr(settings, "logits_scaling", None) or 1.0
        )
        self._logit_cap: float | None = getattr(settings, "final_logit_softcapping", None)
        self.plain_head = self._probe_head()

    @property
    def embeddings(self) -> nn.Embedding:
        """The input embeddings, weight `[vocabulary, hidden]`."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def dtype_name(self) -> str:
        """`dtype` as settings and records have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def positions(self) -> int | None:
        """Positions that the base was made for, beyond which it writes noise, or those of its sliding window if these
        are fewer; None where its configuration has neither."""
        limits = (getattr(self.model.config.get_text_config(), "max_position_embeddings", None), self.window)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def bos(self) -> int:
        """Token that starts a regeneration; bases without BOS (Qwen) use their end-of-text token."""
        return start_token(self.tokenizer)

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end what is written: EOS, and those that the base's generation settings list, as Llama 3's do."""
        listed = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        others = listed if isinstance(listed, list | tuple) else [listed]
        return tuple(dict.fromkeys([self.eos, *(one for one in others if isinstance(one, int))]))

    def tokenise(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens."""
        return tokenise(self.tokenizer, texts)

    def rotate(self, keys: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        """Turn keys by RoPE to `positions` (or, inverse, back to position 0).

        Args:
            keys: `[layers, batch, heads, k, head_size]`.
            positions: int64 `[batch, k]`.

        Returns:
            Keys of the same shape and type. Layers without RoPE are left as they are. The attention scaling that
            YaRN-type embeddings multiply into cos and sin is applied and taken out with the rotation.
        """
        with torch.autocast(keys.device.type, enabled=False):
            cos, sin = self._angles(positions)
            if inverse:
                scale = cos**2 + sin**2
                cos, sin = cos / scale, -sin / scale
            width = 2 * cos.shape[-1]
            turned, rest = keys[..., :width].float(), keys[..., width:]
            if self.interleaved:
                first, second = turned[..., ::2], turned[..., 1::2]
            else:
                first, second = turned.chunk(2, dim=-1)
            halves = [first * cos - second * sin, second * cos + first * sin]
            turned = torch.stack(halves, dim=-1).flatten(-2) if self.interleaved else torch.cat(halves, dim=-1)
            moved = torch.cat([turned.to(keys.dtype), rest], dim=-1)
        if all(self.rotated):
            return moved
        chosen = torch.tensor(self.rotated, device=keys.device)[:, None, None, None, None]
        return torch.where(chosen, moved, keys)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each pair's angle, float32 `[layers or 1, batch, 1, k, pairs]`.

        Models give each of them twice, some for each kind of layer.
        """
        rotary = self.model.get_decoder().rotary_emb
        nothing = torch.empty(0, device=positions.device, dtype=torch.float32)
        if getattr(rotary, "layer_types", None):
            kinds = self.model.config.get_text_config().layer_types
            of_kind = {kind: torch.stack(rotary(nothing, positions, kind)) for kind in set(kinds)}
            twice = torch.stack([of_kind[kind] for kind in kinds], dim=1)
        else:
            twice = torch.stack(rotary(nothing, positions))[:, None]
        once = twice[..., ::2] if self.doubled else twice[..., : twice.shape[-1] // 2]
        cos, sin = once.float()[:, :, :, None]
        return cos, sin

    def check_window(self, first: int | Tensor, last: int | Tensor) -> None:
        """Raise a `CompressorError` if positions from `first` to `last` do not fit into the sliding window."""
        if self.window is None:
            return
        span = int((torch.as_tensor(last) - torch.as_tensor(first)).max()) + 1
        if span > self.window:
            raise CompressorError(
                f"passage, memory and prompt take {span:,} positions, and {self.name} has layers that attend over "
                f"{self.window:,} alone: compress fewer tokens at a time, or use a base without a sliding window"
            )

    def attention_mask(self, allowed: Tensor) -> Tensor:
        """A mask the attention implementation takes, from bool `[batch, queries, keys]` (True = may attend)."""
        if self.model.config._attn_implementation in ("sdpa", GROUPED):
            return allowed[:, None]
        return self.additive_mask(allowed)

    def additive_mask(self, allowed: Tensor) -> Tensor:
        """The same as numbers to be added to scores, which every implementation takes: made once, not in each layer."""
        mask = torch.zeros_like(allowed, dtype=self.dtype)
        return mask.masked_fill(~allowed, torch.finfo(self.dtype).min)[:, None]

    def compiled_model(self) -> Any:
        """The model as `torch.compile` makes it: on a GPU with CUDA graphs, which decoding of few rows waits for."""
        if self._compiled is None:
            self._compiled = torch.compile(
                self.model, dynamic=False, mode="reduce-overhead" if self.device.type == "cuda" else None
            )
        return self._compiled

    def hidden_states(
        self, embedded: Tensor, positions: Tensor, allowed: Tensor, cache: DynamicCache | None = None
    ) -> Tensor:
        """Last hidden states (after the final norm), `[batch, width, hidden]`; arguments as for `keys_and_values`."""
        # What was read before begins at position 0.
        self.check_window(0 if cache is not None and cache.get_seq_length() else positions.amin(1), positions.amax(1))
        output = self.model.get_decoder()(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=self.attention_mask(allowed),
            past_key_values=DynamicCache() if cache is None else cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def read(self, embedded: Tensor, positions: Tensor, allowed: Tensor) -> DynamicCache:
        """A cache of what the decoder layers keep of these embeddings; arguments as for `keys_and_values`."""
        cache = DynamicCache()
        self.hidden_states(embedded, positions, allowed, cache)
        return cache

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocabulary]` of last hidden states `[..., hidden]`; see `plain_head`."""
        logits = self.model.get_output_embeddings()(hidden)
        if self._logit_factor != 1:  # a pass over the vocabulary, and one back
            logits = logits * self._logit_factor
        cap = self._logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    def keys_and_values(
        self,
        embedded: Tensor,
        positions: Tensor,
        allowed: Tensor,
        last: int | None = None,
        cache: DynamicCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the decoder layers and take what they cache; differentiable.

        Args:
            embedded: input embeddings, `[batch, width, hidden]`.
            positions: int64 `[batch, width]`.
            allowed: bool `[batch, width, cached + width]`, True where a row may attend to a column.
            last: take only so many positions from the end.
            cache: what was read before (`read`); these embeddings are added to it.

        Returns:
            Rotated keys and values, each `[layers, batch, kv_heads, last or cached + width, head_size]`.

        Raises:
            CompressorError: the layers do not keep one key tensor of one shape each, or have a window that the
                positions do not fit into.
        """
        cache = DynamicCache() if cache is None else cache
        self.hidden_states(embedded, positions, allowed, cache)
        first = 0 if last is None else allowed.shape[2] - last
        keys, values = (list[Any](getattr(layer, name, None) for layer in cache.layers) for name in ("keys", "values"))
        if not (_alike(keys) and _alike(values)):
            raise CompressorError(
                f"{self.name} ({self.model.config.model_type}) does not keep one key tensor of one shape for each "
                "layer, so a memory cannot be taken from it: use a base with full attention in every layer"
            )
        stacked = [torch.stack([layer[:, :, first:] for layer in kind]) for kind in (keys, values)]
        return stacked[0], stacked[1]

    def probe_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, positions and causal mask of four tokens, to try the model with."""
        table = self.embeddings
        embedded = table(torch.arange(4, device=self.device)[None] % len(table.weight))
        allowed = torch.ones(1, 4, 4, dtype=torch.bool, device=self.device).tril()
        return embedded, torch.arange(4, device=self.device)[None], allowed

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, int, list[bool]]:
        """Run four tokens at two places and see whether `rotate` explains the difference between their keys."""
        embedded, before, allowed = self.probe_inputs()
        shift = 101
        here, there = (self.keys_and_values(embedded, before + moved, allowed)[0] for moved in (0, shift))
        layers, _, heads, _, size = here.shape
        tolerance = 1e-3 if here.dtype == torch.float32 else 0.05

        def errors(found: Tensor) -> Tensor:
            size_of = there.float().flatten(1).norm(dim=1)
            return (found - there).float().flatten(1).norm(dim=1) / size_of.clamp(min=1e-30)

        unmoved = errors(here)
        for self.interleaved, self.doubled in ((False, False), (True, True), (True, False), (False, True)):
            self.rotated = [True] * layers
            moved = errors(self.rotate(self.rotate(here, before, inverse=True), before + shift))
            if bool((torch.minimum(unmoved, moved) <= tolerance).all()):
                # The better explanation, not the first that will do: slow RoPE dimensions hardly move a key.
                return layers, heads, size, (moved <= unmoved).tolist()
        layer = int((torch.minimum(unmoved, moved) > tolerance).nonzero()[0])
        raise CompressorError(
            f"{self.name} ({self.model.config.model_type}) encodes positions in a way that is not plain RoPE "
            f"(layer {layer}: moved keys differ), so memory keys cannot be moved: use another base"
        )

    @torch.no_grad()
    def _probe_head(self) -> bool:
        embedded, positions, allowed = self.probe_inputs()
        mask = self.attention_mask(allowed)
        found = self.logits(self.hidden_states(embedded, positions, allowed))
        wanted = self.model(
            inputs_embeds=embedded, position_ids=positions, attention_mask=mask, past_key_values=DynamicCache()
        ).logits
        return found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=0.02)


def _alike(tensors: list[Any]) -> bool:
    """Whether these are tensors `[batch, heads, width, size]` of one shape, and at least one."""
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() == 4 for tensor in tensors):
        return False
    return all(tensor.shape == tensors[0].shape for tensor in tensors)
