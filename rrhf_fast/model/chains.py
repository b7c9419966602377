"""Chains: cut a forest into pieces that ordinary causal attention can compute.

A forest in depth-first order splits into *chains*, one per leaf: runs of tokens in which each is
the child of the one before. A tree's first chain is its trunk and first response; each further
chain holds the tokens that a response adds. A chain's queries are its own tokens, its keys the
whole path from the root, so attention is causal, aligned at the end:

    keys     r r r r a a a      path from the root: r (shared) then a (the chain's own tokens)
    queries          a a a      query i sees the keys up to itself

Keys lie at depths 0, 1, ... of the path, so a sliding window over depths is one over keys.
"""

from dataclasses import dataclass

import numpy as np
import torch

from rrhf_fast.data.forest import PackedForest


@dataclass(frozen=True)
class Chains:
    """The C chains of a pack, in row order; each row belongs to exactly one."""

    starts: np.ndarray  # [C] int64, each chain's first row ...
    stops: np.ndarray  # [C] int64, ... and one past its last
    depths: np.ndarray  # [N] int64, per row of the pack
    paths: list[np.ndarray]  # C int64 arrays: rows from the root to the chain's last token


def cut_chains(pack: PackedForest) -> Chains:
    """Cut a pack into chains, on the host: a pack on a device is copied back first."""
    ends, depths = pack.subtree_end.cpu().numpy(), pack.position_ids.cpu().numpy()
    num_rows = len(ends)
    # A row starts a chain where the row before it is a leaf, that is, where its subtree ends.
    starts = np.concatenate([[0], 1 + np.flatnonzero(ends[:-1] == np.arange(1, num_rows))])
    stops = np.append(starts[1:], num_rows)
    path = np.empty(depths.max() + 1, dtype=np.int64)
    paths = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        length = int(depths[stop - 1]) + 1
        path[depths[start] : length] = np.arange(start, stop)
        paths.append(path[:length].copy())
    return Chains(starts, stops, depths, paths)


def gather_rows(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """states[rows]: [N, ...], [M] int64 -> [M, ...]. Gradients are summed in float32 or better:
    a prompt's key receives one from every response."""
    return _GatherRows.apply(states, rows)


def add_rows(total: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor) -> None:
    """total[rows] += gradient, in the precision of `total`."""
    total.index_add_(0, rows, gradient.to(total.dtype))


def zero_total(num_rows: int, gradient: torch.Tensor) -> torch.Tensor:
    """[N, ...] zeros in float32 or better, to which gradients [M, ...] are added."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.new_zeros(num_rows, *gradient.shape[1:], dtype=dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(states)
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        total = zero_total(ctx.num_rows, gradient)
        add_rows(total, rows, gradient)
        return total.to(gradient.dtype), None
