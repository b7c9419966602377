"""Ranks: one process per device, and the model sharded over them with FSDP2.

A launcher such as torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and the address of the first rank; for
tasks of srun, `launched` does. Without one there is a single process, no process group, and this
module does nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

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
from rrhf_fast.train.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's position among the ranks of a run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # (replicate, shard); None without a process group

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, and writes files that exist once per run."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print on the first rank."""
        if self.is_first:
            say(text)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """All ranks' values, in rank order, on every rank."""
        if self.mesh is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the body fails on any rank, raise the lowest such rank's exception on all ranks."""
        own = None
        try:
            yield
        except Exception as error:
            own = error
        for error in self.gather(own):
            if error is not None:
                error.on_all_ranks = True
                raise error

    def once(self, function: Callable[[], T]) -> T:
        """Call on the first rank; all ranks return its result, or raise its exception."""
        outcome = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.mesh is not None:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            outcome[1].on_all_ranks = True
            raise outcome[1]
        return outcome[0]


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether `World` raised this error on every rank, so that the ranks are still in step."""
    return getattr(error, "on_all_ranks", False)


@contextmanager
def join_world(config: TrainConfig) -> Iterator[World]:
    """Join the other ranks if a launcher started any; leave them at the end.

    Raises:
        ValueError: data_parallel_shard times data_parallel_replicate is not the number of ranks, or
            the launcher's variables make no sense.
    """
    rank, size, local_rank, by_launcher = launched()
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() == 1:  # Slurm may show each task its own GPU only
        local_rank = 0
    if cuda and local_rank >= torch.cuda.device_count():
        problem = f"expected less than {torch.cuda.device_count()}, the number of GPUs"
        raise ValueError(f"LOCAL_RANK: {problem}, found {local_rank}")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    shard = config.data_parallel_shard or size // config.data_parallel_replicate
    if shard * config.data_parallel_replicate != size:
        product = f"{shard} x {config.data_parallel_replicate} for {size} processes"
        raise ValueError(
            "data_parallel_shard, data_parallel_replicate: expected their product to be the number "
            f"of processes (torchrun --nproc_per_node), found {product}"
        )
    if not by_launcher:
        if config.cpu_offload:
            raise ValueError("cpu_offload: needs torchrun (one process is enough)")
        yield World(device)
        return
    if cuda:
        torch.cuda.set_device(device)
    joined_here = not dist.is_initialized()
    if joined_here:
        # The thread that writes checkpoints communicates over gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    names = ("replicate", "shard")
    mesh = init_device_mesh(
        device.type, (config.data_parallel_replicate, shard), mesh_dim_names=names
    )
    yield World(device, rank, size, mesh)
    # Not after an exception: other ranks may be waiting in a collective that this one never joins.
    if joined_here:
        dist.destroy_process_group()


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
    for name in ("edge_weights", "weighted_loss"):
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's full value, on every rank. All ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
