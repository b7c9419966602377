"""From hidden states to the RRHF loss and its gradient in one sweep, a few queries at a time.

A query's gradient depends on no other query, so it follows from the query's own log-probs. For as
many queries as the workspace holds, the sweep computes the logits once and turns them into
log-probs, loss and the gradient of the logits: three matrix products. `linear_logprob` followed by
`rrhf_loss` needs four, because its backward recomputes the logits. The gradient exists when the
forward ends; the backward only scales it.

Legend: N tokens, E edges, H hidden size, V vocabulary, S responses, G queries.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rrhf_fast.losses import kept_logits_torch, linear_logprob_torch, rrhf_torch
from rrhf_fast.losses.linear_logprob import check_shapes, choose_backend, linear_logprob
from rrhf_fast.losses.matrix_sum import MatrixSum
from rrhf_fast.losses.parts import (
    GradientSums,
    Layout,
    LinearHead,
    PairLoss,
    Ranking,
    Scales,
    Wants,
)
from rrhf_fast.losses.rrhf import (
    RRHFLoss,
    assemble,
    check_layout,
    check_pair_loss,
    loss_scales,
    rank,
)
from rrhf_fast.spans import span

# MiB. A small workspace reads and writes d_weight [V, H] once per few queries; 8,192 edges of
# 128,256 tokens take 2,004 in 16 bits.
MAX_WORKSPACE_MB, MIN_WORKSPACE_MB = 2048, 128


def workspace_for(memory: int) -> int:
    """MiB of workspace for a GPU with `memory` bytes: a sixteenth, within 128 to 2,048."""
    return max(MIN_WORKSPACE_MB, min(memory // 16 // 2**20, MAX_WORKSPACE_MB))


def linear_rrhf_loss(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    rewards: Tensor,
    *,
    path_edges: Tensor,
    path_offsets: Tensor,
    group_offsets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    length_penalty: float = 1.0,
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
    sft_reduction: str = "sum",
    pair_loss: str = "hinge",
    margin: float = 0.0,
    beta: float = 1.0,
    rank_reduction: str = "sum",
    reference_logps: Tensor | None = None,
    padded_widths: Tensor | None = None,
    bounds: Sequence[tuple[int, int, int]] | None = None,
    weight_grad: Tensor | None = None,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> RRHFLoss:
    """`rrhf_loss(linear_logprob(hidden, ...), ...)`, with less work where a gradient is wanted.

    Only `loss` of the result carries a gradient, in hidden, weight and bias, and it can be taken
    once. Waits for the device once per few queries, because the matrix products need to know how
    many edges have a gradient, and once more without `bounds`.

    Args:
        hidden [N, H], weight [V, H], rows [E], targets [E], bias, softcap, logit_scale, backend:
            as for `linear_logprob`.
        rewards [S], path_edges [R], path_offsets [S+1], group_offsets [G+1], and the options of
            the loss: as for `rrhf_loss`. The edges of a query are one span, in the order of the
            queries, as in `PackedForest`.
        bounds: G+1 triples of ints as in `PackedForest`: the edges, responses and path tokens
            before each query, and in all. Read from the device if left out.
        weight_grad: [V, H] float32 (float64 for float64 input), to which the gradient of weight is
            added now, instead of being made apart and given to autograd: one [V, H] less. The
            backward must then be that of `loss` itself, `loss.backward()`, or it raises
            RuntimeError.
        workspace_mb: MiB for the logits of a few queries; default 512 for the kernels, 128 for
            torch. A single query that needs more is walked in slices of the vocabulary, which
            costs the fourth product.

    Returns:
        `RRHFLoss` (arXiv 2304.05302, eq. 1-4), in float32, or float64 for float64 input.

    Raises:
        ValueError: an argument that does not fit; names it, what it is and what was expected.
    """
    check_shapes(hidden, weight, rows, targets, bias)
    layout = Layout(path_edges, path_offsets, group_offsets)
    check_layout(len(rows), rewards, layout)
    pairs = check_pair_loss(pair_loss, beta, margin, rank_reduction)
    backend = choose_backend(backend, hidden)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scales = loss_scales(
        layout, length_penalty, sft_reduction, padded_widths, reference_logps, dtype
    )
    if weight_grad is not None and (weight_grad.shape, weight_grad.dtype) != (weight.shape, dtype):
        found = f"{list(weight_grad.shape)} {weight_grad.dtype}"
        raise ValueError(f"weight_grad: expected {list(weight.shape)} {dtype}, found {found}")
    tensors = (hidden, weight, bias)
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if not any(wants):
        logps = linear_logprob(
            hidden, weight, rows, targets, bias=bias, softcap=softcap, logit_scale=logit_scale,
            backend=backend, workspace_mb=workspace_mb,
        )  # fmt: skip
        ranking = rank(logps, rewards, layout, scales, pairs, backend)
        return assemble(ranking, layout, rank_weight, sft_weight, rank_reduction)
    if bounds is not None:
        check_bounds(bounds, len(rows), layout)
        bounds = list(chain.from_iterable(bounds))
    if workspace_mb is None:
        workspace_mb = 512 if backend == "triton" else 128
    loss, *ranking = _LinearRRHF.apply(
        *tensors, weight_grad, rows, targets, rewards, *layout, bounds, *scales, softcap,
        logit_scale, *pairs, rank_reduction, float(rank_weight), float(sft_weight), backend,
        float(workspace_mb), *wants,
    )  # fmt: skip
    return RRHFLoss(loss, *ranking)


class _LinearRRHF(torch.autograd.Function):
    @staticmethod
    # Products keep the dtype of their operands where the decoder runs under autocast.
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, *arguments):
        *outputs, d_hidden, d_weight, d_bias = linear_rrhf_op(*arguments)
        gradients = zip((d_hidden, d_weight, d_bias), arguments[-3:], strict=True)
        # Not saved by autograd, so that the backward may scale them in place: a second [V, H] would
        # be the largest tensor here.
        ctx.gradients = [gradient if wanted else None for gradient, wanted in gradients]
        ctx.is_added = arguments[3] is not None
        if ctx.is_added:
            ctx.gradients[1] = None
        ctx.num_inputs, ctx.backend = len(arguments), arguments[-5]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_rrhf_loss: its gradient can be taken only once")
        if ctx.is_added:  # unscaled, so no factor is left to apply
            _check_is_one(d_loss)
        for gradient in gradients:
            if gradient is not None:
                scale_op(gradient, d_loss, ctx.backend)
        return *gradients, *[None] * (ctx.num_inputs - 3)


def _check_is_one(factor: Tensor) -> None:
    """Raise RuntimeError for another factor; on CUDA without a wait, as a failed assertion."""
    problem = "linear_rrhf_loss: with weight_grad call backward() of its loss itself"
    if factor.device.type != "cpu":
        torch._assert_async(factor == 1, problem)
    elif factor != 1:
        raise RuntimeError(f"{problem}, found its gradient to be {factor.item():g}")


@torch.library.custom_op("rrhf_fast::scale", mutates_args=("gradient",))
def scale_op(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """gradient *= factor, in place. The trainer's factor is 1, which saves a pass over the head's
    gradient; on CUDA the kernel tests for it, since the host would have to wait."""
    if backend == "triton":
        # Imported late: triton exists on Linux only.
        from rrhf_fast.kernels.scale import scale

        scale(gradient, factor)
    elif factor.device.type != "cpu" or factor != 1:
        gradient.mul_(factor)


@torch.library.custom_op("rrhf_fast::linear_rrhf", mutates_args=("weight_grad",))
def linear_rrhf_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None, rows: Tensor,
    targets: Tensor, rewards: Tensor, path_edges: Tensor, path_offsets: Tensor,
    group_offsets: Tensor, bounds: list[int] | None, score_scales: Tensor, sft_scales: Tensor,
    reference: Tensor, softcap: float | None, logit_scale: float, pair_loss: str, beta: float,
    margin: float, rank_reduction: str, rank_weight: float, sft_weight: float, backend: str,
    workspace_mb: float, wants_hidden: bool, wants_weight: bool, wants_bias: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """The fields of `RRHFLoss`, and d_hidden, d_weight, d_bias; an unwanted gradient is empty, and
    so is one that is added to `weight_grad`. Flat because an operator's schema takes tensors and
    numbers only."""
    layout = Layout(path_edges, path_offsets, group_offsets)
    scales = Scales(score_scales, sft_scales, reference)
    pairs = PairLoss(pair_loss, beta, margin)
    # The kernels expect contiguous rows.
    rows, targets, rewards = rows.contiguous(), targets.contiguous(), rewards.contiguous()
    states = hidden.index_select(0, rows)
    own_bias = None if bias is None else bias.contiguous()
    # Products of 16 bits give results of 16 bits on a CPU: too few for logits.
    dtype = scales.score.dtype if backend == "torch" else hidden.dtype
    head = LinearHead(weight.to(dtype).contiguous(), own_bias, softcap, logit_scale)
    if bounds is None:
        bounds = read_bounds(layout, len(rows))
    else:
        bounds = list(zip(bounds[::3], bounds[1::3], bounds[2::3], strict=True))
    num_queries = len(bounds) - 1
    d_rank = scales.score.new_full((num_queries,), rank_weight / num_queries)
    d_sft = scales.score.new_full((num_queries,), sft_weight / num_queries)
    wide = scales.score.dtype  # of sums over many edges: at least float32
    sums = GradientSums(
        torch.zeros_like(states, dtype=wide) if wants_hidden else None,
        MatrixSum(weight.shape, wide, weight.device, weight_grad) if wants_weight else None,
        torch.zeros_like(own_bias, dtype=wide) if wants_bias else None,
    )
    kept_logits, logprob, ranking = _modules(backend)
    kept = kept_logits.KeptLogits(head, workspace_mb, len(rows))
    sliced = _SlicedLogits(logprob, head, workspace_mb)
    parts = []
    for first, last in _spans([edge for edge, _, _ in bounds], kept.capacity):
        edges, responses, *piece = _piece(layout, scales, bounds, first, last)
        num_edges = edges.stop - edges.start
        logits = kept if num_edges <= kept.capacity else sliced
        logp = logits.forward(states[edges], targets[edges])
        with span("loss"):
            part = Ranking(*ranking.forward(logp, rewards[responses], *piece, pairs))
            d_ranks = d_rank[first:last]
            if rank_reduction == "mean":
                d_ranks = d_ranks / part.num_pairs.clamp(min=1)
            upstream = d_ranks, d_sft[first:last]
            d_logp = ranking.backward(num_edges, *upstream, *piece, part.slopes, part.best)
            parts.append(part._replace(best=part.best + responses.start))
        own_states = sums.states[edges] if wants_hidden else None
        logits.add_gradients(d_logp, sums._replace(states=own_states))
    whole = Ranking(*(torch.cat(part) for part in zip(*parts, strict=True)))
    out = assemble(whole, layout, rank_weight, sft_weight, rank_reduction)
    d_hidden = None
    if wants_hidden:
        # index_put_ sorts where index_add_ would use atomics: repeated rows sum in a fixed order.
        total = torch.zeros_like(hidden, dtype=wide)
        d_hidden = total.index_put_((rows,), sums.states, accumulate=True)
    d_weight = sums.weight.value() if wants_weight and weight_grad is None else None
    gradients = (
        scales.score.new_empty(0) if total is None else total.to(like.dtype)
        for total, like in ((d_hidden, hidden), (d_weight, weight), (sums.bias, bias))
    )
    return *vars(out).values(), *gradients


@linear_rrhf_op.register_fake
def _(hidden, weight, bias, weight_grad, rows, targets, rewards, *rest):
    _, _, group_offsets, _, scores, *_, wants_hidden, wants_weight, wants_bias = rest
    ranking = Ranking.empty(scores, group_offsets.shape[0] - 1)
    gradients = (
        torch.empty_like(hidden) if wants_hidden else scores.new_empty(0),
        weight.new_empty(weight.shape)
        if wants_weight and weight_grad is None
        else scores.new_empty(0),
        torch.empty_like(bias) if wants_bias else scores.new_empty(0),
    )
    return scores.new_empty(()), *ranking, *gradients


def _piece(
    layout: Layout, scales: Scales, bounds: Sequence[tuple[int, int, int]], first: int, last: int
) -> tuple[slice, slice, Layout, Scales]:
    """Edges and responses of queries [first, last), and their layout and scales, counted from
    there."""
    edges, responses, tokens = map(slice, bounds[first], bounds[last])
    own_layout = Layout(
        path_edges=layout.path_edges[tokens] - edges.start,
        path_offsets=layout.path_offsets[responses.start : responses.stop + 1] - tokens.start,
        group_offsets=layout.group_offsets[first : last + 1] - responses.start,
    )
    own_scales = Scales(*(of_responses[responses] for of_responses in scales))
    return edges, responses, own_layout, own_scales


class _SlicedLogits:
    """Stands in for `KeptLogits` if a query is larger than the workspace: it keeps nothing and
    computes the logits a second time."""

    def __init__(self, logprob: ModuleType, head: LinearHead, workspace_mb: float):
        self.logprob, self.head, self.workspace_mb = logprob, head, workspace_mb

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        rows = torch.arange(len(states), device=states.device)
        self.inputs = (states, self.head, rows, targets, self.workspace_mb)
        logp, self.lse = self.logprob.forward(*self.inputs)
        return logp

    def add_gradients(self, grad: Tensor, sums: GradientSums) -> None:
        wants = Wants(*(total is not None for total in sums))
        gradients = self.logprob.backward(grad, self.lse, *self.inputs, wants)
        if sums.states is not None:
            sums.states.add_(gradients[0])
        if sums.weight is not None:
            sums.weight.add(gradients[1])
        if sums.bias is not None:
            sums.bias.add_(gradients[2])


def _modules(backend: str) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The backend's kept logits, log-probs and ranking."""
    if backend == "torch":
        return kept_logits_torch, linear_logprob_torch, rrhf_torch
    # Imported late: triton exists on Linux only.
    from rrhf_fast.kernels import ranking
    from rrhf_fast.losses import kept_logits_triton, linear_logprob_triton

    return kept_logits_triton, linear_logprob_triton, ranking


def check_bounds(bounds: Sequence[tuple[int, int, int]], num_edges: int, layout: Layout) -> None:
    """Raise ValueError for bounds that begin or end elsewhere than the pack and, on the CPU, for
    those of other queries."""
    path_edges, path_offsets, group_offsets = layout
    first, last = (0, 0, 0), (num_edges, len(path_offsets) - 1, len(path_edges))
    ends = (tuple(bounds[0]), tuple(bounds[-1])) if bounds else ()
    if len(bounds) != len(group_offsets) or ends != (first, last):
        expected = f"expected {len(group_offsets)} triples from {first} to {last}"
        raise ValueError(f"bounds: {expected}, found {len(bounds)}: {str(bounds)[:100]}")
    # A compiled graph cannot branch on values, and on CUDA the check would wait for the device.
    if path_edges.device.type == "cpu" and not torch.compiler.is_compiling():
        expected = read_bounds(layout, num_edges)
        for query, (given, own) in enumerate(zip(bounds, expected, strict=True)):
            if tuple(given) != own:
                raise ValueError(f"bounds[{query}]: expected {own}, found {given}")


def read_bounds(layout: Layout, num_edges: int) -> list[tuple[int, int, int]]:
    """Where each query's edges, responses and path tokens begin, and where the last one's end."""
    path_edges, path_offsets, group_offsets = layout
    token_offsets = path_offsets[group_offsets]
    lengths = token_offsets.diff()
    lowest, highest = (
        torch.segment_reduce(path_edges.double(), kind, lengths=lengths).long()
        for kind in ("min", "max")
    )
    table = torch.stack([lowest, highest, group_offsets[:-1], token_offsets[:-1]]).tolist()
    ends = [0, *(highest + 1 for highest in table[1])]
    if table[0] != ends[:-1] or ends[-1] != num_edges:
        expected = "expected each query's edges to be one span, in the order of the queries"
        raise ValueError(f"path_edges: {expected}, found spans that start at {table[0][:8]}")
    responses, tokens = [*table[2], len(path_offsets) - 1], [*table[3], len(path_edges)]
    return list(zip(ends, responses, tokens, strict=True))


def _spans(first_edges: Sequence[int], capacity: int) -> Iterator[tuple[int, int]]:
    """Queries [first, last) whose edges fit `capacity`, or a single query that does not."""
    first = 0
    for query, (_, end) in enumerate(pairwise(first_edges)):
        if end - first_edges[first] > capacity and query > first:
            yield first, query
            first = query
    yield first, len(first_edges) - 1
