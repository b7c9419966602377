"""CPU stand-ins for attention kernels that need a GPU, and for the compiler."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from rrhf_fast.model import forest_flash, forest_flex, layers


def _pieces(q, k, v, call, options):
    """(rows, keys, q, k, v, visible) of each chain, heads first, keys repeated per query head."""
    groups = q.shape[1] // k.shape[1]
    queries, keys = call.query_offsets.tolist(), call.key_offsets.tolist()
    assert queries[-1] == len(q) and keys[-1] == len(k) == len(call.key_rows)
    for c in range(len(queries) - 1):
        rows = slice(queries[c], queries[c + 1])
        chain_q = q[rows].transpose(0, 1)
        chain_k, chain_v = (
            x[keys[c] : keys[c + 1]].transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v)
        )
        n, m = chain_q.shape[1], chain_k.shape[1]
        assert n <= call.max_queries and m <= call.max_keys
        # Causal, aligned at the end, as flash attention's is.
        distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
        visible = (distance >= 0) & (distance < (options.window or m))
        yield rows, slice(keys[c], keys[c + 1]), chain_q, chain_k, chain_v, visible


def _forward(q, k, v, call, options):
    out, lse = torch.empty_like(q[..., :1]).expand(-1, -1, v.shape[-1]).clone(), []
    for rows, _, chain_q, chain_k, chain_v, visible in _pieces(q, k, v, call, options):
        chain_out = F.scaled_dot_product_attention(
            chain_q[None], chain_k[None], chain_v[None], visible, scale=options.scale
        )
        out[rows] = chain_out[0].transpose(0, 1)
        scores = (chain_q @ chain_k.mT * options.scale).masked_fill(~visible, float("-inf"))
        lse.append(scores.logsumexp(-1))
    return out, torch.cat(lse, dim=1)


def _backward(d_out, q, k, v, out, lse, call, options):
    """As in flash attention: from the given output and log-sum-exp, without a softmax."""
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, chain_q, chain_k, chain_v, visible in _pieces(q, k, v, call, options):
        d_o, o = d_out[rows].transpose(0, 1), out[rows].transpose(0, 1)
        scores = (chain_q @ chain_k.mT * options.scale).masked_fill(~visible, float("-inf"))
        p = torch.exp(scores - lse[:, rows, None])
        d_s = p * (d_o @ chain_v.mT - (d_o * o).sum(-1, keepdim=True)) * options.scale
        d_q[rows] = (d_s @ chain_k).transpose(0, 1)
        for total, part in ((d_k, d_s.mT @ chain_q), (d_v, p.mT @ d_o)):
            groups = (k.shape[1], -1)  # sums gradients over the heads that share a key
            total[keys] += part.unflatten(0, groups).sum(1).transpose(0, 1)
    return d_q, d_k, d_v


@pytest.fixture(scope="module")
def varlen_on_cpu():
    """Replace varlen flash by PyTorch's scaled_dot_product_attention, one chain at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest_flash, "kernel", lambda: forest_flash.Kernel(_forward, _backward))
        yield


@pytest.fixture(scope="module")
def flex_on_cpu():
    """FlexAttention without code generation: evaluates its masks and score_mods, forward only."""
    with pytest.MonkeyPatch.context() as patch:
        eager = torch.compile(flex_attention, dynamic=True, backend="eager")
        patch.setattr(forest_flex, "compiled", eager)
        yield


@pytest.fixture
def fresh_compiler(monkeypatch):
    """Graphs are made and differentiated as usual, but run by PyTorch's own operators."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(layers, "COMPILER", "aot_eager")
    yield
    torch._dynamo.reset()
