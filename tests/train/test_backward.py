"""The two ways to a step's gradient: equal in float64, chosen by their cost."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf_fast import TrainConfig
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.losses import linear_rrhf, rrhf_loss
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import active_edges, backward_active, backward_whole, is_worthwhile
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def lm(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def step(lm, backward, config, ranked_right=0.5, max_tokens=80, at_least=3):
    """Gradient and Totals of nine queries in several packs; the share `ranked_right` of them are in
    the order of their rewards."""
    g = torch.Generator().manual_seed(1)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=g))
        return torch.randint(0, 97, (length,), generator=g, dtype=torch.int32).numpy()

    queries = [
        TokenisedQuery(
            tokens(3, 9),
            [tokens(2, 12) for _ in range(4)],
            torch.randperm(4, generator=g).float().numpy(),
        )
        for _ in range(9)
    ]
    model = RRHFModel(lm, config, packing=config.packing, max_length=64)
    planner = PackPlanner(queries, packing=config.packing, max_tokens_per_pack=max_tokens)
    with torch.no_grad():
        for i in range(round(ranked_right * len(queries))):
            scores = model(planner.build([i])).logp_scores
            queries[i].rewards[:] = scores.argsort().argsort().float().numpy()
    batch, totals = planner.batch(range(len(queries))), Totals()
    assert len(batch.packs) >= at_least
    lm.zero_grad()
    backward(model, batch, config, World(torch.device("cpu")), totals)
    return torch.cat([p.grad.flatten() for p in lm.parameters()]), totals


@pytest.mark.parametrize(
    "options",
    [{}, {"sft_weight": 0.0}, {"margin": 0.2, "length_penalty": 0.5}, {"compat": "official"}],
    ids=["plain", "ranking alone", "margin", "official"],
)
def test_both_ways_give_the_same_step(lm, options):
    config = TrainConfig(max_tokens_per_pack=80, **options)
    whole, whole_totals = step(lm, backward_whole, config)
    active, active_totals = step(lm, backward_active, config)
    assert (whole - active).norm() < 1e-12 * whole.norm()
    assert whole_totals.means() == pytest.approx(active_totals.means(), rel=1e-12)
    # The whole way counts by responses, the active one by edges; weights that cancel on a shared
    # edge are rare.
    fractions = whole_totals.active_fraction, active_totals.active_fraction
    assert fractions[0] == pytest.approx(fractions[1], abs=0.02) and 0.2 < fractions[0] < 0.95


def test_hooks_see_the_gradient_of_the_head(lm):
    """Of every pack, so that one which freezes rows, say, does."""
    head = lm.get_output_embeddings().weight
    handle = head.register_hook(torch.zeros_like)
    try:
        step(lm, backward_whole, TrainConfig())
        assert not head.grad.any()
    finally:
        handle.remove()


@pytest.mark.parametrize("options", [{}, {"rank_weight": 3.0, "sft_weight": 0.5}], ids=str)
def test_a_step_is_the_mean_over_its_queries_however_they_are_packed(lm, monkeypatch, options):
    """Also in its metrics. Shares of packs are part of the loss, so its upstream gradient is 1."""
    upstream, scale = [], linear_rrhf.scale_op
    noted = lambda *args: upstream.append(args[1].item()) or scale(*args)  # noqa: E731
    monkeypatch.setattr(linear_rrhf, "scale_op", noted)
    config = TrainConfig(max_tokens_per_pack=80, active_set="off", **options)
    packs, totals = step(lm, backward_whole, config)
    assert len(upstream) > 2 and set(upstream) == {1.0}
    padded = deepcopy(lm)
    padded.set_attn_implementation("sdpa")
    others = [  # the second with norms and positions in float32, over rows of another width
        step(lm, backward_whole, config, max_tokens=10_000, at_least=1),
        step(padded, backward_whole, replace(config, packing="none"), max_tokens=300),
    ]
    means = totals.means()
    weighed = config.rank_weight * means["rank_loss"] + config.sft_weight * means["sft_loss"]
    assert means["loss"] == pytest.approx(weighed, rel=1e-12)
    for (gradient, others_totals), rel in zip(others, (1e-12, 1e-6), strict=True):
        assert (gradient - packs).norm() < rel * packs.norm()
        assert others_totals.means() == pytest.approx(means, rel=rel)


@settings(max_examples=30, deadline=None)
@given(
    cases=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=4),
    rank_weight=st.sampled_from([0.0, 0.3]),
    sft_weight=st.sampled_from([0.0, 0.1]),
    margin=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 10**6),
)
def test_active_edges_are_those_with_a_gradient(cases, rank_weight, sft_weight, margin, seed):
    """No edge is shared here, so no two weights cancel."""
    g = torch.Generator().manual_seed(seed)
    prompt = np.zeros(2, np.int32)
    queries = [
        TokenisedQuery(prompt, [prompt[: 1 + i % 2] for i in range(len(r))], np.float32(r))
        for r in cases
    ]
    pack = build_forest(queries, share_prefixes=False)
    config = LossConfig(rank_weight=rank_weight, sft_weight=sft_weight, margin=margin)
    layout = {name: getattr(pack, name) for name in ("path_edges", "path_offsets", "group_offsets")}
    options = {"rank_weight": rank_weight, "sft_weight": sft_weight, "margin": margin}
    logps = torch.rand(len(pack.edge_rows), generator=g).neg().requires_grad_()
    out = rrhf_loss(logps, pack.rewards, **layout, **options)
    weights = torch.autograd.grad(out.loss, logps)[0]
    assert torch.equal(active_edges(out, pack, config), weights != 0)


def test_a_step_without_any_gradient_has_a_gradient_of_zero(lm):
    config = TrainConfig(sft_weight=0.0)
    gradient, totals = step(lm, backward_active, config, ranked_right=1.0)
    assert totals.active_fraction == 0 and not gradient.any()


def test_the_cheaper_way_is_taken():
    auto = TrainConfig()
    full = TrainConfig(activation_checkpointing="full")
    assert is_worthwhile(auto, 0.56, 0.0) and not is_worthwhile(auto, 0.57, 0.0)
    assert is_worthwhile(full, 0.64, 0.0) and not is_worthwhile(full, 0.66, 0.0)
    # Layers that skip rows leave a second pass only the rows that are computed again.
    assert not is_worthwhile(auto, 0.01, 1.0)
    assert is_worthwhile(full, 0.36, 1.0) and not is_worthwhile(full, 0.37, 1.0)
    # One half of it: between the two.
    assert is_worthwhile(auto, 0.30, 0.5) and not is_worthwhile(auto, 0.42, 0.5)
    for skipping in (0.0, 1.0):
        assert not is_worthwhile(TrainConfig(packing="none"), 0.1, skipping)
        assert is_worthwhile(TrainConfig(active_set="on"), 1.0, skipping)
        assert not is_worthwhile(TrainConfig(active_set="off"), 0.0, skipping)
    with pytest.raises(ValueError, match="active_set: works on forests only"):
        TrainConfig(active_set="on", packing="none").validate()
