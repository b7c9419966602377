"""Compiled layers compute the same for any length, and share graphs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.padded import build_padded
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import layers, rrhf
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model(kind="llama", **sizes):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | sizes)))
    return lm.eval()


def queries(seed, count=3):
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(3, 97, n, dtype=np.int32)

    return [
        TokenisedQuery(
            draw(rng.integers(3, 20)),
            [draw(rng.integers(2, 15)) for _ in range(3)],
            np.arange(3, dtype=np.float32),
        )
        for _ in range(count)
    ]


def loss_and_gradients(model, pack):
    model.zero_grad()
    loss = model(pack).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def graphs_made(function):
    before = layers.count_graphs()
    function()
    return layers.count_graphs() - before


@pytest.mark.parametrize(
    ("packing", "checkpointing"),
    [("forest", "none"), ("forest", "full"), ("forest", "selective"), ("none", "none")],
)
def test_compilation_changes_nothing(packing, checkpointing):
    options = {"max_length": 64, "packing": packing, "activation_checkpointing": checkpointing}
    plain = RRHFModel(tiny_model(), LossConfig(), **options)
    compiled = RRHFModel(tiny_model(), LossConfig(), compile=True, **options)
    build = build_forest if packing == "forest" else build_padded
    for seed in range(2):
        pack = build(queries(seed, count=seed + 1))
        expected = loss_and_gradients(plain, pack)
        torch.testing.assert_close(loss_and_gradients(compiled, pack), expected)
    assert list(compiled.lm.state_dict()) == list(plain.lm.state_dict())


@pytest.mark.parametrize(
    ("kind", "sizes"), [("llama", {}), ("gemma2", {"head_dim": 8, "sliding_window": 6})]
)
def test_graphs_are_shared_by_layers_and_lengths(kind, sizes):
    """All graphs are made at start-up and in the first evaluation; later packs add none."""
    models = []
    options = {"max_length": 64, "compile": True}
    start = graphs_made(
        lambda: models.append(RRHFModel(tiny_model(kind, **sizes), LossConfig(), **options))
    )
    model = models[0]
    with torch.no_grad():
        start += graphs_made(lambda: model(build_forest(queries(0))))
    # Three parts of a layer (before, after and around attention), with and without gradient, for
    # at most two kinds of layer.
    assert 0 < start <= 3 * 2 * 2
    for seed in range(1, 6):
        pack = build_forest(queries(seed, count=seed), pad_to_multiple_of=1 + 127 * (seed % 2))
        assert graphs_made(lambda pack=pack: loss_and_gradients(model, pack)) == 0
        with torch.no_grad():
            assert graphs_made(lambda pack=pack: model(pack)) == 0


def test_generation_is_not_compiled():
    model = RRHFModel(tiny_model(), LossConfig(), max_length=64, compile=True)
    ids = torch.arange(3, 9)[None]

    def generate():
        with model.generation():
            model.lm.generate(ids, max_new_tokens=4, do_sample=False)

    assert graphs_made(generate) == 0


def test_layers_are_not_compiled_on_a_cpu_by_default():
    model = RRHFModel(tiny_model(), LossConfig(), max_length=64, compile=None)
    assert not model.compiled and model.pad_to_multiple_of == 1
    compiled = RRHFModel(tiny_model(), LossConfig(), max_length=64, compile=True)
    assert compiled.compiled and compiled.pad_to_multiple_of == 128


def test_a_failing_compiler_is_refused_or_replaced(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(layers, "COMPILER", broken)
    with pytest.raises(ValueError, match="^compile: a step of compiled.* failed .*no compiler"):
        RRHFModel(tiny_model(), LossConfig(), max_length=64, compile=True)
    monkeypatch.setattr(rrhf, "compiles_by_default", lambda device: True)
    model = RRHFModel(tiny_model(), LossConfig(), max_length=64, compile=None)
    assert not model.compiled
    assert len(model.warnings) == 1 and "\n" not in model.warnings[0]
    plain = RRHFModel(tiny_model(), LossConfig(), max_length=64)
    pack = build_forest(queries(0))
    torch.testing.assert_close(loss_and_gradients(model, pack), loss_and_gradients(plain, pack))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("llama", {}), ("granite", {"residual_multiplier": 0.3, "embedding_multiplier": 2.5})],
)
def test_inductor_changes_nothing_beyond_rounding(kind, sizes, monkeypatch):
    monkeypatch.setattr(layers, "COMPILER", "inductor")
    plain = RRHFModel(tiny_model(kind, **sizes), LossConfig(), max_length=64)
    compiled = RRHFModel(tiny_model(kind, **sizes), LossConfig(), max_length=64, compile=True)
    for seed in (0, 1):
        pack = build_forest(queries(seed), pad_to_multiple_of=128)
        expected = loss_and_gradients(plain, pack)
        torch.testing.assert_close(
            loss_and_gradients(compiled, pack), expected, rtol=1e-4, atol=1e-5
        )


def test_functions_beyond_the_limit_on_graphs_are_counted(monkeypatch):
    assert layers.count_given_up() == 0
    model = tiny_model()
    layers.compile_layers(model)
    assert layers.RECOMPILE_LIMIT > 8
    monkeypatch.setattr(layers, "RECOMPILE_LIMIT", 1)
    with torch.no_grad():
        model(torch.arange(3, 9)[None], use_cache=False)
    assert layers.count_given_up() == 0
    model(torch.arange(3, 9)[None], use_cache=False)  # with gradients: another graph
    assert layers.count_given_up() > 0


@pytest.mark.parametrize("multiple", [1, 128])
def test_the_length_of_a_trial_differs_from_all_sizes_of_weights(multiple):
    model = tiny_model(intermediate_size=7 * 128) if multiple > 1 else tiny_model()
    length = layers.trial_length(model, multiple)
    assert length % multiple == 0 and length > multiple
    assert all(length not in parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize(("limit", "is_reached"), [(1, True), (64, False)])
def test_the_limit_holds_in_every_thread(limit, is_reached, monkeypatch):
    """A GPU's backward runs in its own thread."""
    monkeypatch.setattr(layers, "RECOMPILE_LIMIT", limit)
    model, ids = tiny_model(), torch.arange(3, 9)[None]
    layers.compile_layers(model)

    def run():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for enabled in (False, True):
                with (
                    torch.set_grad_enabled(enabled),
                    torch.autocast("cpu", torch.bfloat16, enabled),
                ):
                    model.to(dtype)(ids, use_cache=False)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
    assert (layers.count_given_up() > 0) == is_reached
