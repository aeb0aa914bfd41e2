"""A frozen base that is larger than a device: torch's `fully_shard` (FSDP2) shares its layers out over the processes.

Each process keeps its part of every layer and gathers a layer while it runs. What is trained, a few percent of the
base, stays whole on all of them under DDP: optimisers, clipping and checkpoints are those of any run. accelerate's own
FSDP would share out the adapters too, and starts on GPUs alone; this runs on CPUs as well, where it is tested.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from compressor.errors import CompressorError
from compressor.training.config import RunConfig
from compressor.training.objectives import Trainee

T = TypeVar("T")


def sharding_asked(config: RunConfig) -> bool:
    """Whether the launcher asks for shards (`configs/accelerate/fsdp2.yaml`); what goes against them is refused."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true", "yes"):
        return False
    reasons = {
        "fsdp_version below 2: set 2": int(os.environ.get("FSDP_VERSION", "1")) < 2,
        "fsdp_offload_params: leave it out, the base alone is shared out": _on("FSDP_OFFLOAD_PARAMS"),
        "fsdp_activation_checkpointing: set training.activation_checkpointing": _on("FSDP_ACTIVATION_CHECKPOINTING"),
        "base.quantization, whose weights are packed: launch with multi-gpu.yaml": config.base.quantization != "none",
        "training.compile: set it to no": config.training.compile != "no",
        "data.question_share below 1, with which processes make different passes: set 1, or launch with "
        "multi-gpu.yaml": config.stage == "answer" and config.data.question_share < 1,
    }
    if found := [reason for reason, given in reasons.items() if given]:
        raise CompressorError(f"a base in shards (fsdp2.yaml) does not go with {'; nor with '.join(found)}")
    return True


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def shard_base(model: Trainee, accelerator: Accelerator) -> None:
    """Share the layers of a compressor's base out over all processes and put the rest on this one's device.

    The last layer stays whole, as do embeddings and output layer: gradients enter it through the keys and values that
    it keeps, where no hook of FSDP's gathers its weights for the backward pass.
    """
    decoder = model.base.model.get_decoder()
    layers = next(
        part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == model.base.layers
    )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in list(layers)[:-1]:
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # The root of the layers has no parameters of its own: it lets one be gathered while another runs.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
    model.to(accelerator.device)
    # DDP is for what is trained.
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    )
    model.sharded = True


def prepared(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The module as accelerate prepares it, and on several processes under DDP.

    On GPUs accelerate refuses to put a module with shards under DDP: it does not know that DDP leaves these alone
    (`shard_base`). So it prepares such a module as one that is not trained, which gets no DDP of its own.
    """
    if not getattr(model, "sharded", False) or accelerator.num_processes == 1:
        return accelerator.prepare_model(model)
    return nn.parallel.DistributedDataParallel(accelerator.prepare_model(model, evaluation_mode=True))


def share_out(groups: Sequence[T], model: Trainee, accelerator: Accelerator) -> Sequence[T]:
    """Those of the groups that this process runs: with shards all of them, since every pass is made by all together."""
    return groups if model.sharded else groups[accelerator.process_index :: accelerator.num_processes]
