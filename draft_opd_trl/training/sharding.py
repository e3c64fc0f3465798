"""A drafter and its target with their weights spread over ranks (FSDP2).

Both are read in pieces, not through one forward of the whole model, so what accelerate would wrap does not fit: of the
target the layers are sharded, and of the drafter one group. Knows no rollouts, no losses and no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard

from ..core.errors import InputError
from ..core.target import Target


def check_parallelism(accelerator: Accelerator, muon: bool) -> None:
    """
    Args:
        accelerator ([`~accelerate.Accelerator`]): As launched.
        muon (`bool`): Whether [`MuonWithAdamW`] is the optimizer.

    Raises:
        `ValueError`: The launcher asks for a way of sharding that a drafter and its target cannot be trained in.
    """
    state = accelerator.state
    if state.deepspeed_plugin is not None and muon:
        raise InputError(
            "The optimizer is Muon (optim: muon), but DeepSpeed hands it weights flattened into vectors, and it is "
            "for matrices. Set optim: adamw_torch, or launch with DDP or FSDP2 (examples/accelerate_configs)."
        )
    if state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3:
        raise InputError(
            "DeepSpeed ZeRO-3 partitions embeddings and heads too, which drafters and losses read as plain tensors. "
            "Use zero_stage 2, or shard the target with FSDP2 (examples/accelerate_configs/fsdp2.yaml)."
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise InputError(
            f"fsdp_version is {plugin.fsdp_version}, whose flat parameters cannot be read outside a forward of the "
            "whole model. Set fsdp_version: 2."
        )
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise InputError(
            f"fsdp_state_dict_type is {plugin.state_dict_type.name}, which would leave no drafter folder behind. Set "
            "it to FULL_STATE_DICT; drafters are small."
        )


def shard(target: Target, model: torch.nn.Module, accelerator: Accelerator) -> None:
    """
    Spread the target's layers and the whole drafter over all ranks, in place and in their own dtypes.

    A quantised target stays whole on every rank: packed weights cannot be cut.

    Args:
        target ([`Target`]): Loaded on every rank; its embedding, final norm and head stay whole.
        model (`torch.nn.Module`): The drafter, with its adapter if it has one. One group, gathered at once.
        accelerator ([`~accelerate.Accelerator`]): With an FSDP2 plugin.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options = {"mesh": mesh, "offload_policy": accelerator.state.fsdp_plugin.cpu_offload}
    if not target.quantized:
        target.shard(**options)
    fully_shard(model, **options)


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """A sharded model's whole parameters inside, on every rank; all ranks must enter. Other models are left alone."""
    sharded = isinstance(model, FSDPModule)
    if sharded:
        model.unshard()
    try:
        yield
    finally:
        if sharded:
            model.reshard()
