"""From hidden states to the RRHF loss and its gradient in one sweep, a few queries at a time.

A query's gradient depends on no other query, so it is known as soon as the query's own log-probs
are. For as many queries as the workspace holds, the logits are made once, turned into log-probs,
loss and the gradient of the logits, and used up: three matrix products. `linear_logprob` followed
by `rrhf_loss` needs four, because its backward makes the logits again. The gradient exists when the
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
from rrhf_fast.losses.rrhf import RRHFLoss, assemble, check_layout, loss_scales, rrhf_loss

# MiB. With too few, d_weight [V, H] is read and written again for each few queries; 8,192 edges of
# 128,256 tokens take 2,004 in 16 bits.
MAX_WORKSPACE_MB, MIN_WORKSPACE_MB = 2048, 128


def workspace_for(memory: int) -> int:
    """MiB of workspace for a GPU of so many bytes: a sixteenth of it, 128 to 2,048."""
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
    margin: float = 0.0,
    padded_widths: Tensor | None = None,
    bounds: Sequence[tuple[int, int, int]] | None = None,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> RRHFLoss:
    """`rrhf_loss(linear_logprob(hidden, ...), ...)` for less work where a gradient is wanted.

    Only `loss` of the result carries a gradient, in hidden, weight and bias, and it can be taken
    once. Waits for the device once a few queries, because the matrix products need to know how many
    edges have a gradient, and once more without `bounds`.

    Args:
        hidden [N, H], weight [V, H], rows [E], targets [E], bias, softcap, logit_scale, backend:
            as for `linear_logprob`.
        rewards [S], path_edges [R], path_offsets [S+1], group_offsets [G+1], and the options of
            the loss: as for `rrhf_loss`. The edges of a query are one span, in the order of the
            queries, as in `PackedForest`.
        bounds: G+1 triples of ints as in `PackedForest`: the edges, responses and path tokens
            before each query, and in all. Read from the device where they are left out.
        workspace_mb: MiB for the logits of a few queries; default 512 for the kernels, 128 for
            torch. A query that needs more by itself is walked in slices of the vocabulary, at the
            price of the fourth product.

    Returns:
        `RRHFLoss` (arXiv 2304.05302, eq. 1-4), in float32, or float64 for float64 input.

    Raises:
        ValueError: an argument that does not fit; names it, what was found and what was expected.
    """
    check_shapes(hidden, weight, rows, targets, bias)
    backend = choose_backend(backend, hidden)
    tensors = (hidden, weight, bias)
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if not any(wants):
        logps = linear_logprob(
            hidden, weight, rows, targets, bias=bias, softcap=softcap, logit_scale=logit_scale,
            backend=backend, workspace_mb=workspace_mb,
        )  # fmt: skip
        return rrhf_loss(
            logps, rewards, path_edges=path_edges, path_offsets=path_offsets,
            group_offsets=group_offsets, length_penalty=length_penalty, rank_weight=rank_weight,
            sft_weight=sft_weight, sft_reduction=sft_reduction, margin=margin,
            padded_widths=padded_widths, backend=backend,
        )  # fmt: skip
    check_layout(len(rows), rewards, path_edges, path_offsets, group_offsets)
    if bounds is not None:
        check_bounds(bounds, len(rows), path_edges, path_offsets, group_offsets)
        bounds = list(chain.from_iterable(bounds))
    scales, sft_scales = loss_scales(
        path_offsets,
        group_offsets,
        length_penalty=length_penalty,
        sft_reduction=sft_reduction,
        padded_widths=padded_widths,
        dtype=torch.promote_types(hidden.dtype, torch.float32),
    )
    if workspace_mb is None:
        workspace_mb = 512 if backend == "triton" else 128
    loss, *parts = _LinearRRHF.apply(
        *tensors, rows, targets, rewards, path_edges, path_offsets, group_offsets, bounds,
        scales, sft_scales, softcap, logit_scale, float(margin), float(rank_weight),
        float(sft_weight), backend, float(workspace_mb), *wants,
    )  # fmt: skip
    return RRHFLoss(loss, *parts)


class _LinearRRHF(torch.autograd.Function):
    @staticmethod
    # Products have the dtype that they are given, also where the decoder runs under autocast.
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, *arguments):
        *outputs, d_hidden, d_weight, d_bias = linear_rrhf_op(*arguments)
        found = zip((d_hidden, d_weight, d_bias), arguments[-3:], strict=True)
        # Not saved by autograd, so that the backward may scale them in place: a second [V, H] would
        # be the largest tensor here.
        ctx.gradients = [gradient if wanted else None for gradient, wanted in found]
        ctx.num_inputs, ctx.backend = len(arguments), arguments[-5]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_rrhf_loss: its gradient can be taken only once")
        for gradient in gradients:
            if gradient is not None:
                scale_op(gradient, d_loss, ctx.backend)
        return *gradients, *[None] * (ctx.num_inputs - 3)


@torch.library.custom_op("rrhf_fast::scale", mutates_args=("gradient",))
def scale_op(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """gradient *= factor, in place. A factor of 1, which the trainer's is, saves a pass over the
    head's gradient: on CUDA the kernel sees it, since the host would have to wait."""
    if backend == "triton":
        # Imported late: triton exists on Linux only.
        from rrhf_fast.kernels.scale import scale

        scale(gradient, factor)
    elif factor.device.type != "cpu" or factor != 1:
        gradient.mul_(factor)


@torch.library.custom_op("rrhf_fast::linear_rrhf", mutates_args=())
def linear_rrhf_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    rewards: Tensor,
    path_edges: Tensor,
    path_offsets: Tensor,
    group_offsets: Tensor,
    bounds: list[int] | None,
    scales: Tensor,
    sft_scales: Tensor,
    softcap: float | None,
    logit_scale: float,
    margin: float,
    rank_weight: float,
    sft_weight: float,
    backend: str,
    workspace_mb: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `RRHFLoss`, and d_hidden, d_weight, d_bias; a gradient that is not wanted is
    empty."""
    kept_logits, logprob, ranking = _modules(backend)
    # The kernels count on rows that lie end to end.
    rows, targets, rewards = rows.contiguous(), targets.contiguous(), rewards.contiguous()
    bias = None if bias is None else bias.contiguous()
    dtype = scales.dtype if backend == "torch" else hidden.dtype
    states = hidden.index_select(0, rows).to(dtype)
    matrix = weight.to(dtype).contiguous()
    # Sums over many edges: at least float32.
    d_states = torch.zeros_like(states, dtype=scales.dtype) if wants_hidden else None
    d_weight = MatrixSum(weight.shape, scales.dtype, weight.device) if wants_weight else None
    d_bias = torch.zeros_like(bias, dtype=scales.dtype) if wants_bias else None

    head_arguments = (matrix, bias, softcap, logit_scale, workspace_mb)
    kept = kept_logits.KeptLogits(*head_arguments, len(rows))
    sliced = _SlicedLogits(logprob, *head_arguments)
    if bounds is None:
        bounds = read_bounds(path_edges, path_offsets, group_offsets, len(rows))
    else:
        bounds = list(zip(bounds[::3], bounds[1::3], bounds[2::3], strict=True))
    num_queries = len(bounds) - 1
    d_rank = scales.new_full((num_queries,), rank_weight / num_queries)
    d_sft = scales.new_full((num_queries,), sft_weight / num_queries)
    parts = []
    for first, last in _spans([edge for edge, _, _ in bounds], kept.capacity):
        edges, responses, tokens = map(slice, bounds[first], bounds[last])
        layout = (
            path_edges[tokens] - edges.start,
            path_offsets[responses.start : responses.stop + 1] - tokens.start,
            group_offsets[first : last + 1] - responses.start,
            scales[responses],
            sft_scales[responses],
        )
        num_edges = edges.stop - edges.start
        head = kept if num_edges <= kept.capacity else sliced
        logp = head.forward(states[edges], targets[edges])
        parts.append(ranking.forward(logp, rewards[responses], *layout, margin))
        counts, best = parts[-1][3:5]
        upstream = d_rank[first:last], d_sft[first:last]
        d_logp = ranking.backward(num_edges, *upstream, *layout, counts, best)
        wanted = d_states[edges] if wants_hidden else None
        head.add_gradients(d_logp, wanted, d_weight, d_bias)
    joined = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    out = assemble(joined, rank_weight, sft_weight)
    d_hidden = None
    if wants_hidden:
        # index_put_ sorts where index_add_ would use atomics: repeated rows sum in a fixed order.
        total = torch.zeros_like(hidden, dtype=d_states.dtype)
        d_hidden = total.index_put_((rows,), d_states, accumulate=True)
    d_weight = d_weight.value() if wants_weight else None
    found = ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
    gradients = (
        scales.new_empty(0) if total is None else total.to(like.dtype) for total, like in found
    )
    return *vars(out).values(), *gradients


@linear_rrhf_op.register_fake
def _(
    hidden, weight, bias, rows, targets, rewards, path_edges, path_offsets, group_offsets, bounds,
    scales, sft_scales, softcap, logit_scale, margin, rank_weight, sft_weight, backend,
    workspace_mb, wants_hidden, wants_weight, wants_bias,
):  # fmt: skip
    group = scales.new_empty(group_offsets.shape[0] - 1)
    count = torch.empty_like(group, dtype=torch.int64)
    return (
        scales.new_empty(()), group, torch.empty_like(group), torch.empty_like(scales),
        count, torch.empty_like(count), torch.empty_like(group),
        *(
            like if wanted else scales.new_empty(0)
            for like, wanted in (
                (torch.empty_like(hidden), wants_hidden),
                (weight.new_empty(weight.shape), wants_weight),
                (None if bias is None else torch.empty_like(bias), wants_bias),
            )
        ),
    )  # fmt: skip


class _SlicedLogits:
    """For a query that is larger than the workspace: nothing is kept, and the logits are made a
    second time. Does what `KeptLogits` does."""

    def __init__(self, logprob: ModuleType, weight: Tensor, bias: Tensor | None, *options):
        self.logprob, self.weight, self.bias, self.options = logprob, weight, bias, options

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        rows = torch.arange(len(states), device=states.device)
        self.inputs = (states, self.weight, self.bias, rows, targets)
        logp, self.lse = self.logprob.forward(*self.inputs, *self.options)
        return logp

    def add_gradients(
        self,
        grad: Tensor,
        d_states: Tensor | None,
        d_weight: MatrixSum | None,
        d_bias: Tensor | None,
    ) -> None:
        wants = [total is not None for total in (d_states, d_weight, d_bias)]
        found = self.logprob.backward(grad, self.lse, *self.inputs, *self.options, *wants)
        if d_states is not None:
            d_states += found[0]
        if d_weight is not None:
            d_weight.add(found[1])
        if d_bias is not None:
            d_bias += found[2]


def _modules(backend: str) -> tuple[ModuleType, ModuleType, ModuleType]:
    if backend == "torch":
        return kept_logits_torch, linear_logprob_torch, rrhf_torch
    # Imported late: triton exists on Linux only.
    from rrhf_fast.kernels import ranking
    from rrhf_fast.losses import kept_logits_triton, linear_logprob_triton

    return kept_logits_triton, linear_logprob_triton, ranking


def check_bounds(
    bounds: Sequence[tuple[int, int, int]],
    num_edges: int,
    path_edges: Tensor,
    path_offsets: Tensor,
    group_offsets: Tensor,
) -> None:
    """Raise ValueError for bounds that begin or end elsewhere than the pack and, on the CPU, for
    those of other queries."""
    first, last = (0, 0, 0), (num_edges, len(path_offsets) - 1, len(path_edges))
    ends = (tuple(bounds[0]), tuple(bounds[-1])) if bounds else ()
    if len(bounds) != len(group_offsets) or ends != (first, last):
        expected = f"expected {len(group_offsets)} triples from {first} to {last}"
        raise ValueError(f"bounds: {expected}, found {len(bounds)}: {str(bounds)[:100]}")
    # A compiled graph cannot branch on values, and on CUDA it would wait for the device.
    if path_edges.device.type == "cpu" and not torch.compiler.is_compiling():
        found = read_bounds(path_edges, path_offsets, group_offsets, num_edges)
        for query, (given, here) in enumerate(zip(bounds, found, strict=True)):
            if tuple(given) != here:
                raise ValueError(f"bounds[{query}]: expected {here}, found {given}")


def read_bounds(
    path_edges: Tensor, path_offsets: Tensor, group_offsets: Tensor, num_edges: int
) -> list[tuple[int, int, int]]:
    """Where each query's edges, responses and path tokens begin, and where the last one's end."""
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
    """Queries [first, last) whose edges fit `capacity`, or one query that alone does not."""
    first = 0
    for query, (_, end) in enumerate(pairwise(first_edges)):
        if end - first_edges[first] > capacity and query > first:
            yield first, query
            first = query
    yield first, len(first_edges) - 1
