"""A pack synchronises the host with a GPU only once: for the number of edges with a gradient.

Runs without a GPU: operators that would synchronise are counted, and kernels are interpreted.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="the kernels need triton")

from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.losses import linear_rrhf, rrhf
from rrhf_fast.losses.linear_rrhf import read_bounds
from rrhf_fast.losses.parts import Layout
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import active_edges
from rrhf_fast.train.evaluate import Totals

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.segment_reduce, aten.lift_fresh,  # a tensor of Python numbers, copied to the device
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waits(TorchDispatchMode):
    """Counts operators that would synchronise on CUDA."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operator, kwargs = function.overloadpacket, kwargs or {}
        waits = operator in WAITING
        if operator in INDEXING:
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        if operator is aten.repeat_interleave:
            waits = kwargs.get("output_size") is None
        self.counts[str(operator)] += int(waits)
        return function(*args, **kwargs)


def queries(sizes=(4, 3, 5)):
    g = np.random.default_rng(0)

    def tokens(low, high):
        return g.integers(0, 90, g.integers(low, high), dtype=np.int32)

    return [
        TokenisedQuery(tokens(3, 9), [tokens(2, 9) for _ in range(k)], g.random(k, np.float32))
        for k in sizes
    ]


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Use the kernels, and skip the checks that run only on the CPU."""
    monkeypatch.setattr(linear_rrhf, "choose_backend", lambda *_: "triton")
    for module, name in (
        (linear_rrhf, "check_shapes"), (linear_rrhf, "check_layout"), (linear_rrhf, "check_bounds"),
        (rrhf, "check_layout"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_: None)
    # Dispatch modes do not see inside an operator.
    for name in ("linear_rrhf_op", "scale_op"):
        monkeypatch.setattr(linear_rrhf, name, getattr(linear_rrhf, name)._init_fn)


@pytest.mark.parametrize(
    "options", [{}, {"compat": "official"}, {"sft_reduction": "mean"}], ids=str
)
@pytest.mark.parametrize("workspace_mb", [0.01, 1e-6, None], ids=["chunks", "slices", "whole"])
def test_a_pack_waits_once_per_chunk(as_on_cuda, monkeypatch, options, workspace_mb):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    lm, loss = LlamaForCausalLM(config), LossConfig(**options)
    model = RRHFModel(lm, loss, max_length=64, skip_rows=False)  # which is for CPUs
    pack, totals = build_forest(queries(), plan=model.plan), Totals()

    chunks, spans = [], linear_rrhf._spans
    counted = lambda *arguments: chunks.extend(spans(*arguments)) or iter(chunks)  # noqa: E731
    monkeypatch.setattr(linear_rrhf, "_spans", counted)
    monkeypatch.setattr(model, "workspace_mb", workspace_mb)
    with Waits() as waits:
        out = model(pack)
        out.loss.backward()
        totals.add(out, pack)
        is_active = active_edges(out, pack, model.loss_config)
        totals.add_active(pack, is_active)
        totals.add_flops(pack, model.costs.of_pack(pack, is_active.sum()))
    assert len(chunks) == (1 if workspace_mb is None else 3)
    assert +waits.counts == {"aten.nonzero": len(chunks)}


def test_a_pack_knows_its_bounds():
    pack = build_forest(queries())
    layout = Layout(pack.path_edges, pack.path_offsets, pack.group_offsets)
    assert pack.bounds == tuple(read_bounds(layout, len(pack.edge_rows)))
    assert pack.to("meta").bounds == pack.bounds
