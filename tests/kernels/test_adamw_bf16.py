"""The AdamW kernel against torch.optim.AdamW in float64, and statistics of its rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernel needs triton")

from rrhf_fast.kernels import adamw_bf16 as kernel
from rrhf_fast.train import adamw_bf16 as eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROGRAM = 4 * kernel.BLOCK  # elements
# Largest distance between neighbours, relative to the number.
SPACING = torch.finfo(torch.bfloat16).eps
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
NAMES = {"step": 1, "index": 0, "seed": 0}


def tensors(n, dtype=torch.float32, seed=0):
    """Parameter, gradient and moments as in mid-run."""
    g = torch.Generator().manual_seed(seed)
    parameter, gradient, first = torch.randn(3, n, generator=g)
    second = torch.rand(n, generator=g)
    kinds = (dtype, dtype, torch.bfloat16, torch.bfloat16)
    parts = zip((parameter, gradient, first, second), kinds, strict=True)
    return [tensor.to(DEVICE, kind) for tensor, kind in parts]


def updated(before, grad_scale=None, **options):
    """Parameter and moments after the kernel."""
    after = [tensor.clone() for tensor in before]
    scale = None if grad_scale is None else torch.tensor(grad_scale, device=DEVICE)
    kernel.update(*after, scale, **(NAMES | OPTIONS | options))
    assert torch.equal(after[1], before[1])  # the gradient
    return after[0], after[2], after[3]


def exact(before, grad_scale, step, **options):
    """The same from torch.optim.AdamW in float64."""
    start, gradient, first, second = (tensor.double() for tensor in before)
    parameter = torch.nn.Parameter(start)
    optimizer = torch.optim.AdamW([parameter], **options)
    count = torch.tensor(float(step - 1))
    optimizer.state[parameter] = {"step": count, "exp_avg": first, "exp_avg_sq": second}
    parameter.grad = gradient / (grad_scale or 1)
    optimizer.step()
    return parameter.detach(), first, second


SIZES = [
    0,
    1,
    7,
    kernel.BLOCK,
    kernel.BLOCK + 1,
    PROGRAM - 1,
    PROGRAM,
    PROGRAM + 1,
    3 * PROGRAM + 5,
]


@settings(max_examples=40)
@given(
    n=st.sampled_from(SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    step=st.integers(1, 10_000),
    grad_scale=st.none() | st.floats(1, 1000, width=32),
    lr=st.floats(1e-6, 0.1),
    betas=st.tuples(st.floats(0, 0.95), st.floats(0.5, 0.9999)),
    weight_decay=st.sampled_from([0, 0.01, 1]),
    seed=st.integers(0, 2**64 - 1),
)
def test_an_update_equals_torchs(n, dtype, step, grad_scale, seed, **options):
    before = tensors(n, dtype)
    options = OPTIONS | options
    actual = updated(before, grad_scale, step=step, seed=seed, **options)
    expected = exact(before, grad_scale, step, **options)
    # A moment is one of its two bfloat16 neighbours; the first may suffer cancellation.
    sizes = before[2].abs() + before[1].abs()
    for moment, true in zip(actual[1:], expected[1:], strict=True):
        error = (moment.double() - true).abs()
        assert (error <= SPACING * true.abs() + 2**-21 * sizes).all()
    # Float32 rounds the decay, its product and the difference; then follows the parameter's dtype
    # (the interpreter truncates).
    largest = _largest_change(before, grad_scale, step, options)
    sizes = before[0].double().abs() + largest
    rounding = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps
    allowed = rounding * sizes + 2**-18 * largest + torch.finfo(dtype).smallest_normal
    assert ((actual[0].double() - expected[0]).abs() <= allowed).all()


def _largest_change(before, grad_scale, step, options):
    """Bound of a parameter's change, reached if its first moment and gradient have equal sign."""
    parameter, gradient, first, second = before
    zeros = torch.zeros_like(parameter)
    options = options | {"weight_decay": 0}
    return -exact([zeros, gradient.abs(), first.abs(), second], grad_scale, step, **options)[0]


@pytest.mark.parametrize("power", [-30, -3, 0, 5])
def test_without_rounding_it_equals_the_eager_update(power):
    """Powers of two: products, roots and moments need no rounding and are equal bit for bit."""
    unit = 2.0**power
    signs = torch.tensor([1.0, -1.0, 2.0, 0.5]).repeat_interleave(8)
    gradient = unit * signs
    first = unit * torch.tensor([0.0, 1.0, -2.0, 4.0, 0.0, -0.5, 8.0, -1.0]).repeat(4)
    second = gradient.square() * torch.tensor([0.0, 3.0]).repeat(16)
    parameter = torch.linspace(-1, 1, 33)[:-1]
    before = [parameter, gradient, first.bfloat16(), second.bfloat16()]
    before = [tensor.to(DEVICE) for tensor in before]
    options = {"lr": 2.0**-6, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.5}
    actual = updated(before, grad_scale=2.0, **options)
    after = [tensor.clone() for tensor in before]
    eager._update(*after, torch.tensor(2.0, device=DEVICE), 1, options)
    # A GPU approximates roots and quotients, so the parameter may be off by a bit.
    bits = 0 if DEVICE == "cpu" else 1e-6
    torch.testing.assert_close(actual[0], after[0], rtol=bits, atol=bits)
    assert (actual[0] != parameter.to(DEVICE)).any()
    assert torch.equal(actual[1], after[2]) and torch.equal(actual[2], after[3])


def stored(count, **names):
    """`count` moments after an update of 1.25 by a gradient of 0."""
    one = torch.ones(count, device=DEVICE)
    before = [one, 0 * one, 1.25 * one.bfloat16(), 1.25 * one.bfloat16()]
    return updated(before, betas=(1 - 2**-9, 1 - 2**-10), **names)[1:]


@pytest.mark.parametrize("varying", ["place", "seed", "step", "index"])
def test_rounding_is_unbiased(varying):
    """Whatever varies. 1.25 times 1 - 2**-9 and 1 - 2**-10 lie 31 % and 16 % of the way from 1.25
    to its neighbour below."""
    values = [0] if varying == "place" else range(40)
    per_value = 40_000 // len(values)
    samples = [
        stored(per_value, **({} if varying == "place" else {varying: value + 1}))
        for value in values
    ]
    first, second = (torch.cat(parts).double() for parts in zip(*samples, strict=True))
    went_down = []
    for moments, beta in ((first, 1 - 2**-9), (second, 1 - 2**-10)):
        true, gap = 1.25 * beta, 2.0**-7
        share = (1.25 - true) / gap
        assert set(moments.tolist()) == {1.25, 1.25 - gap}
        # Five standard deviations of the mean.
        allowed = 5 * gap * (share * (1 - share) / len(moments)) ** 0.5
        assert abs(moments.mean().item() - true) < allowed
        went_down.append((moments < 1.25, share))
    # The two moments' bits are independent, and so are two neighbours'.
    (one, p), (other, q) = went_down
    for a, b, share in ((one, other, p * q), (one[1:], one[:-1], p * p)):
        both = (a & b).double().mean().item()
        assert abs(both - share) < 5 * (share * (1 - share) / len(a)) ** 0.5


def test_moments_that_rounding_to_nearest_would_freeze_do_move():
    assert (torch.tensor(1.0).bfloat16() * 0.999).item() == 1.0
    n, steps = 4096, 50
    parameter, gradient, first, second = (torch.ones(n, device=DEVICE) for _ in range(4))
    before = [parameter, 0 * gradient, first.bfloat16(), second.bfloat16()]
    for step in range(1, steps + 1):
        _, before[2], before[3] = updated(before, step=step, betas=(0.999, 0.999))
    # The rounding of one step deviates by at most half the spacing below 1, 2**-8.
    allowed = 5 * (steps / n) ** 0.5 * 2**-9
    for moment in before[2:]:
        assert abs(moment.double().mean().item() - 0.999**steps) < allowed


def test_same_seed_same_bits():
    before = tensors(PROGRAM + 100)
    reference = updated(before)
    for same, other in zip(reference, updated(before), strict=True):
        assert torch.equal(same, other)
    # The parameter is computed from the moments before rounding.
    options = [{"seed": 1}, {"seed": 2**32}, {"seed": 2**63}, {"index": 1}]
    for names in options:
        actual = updated(before, **names)
        assert torch.equal(actual[0], reference[0])
        for moment, first in zip(actual[1:], reference[1:], strict=True):
            # Independent roundings differ in a third of all elements, on average.
            assert 0.2 < (moment != first).double().mean() < 0.5
    one = torch.ones(4 * PROGRAM, device=DEVICE)
    moments = updated([one, one / 3, one.bfloat16(), one.bfloat16()])[1].view(4, PROGRAM)
    assert len({tuple(row.tolist()) for row in moments}) == 4  # of four programs


@pytest.mark.parametrize("n", [1, 100, PROGRAM + 3])
@pytest.mark.parametrize("start", [1, 3])
def test_views_at_any_offset_leave_their_surroundings_alone(n, start):
    before = tensors(n)
    buffers = [tensor.new_full((start + n + 50,), 7.0) for tensor in before]
    views = [buffer[start : start + n] for buffer in buffers]
    for view, tensor in zip(views, before, strict=True):
        view.copy_(tensor)
    kernel.update(*views, None, **NAMES, **OPTIONS)
    expected = updated(before)
    for view, tensor in zip([views[0], *views[2:]], expected, strict=True):
        assert torch.equal(view, tensor)
    for buffer in buffers:
        assert (buffer[:start] == 7).all() and (buffer[start + n :] == 7).all()


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 3, 4), (0, 4)])
def test_shapes(shape):
    flat = tensors(max(1, torch.Size(shape).numel()))
    flat = [tensor[: torch.Size(shape).numel()] for tensor in flat]
    for actual, expected in zip(
        updated([tensor.view(shape) for tensor in flat]), updated(flat), strict=True
    ):
        assert torch.equal(actual.flatten(), expected)
