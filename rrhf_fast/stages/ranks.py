"""Ranks: the processes that share the work of a run, and what they say to each other.

A launcher, torchrun or srun, starts one per device; without one there is a single process, and
nothing here needs another. A rank that ends closes its connections, so that the others, which wait
for it, end within seconds too.
"""

import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rrhf_fast.stages.launcher import launched
from rrhf_fast.stages.links import watched_links
from rrhf_fast.stages.lock import locked

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# One rank may sample for days while another waits for it; a dead one is noticed without a limit.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's position among the ranks of a run. What they exchange are Python objects, over
    connections without a time limit."""

    rank: int = 0
    size: int = 1
    group: "ProcessGroup | None" = None  # patient; None without a launcher

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, and writes files that exist once per run."""
        return self.rank == 0

    @property
    def bar(self) -> bool | None:
        """The argument `disable` of tqdm: only the first rank has a bar, on a terminal."""
        return None if self.is_first else True

    def gather(self, value: T) -> list[T]:
        """All ranks' values, in rank order, on every rank."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the body fails on any rank, raise the lowest such rank's exception on all ranks."""
        own = None
        try:
            yield
        except Exception as error:
            own = error
        for rank, error in enumerate(self.gather(_portable(own))):
            if error is not None:
                error = own if rank == self.rank else error
                error.on_all_ranks = True
                raise error

    def first(self, function: Callable[[], T]) -> T | None:
        """Call on the first rank, which returns its result; all ranks raise its exception."""
        result = None
        with self.together():
            if self.is_first:
                result = function()
        return result

    def once(self, function: Callable[[], T]) -> T:
        """Call on the first rank; all ranks return its result, or raise its exception."""
        outcome, own = [None, None], None
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                own, outcome[1] = error, _portable(error)
        if self.group is not None:
            import torch.distributed as dist

            dist.broadcast_object_list(outcome, group=self.group)
        if outcome[1] is not None:
            error = own or outcome[1]
            error.on_all_ranks = True
            raise error
        return outcome[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of items that are dealt in turn."""
        return items[self.rank :: self.size]


def _portable(error: Exception | None) -> Exception | None:
    """An exception as it can be sent: one that does not pickle as another of the same kind."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # what its class raises
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        return kind(str(error))
    return error


@contextmanager
def join_ranks(command: str, config: object) -> Iterator[Ranks]:
    """Join the other ranks if a launcher started any. Stages that a stage calls join the same
    ranks; the outermost leaves them at its end, and watches hosts (see `watched_links`).

    Raises:
        ValueError: the launcher's variables make no sense.
        RankLost: another rank ended while this one waited for it.
    """
    rank, size, _, by_launcher = launched()
    if not by_launcher:
        yield Ranks()
        return
    import torch.distributed as dist

    joined_here = not dist.is_initialized()
    if joined_here:
        _join(rank, size)
    ranks = Ranks(rank=rank, size=size, group=_patient_group())
    if not joined_here:
        yield ranks
        return
    with watched_links(command, config, ranks.gather):
        yield ranks
    # Not after an exception: other ranks may be waiting in a collective that this one never joins.
    _groups.clear()
    dist.destroy_process_group()


def local_device() -> "torch.device":
    """The device of this rank. Raises ValueError if there are fewer GPUs than ranks."""
    import torch

    local_rank = launched().local_rank
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1:  # Slurm may show each task its own GPU only
        local_rank = 0
    if local_rank >= torch.cuda.device_count():
        problem = f"expected less than {torch.cuda.device_count()}, the number of GPUs"
        raise ValueError(f"LOCAL_RANK: {problem}, found {local_rank}")
    return torch.device("cuda", local_rank)


_groups: dict["ProcessGroup", "ProcessGroup"] = {}  # the patient one beside the default one
_store = None  # kept: a run that joins again must not meet another at the same address
_joined = itertools.count()


def _join(rank: int, size: int) -> None:
    """Start the process group, and make this rank's device the one that "cuda" means."""
    global _store
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous
    from transformers.utils.logging import disable_progress_bar

    if rank > 0:
        disable_progress_bar()  # of loading a model
    device = local_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if _store is None:
        _store, _, _ = next(rendezvous("env://"))
    # Under a prefix of its own, since addresses of a group that was left stay in the store.
    store = dist.PrefixStore(f"rrhf_fast/{next(_joined)}", _store)
    # The thread that writes checkpoints communicates over gloo.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _patient_group() -> "ProcessGroup":
    import torch.distributed as dist

    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[world]


@contextmanager
def locked_once(ranks: Ranks, folder: str | Path) -> Iterator[None]:
    """Inside, the first rank holds the folder's lock (see `locked`). All ranks must call."""
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(locked(folder)))
        yield
