"""Every attention backend against the dense reference in float64, and the choice of one."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from rrhf_fast import reference
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import attention, forest_flash, forest_flex, forest_sdpa
from rrhf_fast.model.attention import BACKENDS, choose_backend, try_backend
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.chains import cut_chains, gather_rows

CPU = torch.device("cpu")
LLAMA = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, value_size=8)

tokens = st.integers(0, 2)  # a small alphabet, so that prefixes are shared
responses = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=5)
cases = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), responses), min_size=1, max_size=3
)


def forest(cases, **options):
    return build_forest(
        [
            TokenisedQuery(
                np.array(prompt, np.int32),
                [np.array(ids, np.int32) for ids in answers],
                np.zeros(len(answers), np.float32),
            )
            for prompt, answers in cases
        ],
        **options,
    )


def tensors_for(pack, *, kv_heads=2, value_size=8, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    n = pack.num_tokens
    return [draw(1, 4, n, 8), draw(1, kv_heads, n, 8), draw(1, kv_heads, n, value_size), draw(4)]


def run(attend, tensors, *, sinks, gradients=True, **options):
    out = attend(*tensors[:3], sinks=tensors[3] if sinks else None, **options)
    if not gradients:
        return [out]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, tensors[: 4 if sinks else 3], upstream)]


def run_reference(pack, tensors, **options):
    def attend(q, k, v, **options):
        out = reference.forest_attention(
            q[0], k[0], v[0], pack.subtree_end, pack.position_ids, **options
        )
        return out[None]

    return run(attend, tensors, **options)


def run_backend(name, pack, tensors, **options):
    backend = BACKENDS[name]
    plan = backend.plan(pack)
    return run(lambda q, k, v, **o: backend.attend(q, k, v, plan, **o), tensors, **options)


OPTIONS = {
    "scale": st.sampled_from([None, 0.7]),
    "window": st.sampled_from([None, 1, 4]),
    "softcap": st.sampled_from([None, 2.0]),
    "sinks": st.booleans(),
}


@given(cases, st.sampled_from([1, 2, 4]), st.sampled_from([1, 8]), st.fixed_dictionaries(OPTIONS))
def test_sdpa_equals_the_reference(cases, kv_heads, multiple, options):
    pack = forest(cases, pad_to_multiple_of=multiple)
    tensors = tensors_for(pack, kv_heads=kv_heads)
    torch.testing.assert_close(
        run_backend("forest_sdpa", pack, tensors, **options),
        run_reference(pack, tensors, **options),
    )


@pytest.mark.usefixtures("varlen_on_cpu")
@given(cases, st.sampled_from([1, 2, 4]), st.sampled_from([1, 8]), st.fixed_dictionaries(OPTIONS))
def test_gathered_keys_equal_the_reference(cases, kv_heads, multiple, options):
    """Outputs and gradients, including sinks, to float64's rounding, in one call or in many."""
    options |= {"softcap": None}  # left to the kernel
    pack = forest(cases, pad_to_multiple_of=multiple)
    tensors = tensors_for(pack, kv_heads=kv_heads)
    expected = run_reference(pack, tensors, **options)
    torch.testing.assert_close(run_backend("forest_flash", pack, tensors, **options), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest_flash, "MAX_KEY_ROWS", 7)
        plan = forest_flash.plan(pack)
        many = run_backend("forest_flash", pack, tensors, **options)
    torch.testing.assert_close(many, expected)
    assert [call.start for call in plan.calls[1:]] == [call.stop for call in plan.calls[:-1]]
    assert all(len(c.key_rows) <= 7 or len(c.key_offsets) == 2 for c in plan.calls)


@pytest.mark.usefixtures("flex_on_cpu")
@settings(max_examples=20)
@given(cases, st.sampled_from([1, 2, 4]), st.sampled_from([1, 8]), st.fixed_dictionaries(OPTIONS))
def test_flex_equals_the_reference(cases, kv_heads, multiple, options):
    pack = forest(cases, pad_to_multiple_of=multiple)
    tensors = [t.detach() for t in tensors_for(pack, kv_heads=kv_heads)]
    torch.testing.assert_close(
        run_backend("forest_flex", pack, tensors, gradients=False, **options),
        run_reference(pack, tensors, gradients=False, **options),
    )


def test_scale_and_cap_are_constants_of_the_kernel(monkeypatch):
    """Inductor cannot generate code for floats that are inputs of FlexAttention."""
    inputs = []

    def spy(graph, example_inputs):
        inputs.extend(example_inputs)
        return graph

    torch._dynamo.reset()  # earlier tests may have used up the limit on compilations
    spied = torch.compile(flex_attention, dynamic=True, backend=spy)
    monkeypatch.setattr(forest_flex, "compiled", spied)
    pack = forest([([1, 2], [[0, 1, 2], [0, 2, 2]])])
    tensors = [t.detach() for t in tensors_for(pack)]
    run_backend("forest_flex", pack, tensors, gradients=False, sinks=False, scale=0.3, softcap=5.0)
    assert inputs
    for value in inputs:
        assert not isinstance(value, float | torch.SymFloat)
        assert not (isinstance(value, torch.Tensor) and value.is_floating_point()) or value.dim()


@given(cases)
def test_chains_are_runs_of_first_children(cases):
    pack = forest(cases, pad_to_multiple_of=4)
    chains = cut_chains(pack)
    assert chains.starts[0] == 0 and chains.stops[-1] == pack.num_tokens
    assert (chains.starts[1:] == chains.stops[:-1]).all()
    row = torch.arange(pack.num_tokens)
    visible = (row <= row[:, None]) & (row[:, None] < pack.subtree_end)
    for start, stop, path in zip(chains.starts, chains.stops, chains.paths, strict=True):
        assert path[-(stop - start) :].tolist() == list(range(start, stop))
        assert path.tolist() == visible[stop - 1].nonzero().flatten().tolist()


def test_gathering_sums_gradients_in_float32():
    """256 + 1 is 256 in bfloat16, so a sum in it would lose all but the first."""
    states = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.zeros(65, dtype=torch.int64)
    gradient = torch.ones(65, dtype=torch.bfloat16)
    gradient[0] = 256
    gather_rows(states, rows).backward(gradient)
    assert states.grad.tolist() == [320.0, 0.0]


def test_a_plan_moves_without_its_masks():
    pack = forest([([1, 2], [[0, 1, 2], [0, 2, 2]])], plan=forest_sdpa.plan)
    tensors = tensors_for(pack)
    moved = pack.to("cpu").plan
    forest_sdpa.attend(*tensors[:3], moved, window=1)
    assert moved.buckets[0].masks and not pack.plan.buckets[0].masks


def test_auto_on_a_cpu_is_sdpa_and_says_why():
    choice = choose_backend("auto", [LLAMA], device=CPU, dtype=torch.float32)
    assert choice.name == "forest_sdpa"
    assert choice.reason == "forest_flex has no backward on cpu; forest_flash needs CUDA"
    assert choice.warning is None


@pytest.mark.parametrize("name", ["forest_flex", "forest_flash"])
def test_an_unsupported_backend_is_refused_by_name_and_reason(name):
    with pytest.raises(ValueError, match=f"^attn_implementation: {name} (has no|needs)"):
        choose_backend(name, [LLAMA], device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, torch.float32, "16 bits, not in float32"),
        ({"head_size": 20, "value_size": 20}, torch.bfloat16, "multiple of 8 up to 256, not 20"),
        ({"value_size": 16}, torch.bfloat16, "keys .8. and values .16."),
        ({"softcap": 50.0}, torch.bfloat16, "flash-attn"),
        ({"window": 9, "has_sinks": True}, torch.bfloat16, None),
    ],
)
def test_flash_names_what_it_does_not_support(change, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(forest_flash, "_flash_attn", lambda: None)
    problem = forest_flash.obstacle(replace(LLAMA, **change), torch.device("cuda"), dtype, 0)
    assert (problem is None) == (reason is None)
    if reason:
        assert re.search(reason, problem)


@pytest.fixture
def flash_without_obstacle(monkeypatch, varlen_on_cpu):
    monkeypatch.setattr(forest_flash, "obstacle", lambda *args: None)


def test_auto_takes_the_first_supported_backend(flash_without_obstacle):
    choice = choose_backend("auto", [LLAMA], device=CPU, dtype=torch.float32)
    assert (choice.name, choice.warning) == ("forest_flash", None)


@pytest.mark.parametrize("fault", ["raises", "is wrong", "has a wrong gradient"])
def test_a_backend_that_fails_at_start_up_is_replaced_with_one_warning(
    flash_without_obstacle, monkeypatch, fault
):
    right = forest_flash.attend

    def attend(query, key, value, plan, **options):
        if fault == "raises":
            raise RuntimeError("no kernel\nfor this device")
        if fault == "is wrong":
            return right(query, key.flip(2), value, plan, **options)
        return right(query, key, value.detach() + 0 * value, plan, **options)

    monkeypatch.setattr(forest_flash, "attend", attend)
    choice = choose_backend("auto", [LLAMA], device=CPU, dtype=torch.float32)
    assert choice.name == "forest_sdpa"
    error = "RuntimeError: no kernel" if fault == "raises" else "ArithmeticError: a trial is"
    assert choice.warning.startswith(f"forest_flash failed at start-up ({error}")
    assert "\n" not in choice.warning
    with pytest.raises(ValueError, match="forest_flash failed at start-up"):
        choose_backend("forest_flash", [LLAMA], device=CPU, dtype=torch.float32)


def test_the_warning_names_every_failed_backend(flash_without_obstacle, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(forest_flex, "obstacle", lambda *args: None)
    for backend in (forest_flex, forest_flash):
        monkeypatch.setattr(backend, "attend", broken)
    choice = choose_backend("auto", [LLAMA], device=CPU, dtype=torch.float32)
    assert choice.name == "forest_sdpa"
    problem = "failed at start-up (RuntimeError: no kernel)"
    assert choice.warning == f"forest_flex {problem}; forest_flash {problem}"


def test_a_trial_covers_what_each_layer_requests(flash_without_obstacle, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "try_backend", lambda backend, spec, *_: asked.append(spec))
    specs = [LLAMA, replace(LLAMA, window=9), LLAMA]
    choose_backend("auto", specs, device=CPU, dtype=torch.float32)
    assert asked == specs[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [{}, {"window": 4096}, {"softcap": 50.0}, {"has_sinks": True}, {"value_size": 4}]
)
def test_a_correct_backend_passes_its_trial(change, dtype):
    spec = replace(LLAMA, **change)
    try_backend(forest_sdpa, spec, CPU, dtype)


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, torch.float32, "takes bfloat16 and float16, not float32"),
        ({}, torch.float64, "takes bfloat16 and float16, not float64"),
        ({"head_size": 8}, torch.bfloat16, "heads of 16 numbers or more"),
        ({"value_size": 8}, torch.float16, "heads of 16 numbers or more"),
        ({}, torch.bfloat16, None),
        ({"head_size": 192}, torch.float16, None),
    ],
)
def test_flex_names_what_it_does_not_support(change, dtype, reason):
    spec = replace(LLAMA, **({"head_size": 64, "value_size": 64} | change))
    problem = forest_flex.obstacle(spec, torch.device("cuda"), dtype, 8192)
    assert problem == reason if reason is None else reason in problem


def test_flex_never_falls_back_to_all_scores(monkeypatch):
    """Beyond the limit on graphs PyTorch would run it uncompiled, with N x N memory."""
    torch._dynamo.reset()
    eager = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(forest_flex, "compiled", eager)
    monkeypatch.setattr(forest_flex, "RECOMPILE_LIMIT", 1)
    pack = forest([([1, 2], [[1, 2], [2]])])
    q, k, v = (t.detach() for t in tensors_for(pack)[:3])
    plan = forest_flex.plan(pack)
    forest_flex.attend(q, k, v, plan)
    with pytest.raises(RuntimeError, match="^attn_implementation: forest_flex: the layers are"):
        forest_flex.attend(q, k, v, plan, softcap=3.0)
