"""Loss and gradient of one optimizer step's packs, in one of two ways with the same result.

Whole: forward and backward of every pack. Active: score every pack without gradients, then forward
and backward of what has a gradient (`rrhf_fast.data.active`), packed anew. In forwards of a pack,
with `kept` the share of its tokens that have a gradient and `whole` 3, or 4 where checkpointing
runs each layer once more:

    whole against 1 + whole * kept
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rrhf_fast.data.active import active_part, join, without_weight
from rrhf_fast.data.forest import Pack, PackedForest
from rrhf_fast.data.packs import Batch
from rrhf_fast.losses import RRHFLoss, rrhf_loss
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World, prepare_backward
from rrhf_fast.train.evaluate import Totals

# The active way has to promise at least this much less work, since its second packs are smaller.
MARGIN = 0.1


class OutOfMemory(RuntimeError):
    """A pack does not fit the device; says how large it is and what to lower."""


def is_worthwhile(config: TrainConfig, kept: float) -> bool:
    """Whether a step of which this share of tokens has a gradient takes the active way."""
    if config.active_set != "auto":
        return config.active_set == "on"
    whole = 4 if config.activation_checkpointing == "full" else 3
    return config.packing == "forest" and 1 + whole * kept < (1 - MARGIN) * whole


def backward_whole(
    model: RRHFModel, batch: Batch, config: TrainConfig, world: World, totals: Totals
) -> None:
    """Add up the gradient of the mean loss of `batch`, and its sums in `totals`."""
    for number, pack in enumerate(batch.packs, 1):
        prepare_backward(model, config, is_last=number == len(batch.packs))
        with _clear_memory_error(model, config, pack):
            pack = pack.to(model.device)
            # As part of the loss, the share costs no pass over the head's gradient.
            share = _share(pack, batch, world)
            out = model(pack, share=share)
            out.loss.backward()
        totals.add(out, pack, share)
        if isinstance(pack, PackedForest):
            totals.add_active(pack, _has_gradient(out, pack, model, share))


def backward_active(
    model: RRHFModel, batch: Batch, config: TrainConfig, world: World, totals: Totals
) -> None:
    """As `backward_whole`, by way of the active part."""
    parts = []
    for pack in batch.packs:
        with _clear_memory_error(model, config, pack):
            pack = pack.to(model.device)
            share = _share(pack, batch, world)
            out, weights = model(pack, share=share, wants_weights=True)
        totals.add(out, pack, share)
        parts.append(active_part(pack, weights))
        totals.add_active(pack, weights != 0)
    options = {"pad_to_multiple_of": model.pad_to_multiple_of, "plan": model.plan}
    packs = join(parts, max_tokens=config.max_tokens_per_pack, **options)
    # Every rank gathers weights as often as the others, and some gradient there must be.
    count = max(1, *world.gather(len(packs)))
    filler = join([without_weight(pack)], max_tokens=1, **options)
    packs += filler * (count - len(packs))
    for number, part in enumerate(packs, 1):
        prepare_backward(model, config, is_last=number == count)
        with _clear_memory_error(model, config, part):
            model(part).backward()


def _share(pack: Pack, batch: Batch, world: World) -> float:
    """The weight of a pack's loss in the mean over the step's queries, however they are packed and
    dealt to ranks: FSDP takes the mean over ranks."""
    return pack.num_queries / batch.num_queries * world.size


@torch.no_grad()
def _has_gradient(
    out: RRHFLoss, pack: PackedForest, model: RRHFModel, share: float
) -> torch.Tensor:
    """[E] bool, the edges of responses with a gradient, which follow from the scores and the pack's
    share alone."""
    one_each = torch.arange(len(out.scores) + 1, device=out.scores.device)
    options = model.loss_options(pack, share) | {
        "path_edges": one_each[:-1], "path_offsets": one_each, "length_penalty": 0.0,
        "sft_reduction": "sum", "padded_widths": None,
    }  # fmt: skip
    with torch.enable_grad():
        scores = out.scores.detach().requires_grad_()
        loss = rrhf_loss(scores, pack.rewards, **options).loss
        slopes = torch.autograd.grad(loss, scores)[0]
    along_paths = torch.repeat_interleave(
        (slopes != 0).long(), pack.path_offsets.diff(), output_size=len(pack.path_edges)
    )
    counts = torch.zeros_like(pack.edge_rows).index_add_(0, pack.path_edges, along_paths)
    return counts > 0


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
