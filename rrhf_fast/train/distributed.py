"""Ranks: one process per device, and the model sharded over them with FSDP2.

A launcher such as torchrun starts them; without one there is a single process, no process group,
and this module does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rrhf_fast.model.layers import decoder_layers
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.stages.launcher import launched
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import Ranks, join_ranks, local_device
from rrhf_fast.train.config import TrainConfig


@dataclass(frozen=True)
class World(Ranks):
    """This process's position among the ranks of a training run."""

    device: torch.device
    mesh: DeviceMesh | None = None  # (replicate, shard); None without a process group

    def print(self, text: str) -> None:
        """Print on the first rank."""
        if self.is_first:
            say(text)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def join_world(config: TrainConfig) -> Iterator[World]:
    """Join the other ranks if a launcher started any; leave them at the end.

    Raises:
        ValueError: data_parallel_shard times data_parallel_replicate is not the number of ranks, or
            the launcher's variables make no sense.
        RankLost: another rank has ended while this one waited for it.
    """
    size, by_launcher = launched().size, launched().by_launcher
    device = local_device()
    shard = config.data_parallel_shard or size // config.data_parallel_replicate
    if shard * config.data_parallel_replicate != size:
        product = f"{shard} x {config.data_parallel_replicate} for {size} processes"
        raise ValueError(
            "data_parallel_shard, data_parallel_replicate: expected their product to be the number "
            f"of processes (torchrun --nproc_per_node), found {product}"
        )
    if config.cpu_offload and not by_launcher:
        raise ValueError("cpu_offload: needs torchrun (one process is enough)")
    with join_ranks("train", config) as ranks:
        mesh = None
        if by_launcher:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            shape = config.data_parallel_replicate, shard
            mesh = _mesh(dist.group.WORLD, device.type, shape)
        yield World(device, mesh, **vars(ranks))


@lru_cache(maxsize=1)
def _mesh(group: dist.ProcessGroup, device_type: str, shape: tuple[int, int]) -> DeviceMesh:
    """The mesh of these ranks; rounds of training share it, and its communicators."""
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(model: RRHFModel, world: World, config: TrainConfig) -> None:
    """Shard every layer, then the rest (embeddings, norm, head) as the root, so that the head's
    weight is whole while the root's forward runs. Weights stay float32; ranks compute in
    `config.dtype` and sum gradients in float32."""
    dtype = getattr(torch, config.dtype)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    options = {
        "mesh": world.mesh if config.data_parallel_replicate > 1 else world.mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rewards rounded to bfloat16 would tie
        ),
        "offload_policy": offload if config.cpu_offload else OffloadPolicy(),
    }
    for layer in decoder_layers(model.lm):
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    for name in ("edge_weights", "weighted_loss", "response_logps"):
        register_fsdp_forward_method(model, name)


def prepare_backward(model: nn.Module, config: TrainConfig, *, is_last: bool) -> None:
    """Tell FSDP whether this pack is the optimizer step's last; call before its forward."""
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(is_last)
    if config.reshard_after_forward:
        # Gradients are scattered after each pack, so none is ever whole; replicas sum theirs once.
        model.set_requires_all_reduce(is_last)
    else:
        # Weights are gathered and gradients reduced once per optimizer step.
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)


@contextmanager
def gathered(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Inside, every rank holds all weights, so that ranks can run the model independently (sampling
    takes a different number of steps on each)."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(
                config.reshard_after_forward and unit is not model, recurse=False
            )


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without a backward left whole: where they are, `parameters`
    gives others than the optimizer must have."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's full value, on every rank. All ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
