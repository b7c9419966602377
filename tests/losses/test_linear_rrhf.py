"""The loss in one sweep, both backends, against log_softmax and the plain loss in float64.

The kernels run on a GPU, or under Triton's interpreter, which truncates bfloat16 and so runs
float32 and float16 only.
"""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf_fast import reference
from rrhf_fast.losses import linear_rrhf_loss, rrhf_loss
from rrhf_fast.losses.linear_rrhf import linear_rrhf_op, read_bounds, workspace_for
from rrhf_fast.losses.parts import Layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
# MiB: every query alone too large; one query at a time, some too large; all at once.
WORKSPACES = [1e-6, 0.02, 16]
HEADS = [{}, {"softcap": 3.0}, {"logit_scale": 0.25}, {"softcap": 2.0, "logit_scale": 1.7}]
LOSSES = [
    {},
    {"length_penalty": 0.5, "margin": 0.3, "rank_weight": 10.0},
    {"sft_weight": 0.0, "sft_reduction": "mean"},
    {"pair_loss": "logistic", "beta": 0.5, "margin": 0.4},
    {"pair_loss": "logistic", "rank_reduction": "mean", "reference_logps": True},
    {"pair_loss": "squared", "length_penalty": 0.0, "beta": 0.1, "reference_logps": True},
    {"reference_logps": True, "margin": 0.1},
]


def case(groups=(3, 1, 4, 6), h=16, v=150, dtype=torch.float64, size=1.0, levels=4, seed=0):
    """A pack of queries whose responses share edges, with few reward levels, so that some tie."""
    g = torch.Generator().manual_seed(seed)
    paths, path_lengths, num_edges = [], [], 0
    for k in groups:
        shared = int(torch.randint(0, 3, (), generator=g))
        first, num_edges = num_edges, num_edges + shared
        for _ in range(k):
            own = int(torch.randint(1, 5, (), generator=g))
            paths += [*range(first, first + shared), *range(num_edges, num_edges + own)]
            path_lengths.append(shared + own)
            num_edges += own
    zero = torch.zeros(1, dtype=torch.int64)
    layout = {
        "path_edges": torch.tensor(paths),
        "path_offsets": torch.cat([zero, torch.tensor(path_lengths).cumsum(0)]),
        "group_offsets": torch.cat([zero, torch.tensor(groups).cumsum(0)]),
    }
    rewards = torch.randint(0, levels, (sum(groups),), generator=g).float()
    n = num_edges // 2 + 1
    tensors = [torch.randn(shape, generator=g) for shape in ((n, h), (v, h), (v,))]
    tensors[0] *= size
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in tensors]
    rows = torch.randint(0, n, (num_edges,), generator=g)
    targets = torch.randint(0, v, (num_edges,), generator=g)
    indices = [t.to(DEVICE) for t in (rows, targets, rewards)]
    return tensors, indices, {name: t.to(DEVICE) for name, t in layout.items()}


def plain(hidden, weight, rows, targets, rewards, *, bias, layout, head=None, loss=None):
    logps = reference.linear_logprob(hidden, weight, rows, targets, bias=bias, **(head or {}))
    return rrhf_loss(logps.double(), rewards, **layout, **(loss or {}), backend="torch")


def both(inputs, backend, head=None, loss=None, **options):
    """Ours; the plain way in float64; and in the dtype of the inputs, as a measure of rounding."""
    (hidden, weight, bias), indices, layout = inputs
    arguments = {"bias": bias, **(head or {}), **(loss or {}), **options}
    out = linear_rrhf_loss(hidden, weight, *indices, **layout, backend=backend, **arguments)
    results = [(out, torch.autograd.grad(out.loss * 3, [hidden, weight, bias]))]
    for dtype in (torch.float64, hidden.dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        out = plain(*tensors[:2], *indices, bias=tensors[2], layout=layout, head=head, loss=loss)
        results.append((out, torch.autograd.grad(out.loss * 3, tensors)))
    return results


def assert_exact(inputs, backend, **options):
    """No further from float64 than the plain way in the same dtype, plus a few roundings."""
    (ours, gradients), (exact, exact_gradients), (rounded, rounded_gradients) = both(
        inputs, backend, **options
    )
    dtype = inputs[0][0].dtype
    # In float64 the plain way rounds too.
    eps = (64 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
    found = [*vars(ours).values(), *gradients]
    rounded = [*vars(rounded).values(), *rounded_gradients]
    expected = [*vars(exact).values(), *exact_gradients]
    # The rank loss is a small difference of scores.
    size = max(1.0, exact.logp_scores.abs().max().item())
    for a, b, c in zip(found, rounded, expected, strict=True):
        assert a.isfinite().all()
        allowed = (b.double() - c).abs().max() + eps * max(size, c.abs().max().item())
        assert (a.double() - c).abs().max() <= allowed


def dtypes(backend):
    return [torch.float64, torch.float32] if backend == "torch" else [torch.float32, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("head", HEADS)
def test_heads_and_workspaces(backend, workspace_mb, head):
    for dtype in dtypes(backend):
        assert_exact(case(dtype=dtype), backend, head=head, workspace_mb=workspace_mb)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
def test_losses(backend, workspace_mb, loss):
    for dtype in dtypes(backend):
        inputs = case(dtype=dtype)
        if "reference_logps" in loss:
            num_responses = len(inputs[1][2])
            loss = loss | {"reference_logps": -9 * torch.rand(num_responses, device=DEVICE)}
        assert_exact(inputs, backend, loss=loss, workspace_mb=workspace_mb)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(
    groups=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    v=st.sampled_from([1, 63, 127, 129, 300]),
    workspace_mb=st.floats(1e-6, 0.1),
    seed=st.integers(0, 10**6),
)
def test_any_queries_and_any_workspace(backend, groups, v, workspace_mb, seed):
    inputs = case(groups, v=v, seed=seed, dtype=dtypes(backend)[0])
    assert_exact(inputs, backend, workspace_mb=workspace_mb)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4], ids=["flat", "peaked", "huge"])
def test_flat_peaked_and_huge_logits(backend, size):
    assert_exact(case(size=size, dtype=torch.float32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_far_below_the_largest_logit_of_a_high_cap(backend):
    """Its exponential underflows; its gradient must not."""
    assert_exact(case(size=30.0, dtype=torch.float32), backend, head={"softcap": 50.0})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
def test_a_bias_may_forbid_tokens(backend, workspace_mb):
    (hidden, weight, bias), (rows, targets, rewards), layout = case(v=300, dtype=torch.float32)
    with torch.no_grad():
        bias[:200] = float("-inf")  # whole chunks of nothing
    indices = (rows, 200 + targets % 100, rewards)
    out = linear_rrhf_loss(
        hidden, weight, *indices, bias=bias, backend=backend, workspace_mb=workspace_mb, **layout
    )
    expected = plain(hidden, weight, *indices, bias=bias, layout=layout).loss
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(out.loss, [hidden, weight]),
        torch.autograd.grad(expected, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [1.0, 0.5, -2.0, 0.0])
def test_any_upstream_gradient(backend, upstream):
    """It scales the gradient exactly, powers of two as they are."""
    for dtype in dtypes(backend):
        (hidden, weight, bias), indices, layout = case(dtype=dtype)
        tensors, gradients = [hidden, weight, bias], []
        for factor in (1.0, upstream):
            out = linear_rrhf_loss(
                hidden, weight, *indices, bias=bias, rank_weight=64.0, backend=backend, **layout
            )
            factor = torch.full_like(out.loss, factor)
            gradients.append(torch.autograd.grad(out.loss, tensors, factor))
        for one, found in zip(*gradients, strict=True):
            expected = (one.double() * upstream).to(one.dtype)
            assert one.any() and torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    (hidden, weight, bias), indices, layout = case(dtype=torch.float32)
    other = torch.stack([bias.detach(), bias.detach() + 1], 1)[:, 0].requires_grad_()
    strided = [torch.stack([t, t + 1], 1)[:, 0] for t in indices]
    expected = linear_rrhf_loss(hidden, weight, *indices, bias=bias, backend=backend, **layout)
    found = linear_rrhf_loss(hidden, weight, *strided, bias=other, backend=backend, **layout)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(
        torch.autograd.grad(found.loss, other)[0], torch.autograd.grad(expected.loss, bias)[0]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend):
    inputs = case((5, 6, 3), dtype=torch.float32)
    runs = [both(inputs, backend, workspace_mb=0.02)[0] for _ in range(2)]
    outputs = [[*vars(out).values(), *gradients] for out, gradients in runs]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_correctly_ranked_responses_get_a_gradient_of_exactly_zero(backend):
    """With SFT weight 0 and every pair in order, there is no gradient at all."""
    (hidden, weight, bias), (rows, targets, _), layout = case(dtype=torch.float32)
    logps = reference.linear_logprob(hidden, weight, rows, targets, bias=bias)
    scores = rrhf_loss(logps, torch.zeros(14, device=DEVICE), **layout).logp_scores
    out = linear_rrhf_loss(
        hidden, weight, rows, targets, scores, bias=bias, sft_weight=0, backend=backend, **layout
    )
    assert out.loss == 0 and (out.num_correct == out.num_pairs).all()
    assert not any(g.any() for g in torch.autograd.grad(out.loss, [hidden, weight, bias]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tensors_get_nothing(backend):
    (hidden, weight, bias), indices, layout = case(dtype=torch.float32)
    full = both(((hidden, weight, bias), indices, layout), backend)[0][1]
    for wanted in ([0], [1], [2], [0, 2]):
        tensors = [t.detach() for t in (hidden, weight, bias)]
        for i in wanted:
            tensors[i].requires_grad_()
        out = linear_rrhf_loss(*tensors[:2], *indices, bias=tensors[2], backend=backend, **layout)
        (out.loss * 3).backward()
        for i, tensor in enumerate(tensors):
            assert (tensor.grad is not None) == (i in wanted)
            if i in wanted:
                torch.testing.assert_close(tensor.grad, full[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_it_is_the_loss_of_the_log_probs(backend):
    (hidden, weight, bias), indices, layout = case(dtype=torch.float32)
    with torch.no_grad():
        out = linear_rrhf_loss(hidden, weight, *indices, bias=bias, backend=backend, **layout)
    expected = plain(hidden, weight, *indices, bias=bias, layout=layout)
    assert not out.loss.requires_grad
    for name, value in vars(expected).items():
        found = getattr(out, name).to(value.dtype)
        torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_taken_once(backend):
    (hidden, weight, bias), indices, layout = case(dtype=torch.float32)
    out = linear_rrhf_loss(hidden, weight, *indices, bias=bias, backend=backend, **layout)
    torch.autograd.grad(out.loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken only once"):
        torch.autograd.grad(out.loss, hidden)


def test_autocast_rounds_nothing():
    (hidden, weight, bias), indices, layout = case(dtype=torch.float32)
    runs = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = linear_rrhf_loss(hidden, weight, *indices, bias=bias, **layout)
        runs.append([out.loss, *torch.autograd.grad(out.loss, [hidden, weight, bias])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_triton
def test_a_weight_of_another_dtype():
    """Master weights in float32 under half-precision states, as in mixed-precision training."""
    (hidden, weight, bias), indices, layout = case(dtype=torch.float32)
    half = hidden.detach().half().requires_grad_()
    out = linear_rrhf_loss(half, weight, *indices, bias=bias, backend="triton", **layout)
    found = torch.autograd.grad(out.loss, [half, weight, bias])
    assert [g.dtype for g in found] == [torch.float16, torch.float32, torch.float32]
    loss = plain(hidden, weight, *indices, bias=bias, layout=layout).loss
    for a, b in zip(found, torch.autograd.grad(loss, [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_larger_than_the_workspace(backend):
    v, h = 4096, 16
    (hidden, weight, _), indices, layout = case((8,) * 20, h=h, v=v, dtype=torch.float32)
    num_edges = len(indices[0])
    with torch.profiler.profile(profile_memory=True) as profile:
        out = linear_rrhf_loss(hidden, weight, *indices, backend=backend, workspace_mb=1, **layout)
        torch.autograd.grad(out.loss, [hidden, weight])
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    largest = max(max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in events)
    assert 2**19 <= largest <= 2**20 < num_edges * v * 4 / 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    (hidden, weight, bias), (rows, targets, rewards), layout = case(dtype=torch.float32)
    tensors = [t.detach() for t in (hidden, weight, bias)]
    scales = torch.rand(14, device=DEVICE)
    options = (None, 1.0, "hinge", 1.0, 0.0, "sum", 1.0, 1.0, backend, 1.0)
    bounds = read_bounds(Layout(**layout), len(rows))
    given = [number for triple in bounds for number in triple]
    for flat, total in ((None, None), (given, None), (given, torch.ones_like(weight).detach())):
        arguments = (*tensors, total, rows, targets, rewards, *layout.values(), flat, *[scales] * 3)
        wants = (True, total is not None, True)
        torch.library.opcheck(linear_rrhf_op, (*arguments, *options, *wants))

    def loss(hidden, weight, bias):
        return linear_rrhf_loss(
            hidden, weight, rows, targets, rewards, bias=bias, backend=backend, **layout
        ).loss

    inputs = (hidden, weight, bias)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*inputs), inputs))


def test_bounds_change_nothing_and_wrong_ones_are_refused():
    (hidden, weight, _), indices, layout = case()
    bounds = read_bounds(Layout(**layout), len(indices[0]))
    expected = linear_rrhf_loss(hidden, weight, *indices, **layout).loss
    found = linear_rrhf_loss(hidden, weight, *indices, bounds=bounds, **layout).loss
    assert torch.equal(found, expected)
    for wrong, message in (
        (bounds[:-1], r"bounds: expected 5 triples from \(0, 0, 0\) to"),
        ([*bounds[:-1], (1, 2, 3)], "bounds: expected 5 triples"),
        ([*bounds[:2], bounds[1], *bounds[3:]], r"bounds\[2\]: expected \("),
    ):
        with pytest.raises(ValueError, match=message):
            linear_rrhf_loss(hidden, weight, *indices, bounds=wrong, **layout)


def test_edges_that_are_not_spans_are_refused():
    (hidden, weight, _), indices, layout = case()
    layout["path_edges"] = layout["path_edges"].flip(0)
    with pytest.raises(ValueError, match="path_edges: expected each query's edges to be one span"):
        linear_rrhf_loss(hidden, weight, *indices, **layout)
    for name, change, message in (
        ("path_edges", 50, r"path_edges: expected edges in \[0, "),
        ("group_offsets", 1, "group_offsets: expected offsets that rise from 0"),
    ):
        _, indices, layout = case()
        layout[name] = layout[name] + change
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            linear_rrhf_loss(hidden, weight, *indices, **layout)


@pytest.mark.parametrize(
    ("gibibytes", "mebibytes"), [(1, 128), (2, 128), (8, 512), (24, 1536), (80, 2048), (141, 2048)]
)
def test_the_workspace_is_a_share_of_the_device(gibibytes, mebibytes):
    assert workspace_for(gibibytes * 2**30) == mebibytes
