"""Log-probs of chosen tokens straight from hidden states and the head, without logits in memory.

    z[e, v] = head(states[e] . weight[v])    head: + bias, * logit_scale, softcap * tanh(./softcap)
    logp[e] = z[e, targets[e]] - log sum_v exp z[e, v]

The forward computes tiles of z and keeps the maximum, sum and target of each row; a small reduction
in fixed order turns them into log-probs. The backward recomputes tiles and writes d logp / d z for
a slice of the vocabulary, which two matrix products turn into gradients.

Shapes: states [E, H], weight [V, H], bias [V], targets [E]; T = tiles of the vocabulary.
"""

import inspect

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rrhf_fast.kernels.configs import Tile, choose

# This kernel is bound by memory traffic: rows of one cache line (64 elements of 2 bytes), many at
# a time.
EXPS_BLOCK_M, EXPS_BLOCK_N = 32, 64


@triton.jit
def _head_tile(
    states, weight, bias, first_edge, first_token, num_edges, hidden_size, vocab_size, logit_scale,
    softcap, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of z in float32, -inf beyond the vocabulary. states and weight are descriptors with
    TMA, else pointers."""
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tokens = first_token + tl.arange(0, BLOCK_N)
    inside = tokens < vocab_size
    if TMA:
        for k in range(0, hidden_size, BLOCK_K):
            a = states.load([first_edge, k])  # zeros beyond the end
            b = weight.load([first_token, k])
            products = tl.dot(a, b.T, products, input_precision=PRECISION)
    else:
        # Rows beyond the end wrap around, which costs less than a mask.
        edges = (first_edge + tl.arange(0, BLOCK_M)) % num_edges
        columns = tl.arange(0, BLOCK_K)
        a_place = states + edges.to(tl.int64)[:, None] * hidden_size + columns[None, :]
        rows = (tokens % vocab_size).to(tl.int64)
        b_place = weight + rows[None, :] * hidden_size + columns[:, None]
        for k in range(0, hidden_size, BLOCK_K):
            exists = columns < hidden_size - k
            a = tl.load(a_place + k, mask=exists[None, :], other=0.0)
            b = tl.load(b_place + k, mask=exists[:, None], other=0.0)
            products = tl.dot(a, b, products, input_precision=PRECISION)
    if HAS_BIAS:
        products += tl.load(bias + tokens, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = products * logit_scale
    if HAS_SOFTCAP:
        # tanh by exp, which every backend supports; it saturates without overflow.
        z = softcap - 2 * softcap / (tl.exp(z * (2 / softcap)) + 1)
    return tl.where(inside[None, :], z, float("-inf")), tokens


@triton.jit
def _tile_of(program, num_m, num_n, GROUP_M: tl.constexpr):
    """Order tiles so that GROUP_M consecutive tiles of edges use the same tile of tokens."""
    group = program // (GROUP_M * num_n)
    first = group * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    inside = program % (GROUP_M * num_n)
    return first + inside % height, inside // height


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half: one at a time needs fewer registers, and less shared memory to store."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _store_target(target_logits, z, tokens, edges, target, exists, first_token, BLOCK_N):
    at_target = tokens[None, :] == target[:, None]
    # max, not sum: a logit may be -inf (a padded vocabulary's bias), and -inf * 0 would be NaN.
    target_logit = tl.max(tl.where(at_target, z, float("-inf")), 1)
    here = (target >= first_token) & (target < first_token + BLOCK_N)
    tl.store(target_logits + edges, target_logit, mask=exists & here)


# Counts differ from pack to pack, and tensors are slices of a pack's: their divisibility must not
# trigger a new compilation.
COUNTS = ["num_edges", "num_active"]
SLICES = ["targets", "lse", "grad", "active", "logps", "tops", "sums", "target_logits"]


def _jit(kernel):
    """triton.jit, compiled once per head and device, not per pack."""
    names = inspect.signature(kernel).parameters
    return triton.jit(
        do_not_specialize=[name for name in COUNTS if name in names],
        do_not_specialize_on_alignment=[name for name in SLICES if name in names],
    )(kernel)


@_jit
def forward_kernel(
    states, weight, bias, targets, tops, sums, target_logits, exps,
    num_edges, hidden_size, vocab_size, logit_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    KEEPS: tl.constexpr,
):  # fmt: skip
    """tops, sums [T, E]: maximum of each tile's row and sum of exp(z - maximum); target_logits [E]
    is written by the one tile that holds the target; with KEEPS, exps [E, width]: exp(z - maximum),
    and 0 beyond the vocabulary."""
    num_m, num_n = tl.cdiv(num_edges, BLOCK_M), tl.cdiv(vocab_size, BLOCK_N)
    m, n = _tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    z, tokens = _head_tile(
        states, weight, bias, m * BLOCK_M, n * BLOCK_N, num_edges, hidden_size, vocab_size,
        logit_scale, softcap, BLOCK_M, BLOCK_N, BLOCK_K, HAS_BIAS, HAS_SOFTCAP, PRECISION, TMA,
    )  # fmt: skip
    edges = m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = edges < num_edges
    target = tl.load(targets + edges, mask=exists, other=-1)
    top = tl.max(z, 1)
    place = n.to(tl.int64) * num_edges + edges
    tl.store(tops + place, top, mask=exists)
    # A bias may be -inf: a row of -inf alone sums to 0.
    shift = tl.where(top == float("-inf"), 0.0, top)
    target_args = (target_logits, z, tokens, edges, target, exists, n * BLOCK_N, BLOCK_N)
    if KEEPS:
        _store_target(*target_args)  # first here and last below, or Hopper spills
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        halves = _halves(z, BLOCK_M, BLOCK_N)
        for i in tl.static_range(2):
            above = tl.exp(halves[i] - shift[:, None])
            total += tl.sum(above, 1)
            column = n * BLOCK_N + i * (BLOCK_N // 2)
            exps.store([m * BLOCK_M, column], above.to(exps.dtype))
        tl.store(sums + place, total, mask=exists)
    else:
        tl.store(sums + place, tl.sum(tl.exp(z - shift[:, None]), 1), mask=exists)
        _store_target(*target_args)


@_jit
def dlogits_kernel(
    states, weight, bias, targets, lse, grad, dlogits, bias_sums,
    num_edges, hidden_size, vocab_size, first_token, width, logit_scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
):  # fmt: skip
    """dlogits [E, width] = grad * d logp / d(states . weight), for `width` tokens from first_token;
    bias_sums [tiles of edges, width] are its column sums before rounding."""
    num_m, num_n = tl.cdiv(num_edges, BLOCK_M), tl.cdiv(width, BLOCK_N)
    m, n = _tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    z, _ = _head_tile(
        states, weight, bias, m * BLOCK_M, first_token + n * BLOCK_N, num_edges, hidden_size,
        vocab_size, logit_scale, softcap, BLOCK_M, BLOCK_N, BLOCK_K, HAS_BIAS, HAS_SOFTCAP,
        PRECISION, TMA,
    )  # fmt: skip
    edges = m * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = edges < num_edges
    target = tl.load(targets + edges, mask=exists, other=-1)
    log_total = tl.load(lse + edges, mask=exists, other=float("inf"))  # rows beyond the end: 0
    upstream = tl.load(grad + edges, mask=exists, other=0.0) * logit_scale
    HALF: tl.constexpr = BLOCK_N // 2
    halves = _halves(z, BLOCK_M, BLOCK_N)
    for i in tl.static_range(2):
        column = n * BLOCK_N + i * HALF
        tokens = first_token + column + tl.arange(0, HALF)
        d = -tl.exp(halves[i] - log_total[:, None]) * upstream[:, None]
        d = tl.where(tokens[None, :] == target[:, None], d + upstream[:, None], d)
        if HAS_SOFTCAP:
            ratio = tl.where(tokens[None, :] < vocab_size, halves[i] * (1 / softcap), 0.0)
            d *= 1 - ratio * ratio
        dlogits.store([m * BLOCK_M, column], d.to(dlogits.dtype))
        if WANTS_BIAS:
            columns = column + tl.arange(0, HALF)
            tl.store(bias_sums + m * width + columns, tl.sum(d, 0), mask=columns < width)


@_jit
def dlogits_of_exps_kernel(
    exps, bias_sums, active, targets, tops, logps, lse, grad,
    num_active, num_edges, vocab_size, width, logit_scale, softcap,
    TILE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
):  # fmt: skip
    """Row i of exps [E, width] becomes grad * d logp / d(states . weight) of edge active[i];
    bias_sums [V] are the column sums before rounding. A program owns BLOCK_N columns and walks down
    the rows: edges ascend, so it never overwrites a row it has yet to read."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Up to `width`, a multiple of 16, so that accesses are 16 bytes wide even for odd vocabularies.
    inside = (column < width)[None, :]
    tile = (tl.program_id(0) * BLOCK_N // TILE_N).to(tl.int64)
    column_sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, num_active, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        exists = i < num_active
        edge = tl.load(active + i, mask=exists, other=0)
        top = tl.load(tops + tile * num_edges + edge, mask=exists, other=0.0)
        log_total = tl.load(lse + edge, mask=exists, other=float("inf"))
        upstream = tl.load(grad + edge, mask=exists, other=0.0) * logit_scale
        target = tl.load(targets + edge, mask=exists, other=-1)
        here = exists[:, None] & inside
        e = tl.load(exps + edge[:, None] * width + column[None, :], mask=here, other=0.0)
        e = e.to(tl.float32)
        tl.debug_barrier()  # another thread may store where this one loads
        at_target = column[None, :] == target[:, None]
        # e was rounded, but 1 - p does not cancel to its rounding error: a likely target is the
        # maximum of its tile, where e is exactly 1.
        p = e * tl.exp(top - log_total)[:, None]
        d = (tl.where(at_target, 1.0, 0.0) - p) * upstream[:, None]
        if HAS_SOFTCAP:
            # Underflowed values have no gradient, but their logarithm would be infinite. The bound
            # is a normal float32: Triton treats smaller literals as float64.
            z = tl.where(e > 0, tl.log(tl.maximum(e, 1.2e-38)) + top[:, None], 0.0)
            # The target has a gradient, however small its e.
            logp = tl.load(logps + edge, mask=exists, other=0.0)
            z = tl.where(at_target, (logp + log_total)[:, None], z)
            ratio = z * (1 / softcap)
            d *= 1 - ratio * ratio
        d = tl.where(here, d, 0.0)
        row = i.to(tl.int64)[:, None] * width
        tl.store(exps + row + column[None, :], d.to(exps.dtype.element_ty), mask=here)
        if WANTS_BIAS:
            column_sums += tl.sum(d, 0)
    if WANTS_BIAS:
        tl.store(bias_sums + column, column_sums, mask=column < vocab_size)


def forward(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    exps: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp [E], log of the softmax denominator [E], maximum of each tile's row [T, E]), float32.

    states and weight share a dtype and are contiguous, with rows of a multiple of 16 bytes. `exps`
    [E, width] of that dtype, if given, is filled with exp(z - maximum), and with 0 beyond the
    vocabulary; `exps_width` gives the width.
    """
    num_edges, vocab_size = len(states), len(weight)
    tile = tile or forward_tile(states, keeps=exps is not None)
    num_tiles = triton.cdiv(vocab_size, tile.block_n)
    tops = torch.empty(num_tiles, num_edges, dtype=torch.float32, device=states.device)
    sums = torch.empty_like(tops)
    target_logits = torch.full_like(tops[0], float("nan"))  # remains if a target is not a token
    grid = (triton.cdiv(num_edges, tile.block_m) * num_tiles,)
    forward_kernel[grid](
        *_operands(states, weight, bias, targets, tile), tops, sums, target_logits,
        None if exps is None else TensorDescriptor.from_tensor(exps, _half(tile)),
        num_edges, states.shape[1], vocab_size, logit_scale, softcap or 0.0,
        **_constants(tile, states, bias, softcap), KEEPS=exps is not None,
    )  # fmt: skip
    top = tops.amax(0)
    log_total = (sums * (tops - top).exp()).sum(0).log()
    return (target_logits - top) - log_total, top + log_total, tops


def dlogits(
    out: torch.Tensor,
    bias_sums: torch.Tensor | None,
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    first_token: int,
    tile: Tile | None = None,
) -> None:
    """Fill out [E, width] (the states' dtype) and, for a bias, bias_sums [cdiv(E, block_m), width].

    Columns beyond the vocabulary become 0. A row of `out` is a multiple of 16 bytes.
    """
    (num_edges, width), tile = out.shape, tile or dlogits_tile(states)
    grid = (triton.cdiv(num_edges, tile.block_m) * triton.cdiv(width, tile.block_n),)
    dlogits_kernel[grid](
        *_operands(states, weight, bias, targets, tile), lse, grad,
        TensorDescriptor.from_tensor(out, _half(tile)), bias_sums,
        num_edges, states.shape[1], len(weight), first_token, width, logit_scale, softcap or 0.0,
        **_constants(tile, states, bias, softcap), WANTS_BIAS=bias_sums is not None,
    )  # fmt: skip


def dlogits_of_exps(
    exps: torch.Tensor,
    bias_sums: torch.Tensor | None,
    active: torch.Tensor,
    targets: torch.Tensor,
    tops: torch.Tensor,
    logps: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    vocab_size: int,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Turn exps [E, width] of `forward` into the logits' gradient for edges active [A] (ascending),
    in the first A rows, 0 beyond the vocabulary; fill bias_sums [V] for a bias."""
    num_edges, width = exps.shape
    assert exps.is_contiguous() and width == exps_width(vocab_size)
    dlogits_of_exps_kernel[(triton.cdiv(width, EXPS_BLOCK_N),)](
        exps, bias_sums, active, targets, tops, logps, lse, grad,
        len(active), num_edges, vocab_size, width, logit_scale, softcap or 0.0,
        TILE_N=forward_tile(exps, keeps=True).block_n, BLOCK_M=EXPS_BLOCK_M, BLOCK_N=EXPS_BLOCK_N,
        HAS_SOFTCAP=softcap is not None, WANTS_BIAS=bias_sums is not None,
    )  # fmt: skip


def exps_width(vocab_size: int) -> int:
    """Columns of `exps`, a multiple of 16 so that Triton's accesses are 16 bytes wide."""
    return -(-vocab_size // 16) * 16


def forward_tile(states: torch.Tensor, *, keeps: bool) -> Tile:
    """The forward's tile for these states; if it keeps exponentials, the backward's."""
    return choose("dlogits" if keeps else "forward", capability(states), states.itemsize)


def dlogits_tile(states: torch.Tensor) -> Tile:
    """The backward's tile for these states."""
    return choose("dlogits", capability(states), states.itemsize)


def _operands(states, weight, bias, targets, tile: Tile) -> tuple:
    if tile.tma:
        states = TensorDescriptor.from_tensor(states, [tile.block_m, tile.block_k])
        weight = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    return states, weight, bias, targets


def _half(tile: Tile) -> list[int]:
    return [tile.block_m, tile.block_n // 2]


def _constants(tile: Tile, states, bias, softcap) -> dict:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m, "HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None,
        "PRECISION": "ieee" if states.dtype == torch.float32 else "tf32", "TMA": tile.tma,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def capability(tensor: torch.Tensor) -> int:
    """Compute capability of the tensor's device, 90 for 9.0; 80 for the interpreter."""
    if tensor.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
