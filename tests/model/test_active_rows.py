"""Rows without a gradient in the backward of linear layers: the same gradient, for less work."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.padded import build_padded
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import active_rows
from rrhf_fast.model.active_rows import ActiveLinear, use_active_rows
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel

SIZES = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=7)),
}


@pytest.fixture(autouse=True)
def any_size_pays(monkeypatch):
    """The models here are far too small to gain."""
    monkeypatch.setattr(active_rows, "GATHER", 0)


def model_of(name="llama", skip_rows=True, config=None, **options):
    torch.manual_seed(0)
    lm = MODELS[name]().to(options.pop("weights", torch.float64)).eval()
    return RRHFModel(lm, config or LossConfig(), max_length=64, skip_rows=skip_rows, **options)


def pack_of(model, num_right=6, num_queries=8):
    """Queries of four responses, of which `num_right` are ranked as the model does."""
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.integers(0, 97, rng.integers(low, high), dtype=np.int32)

    queries = [
        TokenisedQuery(
            tokens(3, 9), [tokens(4, 12) for _ in range(4)], np.arange(4, dtype=np.float32)
        )
        for _ in range(num_queries)
    ]
    build = build_forest if model.attention else build_padded
    with torch.no_grad():
        for query in queries[:num_right]:
            scores = model(build([query])).logp_scores
            query.rewards[:] = scores.argsort().argsort().float().numpy()
    return build(queries)


def gradient(model, pack):
    model.zero_grad()
    model(pack).loss.backward()
    return {name: p.grad.clone() for name, p in model.lm.named_parameters() if p.grad is not None}


def assert_equal(ours, expected, tolerance=1e-13):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= tolerance * max(value.norm(), 1), name


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_same(name, checkpointing):
    options = {"activation_checkpointing": checkpointing}
    expected = model_of(name, skip_rows=False, **options)
    pack = pack_of(expected)
    model = model_of(name, **options)
    assert model.row_skipping == 1 and expected.row_skipping == 0
    assert_equal(gradient(model, pack), gradient(expected, pack))


def test_of_several_packs_at_once(lm=None):
    """Each layer reads its rows off its own gradient, not off the latest pack."""
    model, plain = model_of(activation_checkpointing="full"), model_of(skip_rows=False)
    packs = [pack_of(model, right) for right in (0, 8, 5)]
    for each in (model, plain):
        each.zero_grad()
        sum(each(pack).loss for pack in packs).backward()
    ours, expected = (
        {name: p.grad for name, p in each.lm.named_parameters()} for each in (model, plain)
    )
    assert_equal(ours, expected)


def test_padded_batches_skip_rows_too():
    model, plain = (model_of(skip_rows=skip, packing="none") for skip in (True, False))
    pack = pack_of(model)
    assert_equal(gradient(model, pack), gradient(plain, pack))


def test_copied_weights_skip_rows_too():
    options = {"weights": torch.float32, "compute_dtype": torch.bfloat16}
    model, plain = (model_of(skip_rows=skip, **options) for skip in (True, False))
    assert all(layer.skips_rows for layer in model.copied) and model.copied
    pack = pack_of(model)
    # Sums of the same products in another order.
    assert_equal(gradient(model, pack), gradient(plain, pack), tolerance=1e-2)


def backward_flops(model, pack):
    loss = model(pack).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    products = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in products.items() if "mm" in str(op))


def test_the_work_is_that_of_the_rows_with_a_gradient():
    config = LossConfig(sft_weight=0.0)
    model, plain = (model_of(skip_rows=skip, config=config) for skip in (True, False))
    for num_right in (0, 4, 8):
        pack = pack_of(model, num_right)
        ours, whole = backward_flops(model, pack), backward_flops(plain, pack)
        if num_right == 8:
            assert ours == 0
        else:
            assert 0.3 * whole < ours < (1.01 - num_right / 10) * whole


@given(st.lists(st.sampled_from([0.0, 1e-320, -2.0, float("nan"), float("inf")]), min_size=2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_zeros_alone_are_left_out(values):
    for column in (0, 1):  # the first of a row, or another
        d_y = torch.zeros(1, len(values), 3, dtype=torch.float64)
        d_y[0, :, column] = torch.tensor(values, dtype=torch.float64)
        kept = active_rows.active_rows(d_y, 3)
        expected = [i for i, value in enumerate(values) if value != 0]
        assert (list(range(len(values))) if kept is None else kept.tolist()) == expected


def test_rows_are_gathered_only_where_that_pays(monkeypatch):
    monkeypatch.setattr(active_rows, "GATHER", 35)
    d_y = torch.ones(100, 700)
    d_y[:10] = 0  # of a layer of 700 x 700: exactly the share from which on it pays
    assert active_rows.active_rows(d_y, 700) is None
    d_y[:11] = 0
    assert active_rows.active_rows(d_y, 700).tolist() == list(range(11, 100))
    assert active_rows.active_rows(d_y, 300) is None
    holder = nn.Module()
    holder.base_model = nn.ModuleList([nn.Linear(200, 200), nn.Linear(300, 300)])
    holder.get_output_embeddings = lambda: None
    use_active_rows(holder)
    assert [type(layer) for layer in holder.base_model] == [nn.Linear, ActiveLinear]


def test_a_layer_alone_against_torch():
    torch.manual_seed(0)
    plain = nn.Linear(5, 7).double()
    layer = nn.Linear(5, 7).double()
    layer.load_state_dict(plain.state_dict())
    layer.__class__ = ActiveLinear
    upstream = torch.randn(2, 6, 7, dtype=torch.float64)
    upstream[0, :4] = 0
    results = []
    for each in (layer, plain):
        x = torch.ones(2, 6, 5, dtype=torch.float64).cumsum(1).requires_grad_()
        (each(x) * upstream).sum().backward()
        results.append((x.grad, each.weight.grad, each.bias.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-14)


def test_a_frozen_layer_gets_no_gradient_and_passes_one_on():
    layer = nn.Linear(5, 7)
    layer.requires_grad_(False).__class__ = ActiveLinear
    x, kept = torch.ones(4, 5, requires_grad=True), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        y = layer(x)
    assert kept == [(7, 5)]  # the weight alone
    y[1].sum().backward()
    assert layer.weight.grad is None and x.grad.any(1).tolist() == [False, True, False, False]


def converted(model):
    modules = list(model.lm.modules())
    has_lean = any("forward" in vars(module) for module in modules)
    return any(type(module) is ActiveLinear for module in modules), has_lean


def test_layers_are_given_back():
    model = model_of(weights=torch.float32)
    assert converted(model) == (True, True)
    model.release()
    assert converted(model) == (False, False)
    with model.engaged():
        assert converted(model) == (True, True)
        with model.engaged():
            pass
        assert converted(model) == (True, True)
    assert converted(model) == (False, False)
    again = RRHFModel(model.lm, LossConfig(), max_length=64, skip_rows=False)
    assert converted(again) == (False, True)


def test_decoders_of_other_layers_skip_nothing():
    config = GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=64)
    model = RRHFModel(GPT2LMHeadModel(config).eval(), LossConfig(), max_length=64, packing="none")
    assert model.row_skipping == 0
