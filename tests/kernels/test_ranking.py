"""The ranking kernel against the float64 reference, and against its PyTorch counterpart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernel needs triton")

from rrhf_fast import reference, rrhf_loss
from rrhf_fast.losses import rrhf_triton as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 0.5, "margin": 0.3},
    {"sft_reduction": "mean", "rank_weight": 10.0},
    {"sft_weight": 0.0, "margin": 2.0},
    {"pair_loss": "logistic", "beta": 0.5, "margin": 0.4, "rank_reduction": "mean"},
    {"pair_loss": "squared", "beta": 2.0, "margin": 1.0},
]


def ragged(groups, seed=0, levels=3, longest=7):
    """Queries of k responses; few reward levels, so ties are common."""
    g = torch.Generator().manual_seed(seed)
    logps, rewards = [], []
    for k in groups:
        lengths = torch.randint(1, longest, (k,), generator=g).tolist()
        logps.append([-torch.rand(n, generator=g) * 3 for n in lengths])
        rewards.append(torch.randint(0, levels, (k,), generator=g).float())
    return logps, rewards


def packed(logps, rewards):
    flat = [logp for group in logps for logp in group]
    lengths = torch.tensor([len(logp) for logp in flat])
    sizes = torch.tensor([len(group) for group in logps])
    zero = torch.zeros(1, dtype=torch.int64)
    layout = {
        "rewards": torch.cat(rewards),
        "path_edges": torch.arange(int(lengths.sum())),
        "path_offsets": torch.cat([zero, lengths.cumsum(0)]),
        "group_offsets": torch.cat([zero, sizes.cumsum(0)]),
    }
    edges = torch.cat(flat).to(DEVICE).requires_grad_()
    return edges, {name: tensor.to(DEVICE) for name, tensor in layout.items()}


def assert_equal(edges, layout, options, tolerance=1e-5):
    """Compare every output and the gradient with PyTorch in float64."""
    ours = rrhf_loss(edges, **layout, **options, backend="triton")
    exact_edges = edges.detach().double().requires_grad_()
    exact = rrhf_loss(exact_edges, **layout, **options, backend="torch")
    for name, expected in vars(exact).items():
        actual = getattr(ours, name).to(expected.dtype)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(ours.loss, edges)
    (expected,) = torch.autograd.grad(exact.loss, exact_edges)
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)
    assert not gradient[expected == 0].any()  # exactly: the head skips these
    return gradient


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=25)
@given(groups=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_equals_the_reference(options, groups, seed):
    logps, rewards = ragged(groups, seed)
    edges, layout = packed(logps, rewards)
    g = torch.Generator().manual_seed(seed)
    before = [[-torch.rand(len(x), generator=g) for x in group] for group in logps]
    sums = torch.stack([x.sum() for group in before for x in group])
    assert_equal(edges, layout, options | {"reference_logps": sums.to(DEVICE)})
    assert_equal(edges, layout, options)
    parts = [
        reference.rrhf_loss([logp.double() for logp in group], r, **options)
        for group, r in zip(logps, rewards, strict=True)
    ]
    ours = rrhf_loss(edges, **layout, **options, backend="triton")
    expected = torch.stack([loss for loss, _, _ in parts]).mean()
    torch.testing.assert_close(ours.loss.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["hinge", "logistic", "squared"])
def test_more_responses_than_a_block_and_longer_ones_than_a_block(kind):
    logps, rewards = ragged([40, 2], levels=1000)
    logps[0][5] = -torch.rand(1000)
    options = {"margin": 0.1, "pair_loss": kind}
    assert_equal(*packed(logps, rewards), options, tolerance=1e-4)


@pytest.mark.slow
def test_a_thousand_responses():
    logps, rewards = ragged([1024], levels=10**6)
    assert_equal(*packed(logps, rewards), {}, tolerance=1e-3)


def test_shared_edges_are_summed():
    """Three responses a-b, a-c and a-b again: five path tokens on three edges."""
    edges = torch.tensor([-1.0, -0.5, -2.0], device=DEVICE, requires_grad=True)
    layout = {
        "rewards": torch.tensor([0.0, 2.0, 1.0]),
        "path_edges": torch.tensor([0, 1, 0, 2, 0, 1]),
        "path_offsets": torch.tensor([0, 2, 4, 6]),
        "group_offsets": torch.tensor([0, 3]),
    }
    layout = {name: tensor.to(DEVICE) for name, tensor in layout.items()}
    gradient = assert_equal(edges, layout, {})
    # c = (1, -2, 1), so the ranking part cancels on the edge shared by all.
    assert gradient.tolist() == [-1.0, 1.0, -2.0]


def test_only_the_order_of_rewards_counts_in_any_dtype():
    edges, layout = packed(*ragged([4, 3], levels=100))
    fine = layout | {"rewards": 1 + layout["rewards"].double() * 1e-12}  # float32 would merge them
    first, second = (
        torch.autograd.grad(rrhf_loss(edges, **kind, backend="triton").loss, edges)[0]
        for kind in (layout, fine)
    )
    assert torch.equal(first, second)


def test_gradients_of_the_parts():
    edges, layout = packed(*ragged([4, 3, 5]))
    g = torch.Generator().manual_seed(0)
    upstream = torch.randn(2, 3, generator=g).to(DEVICE)
    gradients = []
    for backend in ("triton", "torch"):
        out = rrhf_loss(edges, **layout, backend=backend)
        total = (torch.stack([out.rank_loss, out.sft_loss]) * upstream).sum()
        gradients.append(torch.autograd.grad(total, edges)[0])
    torch.testing.assert_close(*gradients)


def test_opcheck():
    edges, layout = packed(*ragged([4, 3]))
    scales = torch.rand(7, device=DEVICE)
    arguments = (edges, *layout.values(), scales, torch.ones_like(scales), torch.rand_like(scales))
    for kind in ("hinge", "logistic"):
        torch.library.opcheck(ops.rrhf_op, (*arguments, kind, 0.5, 0.1))
    _, _, _, slopes, best, *_ = ops.rrhf_op(edges.detach(), *arguments[1:], kind, 0.5, 0.1)
    upstream = torch.rand(2, 2, device=DEVICE).unbind(0)
    _, paths, offsets, groups = layout.values()
    backward = (*upstream, paths, offsets, groups, *arguments[5:], slopes, best)
    torch.library.opcheck(ops.rrhf_backward_op, (*backward, len(edges)))


def test_the_kernel_accepts_only_float32():
    edges, layout = packed(*ragged([2]))
    with pytest.raises(ValueError, match="logps: the kernel expects float32, found torch.float64"):
        rrhf_loss(edges.double(), **layout, backend="triton")
    with pytest.raises(ValueError, match='backend: expected "auto", "triton" or "torch"'):
        rrhf_loss(edges, **layout, backend="gpu")
