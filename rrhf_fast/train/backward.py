"""Loss and gradient of one optimizer step's packs, in one of two ways with the same result.

Whole: forward and backward of every pack. Active: score every pack without gradients, then forward
and backward of the part that has a gradient (`rrhf_fast.data.active`), in new packs. Cost in
forwards of a pack, with `kept` the share of its tokens that have a gradient and `again` 1 where
checkpointing runs each layer once more, else 0:

    whole     1 + again + 2 * (1 - skipping * (1 - kept))
    active    1 + (3 + again) * kept

`skipping` is the share of products in whose backward layers leave out the other tokens by
themselves (`rrhf_fast.model.active_rows`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rrhf_fast.data.active import active_part, join, without_weight
from rrhf_fast.data.forest import Pack, PackedForest
from rrhf_fast.data.packs import Batch
from rrhf_fast.losses import RRHFLoss
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.spans import span
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World, prepare_backward
from rrhf_fast.train.evaluate import Totals

# The active way must save at least this share of the work, since its second packs are smaller.
MIN_SAVING = 0.1


class OutOfMemory(RuntimeError):
    """A pack does not fit the device; states its size and which option to lower."""


def is_worthwhile(config: TrainConfig, kept: float, skipping: float) -> bool:
    """Whether a step takes the active way when a share `kept` of its tokens has a gradient."""
    if config.active_set != "auto":
        return config.active_set == "on"
    if config.pair_loss != "hinge":  # every response has a gradient
        return False
    again = config.activation_checkpointing == "full"
    whole = 1 + again + 2 * (1 - skipping * (1 - kept))
    return config.packing == "forest" and 1 + (3 + again) * kept < (1 - MIN_SAVING) * whole


def backward_whole(
    model: RRHFModel, batch: Batch, config: TrainConfig, world: World, totals: Totals
) -> None:
    """Add the gradient of the mean loss of `batch` to the weights' `grad`, and its sums to
    `totals`."""
    for number, pack in enumerate(batch.packs, 1):
        prepare_backward(model, config, is_last=number == len(batch.packs))
        with _clear_memory_error(model, config, pack):
            with span("data"):
                pack = pack.to(model.device)
            # As part of the loss, the share costs no pass over the head's gradient.
            share = _share(pack, batch, world)
            out = model(pack, share=share, into_grad=True)
            out.loss.backward()
        with span("loss"):
            totals.add(out, pack, share)
            if isinstance(pack, PackedForest):
                is_active = active_edges(out, pack, model.loss_config)
                totals.add_active(pack, is_active)
                totals.add_flops(pack, model.costs.of_pack(pack, is_active.sum()))


def backward_active(
    model: RRHFModel, batch: Batch, config: TrainConfig, world: World, totals: Totals
) -> None:
    """As `backward_whole`, by way of the active part."""
    parts = []
    for pack in batch.packs:
        with _clear_memory_error(model, config, pack):
            with span("data"):
                pack = pack.to(model.device)
            share = _share(pack, batch, world)
            out, weights = model.edge_weights(pack, share=share)
        with span("data"):
            part = active_part(pack, weights)
        parts.append(part)
        with span("loss"):
            totals.add(out, pack, share)
            totals.add_active(pack, weights != 0)
            totals.add_flops(pack, model.costs.of_pack(pack, 0, has_backward=False))
            totals.add_flops(pack, model.costs.of_pack(part, len(part.edge_rows)))
    options = {"pad_to_multiple_of": model.pad_to_multiple_of, "plan": model.plan}
    # Every rank gathers weights as often as the others, and each needs at least one backward.
    with span("data"):
        packs = join(parts, max_tokens=config.max_tokens_per_pack, **options)
        count = max(1, *world.gather(len(packs)))
        filler = join([without_weight(pack)], max_tokens=1, **options)
    packs += filler * (count - len(packs))
    for number, part in enumerate(packs, 1):
        prepare_backward(model, config, is_last=number == count)
        with _clear_memory_error(model, config, part):
            model.weighted_loss(part).backward()


def active_edges(out: RRHFLoss, pack: Pack, config: LossConfig) -> torch.Tensor:
    """[E] bool, the edges of responses with a gradient: those whose rank loss has a slope, and the
    best ones."""
    has_gradient = (out.slopes != 0) & (config.rank_weight != 0)
    if config.sft_weight != 0:
        has_gradient.index_fill_(0, out.best, True)
    along_paths = torch.repeat_interleave(
        has_gradient.long(), pack.path_offsets.diff(), output_size=len(pack.path_edges)
    )
    counts = torch.zeros_like(pack.edge_rows).index_add_(0, pack.path_edges, along_paths)
    return counts > 0


def _share(pack: Pack, batch: Batch, world: World) -> float:
    """The weight of a pack's loss in the mean over the step's queries, however they are packed and
    dealt to ranks: FSDP takes the mean over ranks."""
    return pack.num_queries / batch.num_queries * world.size


@contextmanager
def _clear_memory_error(model: RRHFModel, config: TrainConfig, pack) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = f"a pack of {pack.num_tokens:,} tokens"
        if isinstance(pack, Pack):
            size += f" ({pack.num_queries} queries)"
        advice = "--max_tokens_per_pack"
        if pack.num_tokens > config.max_tokens_per_pack:
            advice = "--max_length (a single query is larger than max_tokens_per_pack)"
        others = "--activation_checkpointing full, or shard over more processes"
        raise OutOfMemory(
            f"out of memory on {model.device}: {size} does not fit; lower {advice}, or use {others}"
        ) from error
