"""vLLM's side: a KV connector that writes placed memories into its paged cache. Tried with vLLM 0.32.

A request that reads `HASH.safetensors` of the shelf carries `kv_transfer_params = {"memory": HASH, "tokens": k}`,
`cache_salt = HASH` (":..." may follow), which keeps memories apart in the prefix cache, and k placeholders as a start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

logger = init_logger(f"vllm.{__name__}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass
class Load:
    """A memory (the empty name fails its request) whose tokens `first` to `end` go to the request's first blocks."""

    memory: str
    first: int
    end: int
    blocks: list[int]


class Loads(list[Load], KVConnectorMetadata):
    """What the scheduler tells the workers about a step."""


class CompressedMemories(KVConnectorBase_V1):
    """Scheduler: counts a memory's tokens as computed elsewhere. Workers: write it, each its heads of its layers."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError("memories need one kind of KV cache for all layers, and this base has several")
        extra = self._kv_transfer_config.get_from_extra_config
        self.shelf, self.placeholder = Path(extra("shelf", "")), extra("placeholder", None)
        self.block_size, self.dtype = vllm_config.cache_config.block_size, vllm_config.model_config.dtype
        self.loads = Loads()
        self.failed: set[int] = set()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens of the request's memory beyond those that the prefix cache holds."""
        wanted = self.wanted(request)
        return (0 if wanted is None else max(wanted[1] - num_computed_tokens, 0)), False

    def wanted(self, request: Any) -> tuple[str, int] | None:
        """Name and tokens of the memory a request asks for; the empty name, which fails, if it asks for it wrongly."""
        params = request.kv_transfer_params
        if not isinstance(params, dict) or "memory" not in params:
            return None
        name, tokens, ids = params["memory"], params.get("tokens", 0), list(request.prompt_token_ids or [])
        named = isinstance(name, str) and _HASH.fullmatch(name) and (request.cache_salt or "").split(":")[0] == name
        fits = type(tokens) is int and 0 < tokens < len(ids)
        if not named or not fits or ids[:tokens] != [self.placeholder] * tokens:
            return "", max(len(ids) - 1, 0)
        return name, tokens

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note where the memory goes."""
        wanted = self.wanted(request)
        if wanted is not None and num_external_tokens > 0:
            name, tokens = wanted
            held = list(blocks.get_block_ids()[0])[: -(-tokens // self.block_size)]
            self.loads.append(Load(name, tokens - num_external_tokens, tokens, held))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What was noted since the step before."""
        loads, self.loads = self.loads, Loads()
        return loads

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the memories of this step's new requests; what cannot be read fails its requests, not the engine."""
        for load in self._get_connector_metadata():
            try:
                self.write(load, forward_context.no_compile_layers)
            except Exception as error:  # safetensors and the file system raise many kinds
                logger.error("memory %s cannot be loaded: %s", load.memory[:12] or "(named wrongly)", error)
                self.failed.update(load.blocks[load.first // self.block_size :])

    def write(self, load: Load, layers: dict[str, Any]) -> None:
        """Copy a memory from the shelf to its slots in every attention layer of this worker."""
        places = torch.arange(load.first, load.end)
        slots = torch.tensor(load.blocks)[places // self.block_size] * self.block_size + places % self.block_size
        with safe_open(self.shelf / f"{load.memory}.safetensors", framework="pt") as file:
            kinds = [file.get_slice("keys"), file.get_slice("values")]
            heads, workers = kinds[0].get_shape()[2], get_tensor_model_parallel_world_size()
            first = get_tensor_model_parallel_rank() * heads // workers
            own = slice(first, first + max(heads // workers, 1))
            for name, layer in layers.items():
                if isinstance(layer, AttentionLayerBase):
                    cache, index = layer.kv_cache, extract_layer_index(name)
                    found = [kind[index, load.first : load.end, own].to(cache.device, self.dtype) for kind in kinds]
                    key, value = (tensor.contiguous() for tensor in found)
                    # The backend knows how its cache is laid out: on CPUs it is packed.
                    layer.impl.do_kv_cache_update(layer, key, value, cache, slots.to(cache.device))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold no memory though they should: vLLM fails their requests (`kv_load_failure_policy`)."""
        failed, self.failed = self.failed, set()
        return failed

    def wait_for_save(self, *_: Any, **__: Any) -> None:
        """Nothing is saved, and `start_load_kv` has written all layers."""

    wait_for_layer_load = save_kv_layer = wait_for_save
