"""The head's kernels against log_softmax in float64: on a GPU, or under Triton's interpreter.

The interpreter truncates bfloat16, so it runs float32 and float16 only.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from rrhf_fast import reference
from rrhf_fast.kernels import linear_logprob as kernels
from rrhf_fast.losses import linear_logprob
from rrhf_fast.losses import linear_logprob_triton as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = 1 / 2**10  # MiB: many slices of the vocabulary, even of a small one
HEADS = [{}, {"softcap": 3.0}, {"logit_scale": 0.25}, {"softcap": 2.0, "logit_scale": 1.7}]


def case(n=7, h=16, v=150, e=19, dtype=torch.float32, bias=True, size=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, h), (v, h)] + ([(v,)] if bias else [])
    tensors = [torch.randn(shape, generator=g) for shape in shapes]
    tensors[0] *= size
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in tensors]
    rows = torch.randint(0, n, (e,), generator=g).to(DEVICE)
    targets = torch.randint(0, v, (e,), generator=g).to(DEVICE)
    upstream = torch.randn(e, generator=g).to(DEVICE)
    return tensors, rows, targets, upstream


def run(function, tensors, rows, targets, upstream, **options):
    hidden, weight, *bias = tensors
    out = function(hidden, weight, rows, targets, bias=bias[0] if bias else None, **options)
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def exact(inputs, **head):
    tensors = [t.detach().double().requires_grad_() for t in inputs[0]]
    return run(reference.linear_logprob, tensors, *inputs[1:], **head)


def check(inputs, workspace_mb=None, **head):
    """Errors against float64 exceed those of plain torch in the same dtype by a few roundings."""
    dtype = inputs[0][0].dtype
    ours = run(linear_logprob, *inputs, backend="triton", workspace_mb=workspace_mb, **head)
    plain = run(reference.linear_logprob, *inputs, **head)
    assert ours[0].dtype == torch.float32
    eps = 8 * torch.finfo(dtype).eps
    for a, b, c in zip(ours, plain, exact(inputs, **head), strict=True):
        assert a.isfinite().all()
        allowed = (b.double() - c).abs() + eps * max(1.0, c.abs().max().item() if c.numel() else 1)
        assert ((a.double() - c).abs() <= allowed).all()


@pytest.fixture(params=[True, False], ids=["tma", "pointers"])
def loads(request, monkeypatch):
    """Both ways to load a tile, whichever the device uses."""
    choose = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *key: replace(choose(*key), tma=request.param))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("loads")
def test_heads(dtype, head, bias):
    check(case(dtype=dtype, bias=bias), **head)


# One more and one less than a tile of 64 or 128, a vocabulary of one token, a remainder like that
# of GPT-2's 50,257, a single edge, more edges than a tile.
@pytest.mark.parametrize("v", [1, 63, 127, 129, 401])
@pytest.mark.parametrize("e", [1, 65])
@pytest.mark.parametrize("h", [8, 40])
@pytest.mark.usefixtures("loads")
def test_odd_sizes(v, e, h):
    check(case(n=5, h=h, v=v, e=e), workspace_mb=TINY)


def test_no_edges():
    inputs = case(e=0)
    out, *gradients = run(linear_logprob, *inputs, backend="triton")
    assert out.shape == (0,) and not any(g.any() for g in gradients)


@pytest.mark.parametrize("size", [0.0, 30.0, 1e4], ids=["flat", "peaked", "huge"])
def test_flat_peaked_and_huge_logits(size):
    check(case(size=size, bias=False))


def test_a_bias_may_forbid_tokens():
    tensors, rows, targets, upstream = case(v=200)
    with torch.no_grad():
        tensors[2][70:] = float("-inf")  # whole tiles of -inf
    targets = targets % 70
    hidden, weight, bias = tensors
    arguments = (hidden, weight, rows, targets)
    out = linear_logprob(*arguments, bias=bias, backend="triton")
    torch.testing.assert_close(out, reference.linear_logprob(*arguments, bias=bias))
    gradients = torch.autograd.grad(out, tensors, upstream)
    assert all(g.isfinite().all() for g in gradients) and not gradients[2][70:].any()


def test_edges_without_gradient_are_skipped():
    inputs = case(e=70)
    inputs[3][::2] = 0
    check(inputs)
    inputs[3][:] = 0
    _, *gradients = run(linear_logprob, *inputs, backend="triton")
    assert not any(g.any() for g in gradients)


def test_rows_that_occur_often_are_summed():
    tensors, rows, targets, upstream = case(e=90)
    check((tensors, torch.zeros_like(rows), targets, upstream))


def test_frozen_tensors_get_no_gradient():
    (hidden, weight, bias), rows, targets, upstream = case()
    for wanted in ([hidden], [weight], [bias], [hidden, bias]):
        frozen = [t if any(t is w for w in wanted) else t.detach() for t in (hidden, weight, bias)]
        out = linear_logprob(*frozen[:2], rows, targets, bias=frozen[2], backend="triton")
        gradients = torch.autograd.grad(out, wanted, upstream)
        full = run(reference.linear_logprob, [hidden, weight, bias], rows, targets, upstream)[1:]
        expected = [
            g
            for g, t in zip(full, (hidden, weight, bias), strict=True)
            if any(t is w for w in wanted)
        ]
        torch.testing.assert_close(gradients, tuple(expected), rtol=1e-4, atol=1e-5)


def test_two_runs_agree_bit_for_bit():
    inputs = case(e=90, v=300)
    first, second = (run(linear_logprob, *inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_weight_of_another_dtype():
    """Master weights in float32 under half-precision states, as in mixed-precision training."""
    (hidden, weight), rows, targets, upstream = case(bias=False)
    half = hidden.detach().half().requires_grad_()
    out = linear_logprob(half, weight, rows, targets, backend="triton")
    d_hidden, d_weight = torch.autograd.grad(out, [half, weight], upstream)
    assert (out.dtype, d_hidden.dtype, d_weight.dtype) == (
        torch.float32,
        torch.float16,
        torch.float32,
    )
    expected = run(reference.linear_logprob, [hidden, weight], rows, targets, upstream)
    for a, b in zip((out, d_hidden, d_weight), expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)


def test_gradients_agree_with_finite_differences():
    (hidden, weight, bias), rows, targets, upstream = case(n=3, h=8, v=11, e=5)

    def loss(*tensors):
        out = linear_logprob(*tensors[:2], rows, targets, bias=tensors[2], backend="triton")
        return (out * upstream).sum()

    gradients = torch.autograd.grad(loss(hidden, weight, bias), (hidden, weight, bias))
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        steps = [
            torch.randn(t.shape, generator=g).to(DEVICE) * 1e-2 for t in (hidden, weight, bias)
        ]
        plus, minus = (
            loss(*(t + sign * s for t, s in zip((hidden, weight, bias), steps, strict=True)))
            for sign in (1, -1)
        )
        slope = sum((d * s).sum() for d, s in zip(gradients, steps, strict=True))
        torch.testing.assert_close((plus - minus) / 2, slope, rtol=1e-2, atol=1e-4)


def test_nothing_as_large_as_the_logits_is_allocated():
    e, v = 256, 4096
    inputs = case(n=64, h=16, v=v, e=e)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(linear_logprob, *inputs, backend="triton", workspace_mb=1)
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    used = [(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in events]
    largest = max(max(pair) for pair in used)
    assert 2**19 <= largest <= 2**20  # the slice of dlogits, in bytes
    assert largest < e * v * 4 / 2


def test_opcheck():
    (hidden, weight, bias), rows, targets, upstream = case(n=3, h=8, v=11, e=5)
    arguments = (hidden, weight, bias, rows, targets, 3.0, 0.5, 1.0)
    torch.library.opcheck(ops.linear_logprob_op, arguments)
    _, lse = ops.linear_logprob_op(*arguments)
    backward = (upstream, lse.detach(), *(t.detach() for t in (hidden, weight, bias)))
    backward += (*arguments[3:], True, True, True)
    torch.library.opcheck(ops.linear_logprob_backward_op, backward)


def test_compile_has_no_graph_break():
    tensors, rows, targets, _ = case()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden, weight, bias):
        return linear_logprob(hidden, weight, rows, targets, bias=bias, backend="triton").sum()

    compiled = torch.autograd.grad(loss(*tensors), tensors)
    eager = linear_logprob(*tensors[:2], rows, targets, bias=tensors[2], backend="triton").sum()
    torch.testing.assert_close(compiled, torch.autograd.grad(eager, tensors))


@pytest.mark.parametrize(
    ("h", "dtype", "message"),
    [
        (12, torch.float32, r"hidden: the kernels expect H to be a multiple of 8, found \(7, 12\)"),
        (
            16,
            torch.float64,
            "hidden: the kernels take bfloat16, float16 and float32, found torch.f",
        ),
    ],
)
def test_unsupported_inputs_are_refused(h, dtype, message):
    (hidden, weight), rows, targets, _ = case(h=h, dtype=dtype, bias=False)
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, weight, rows, targets, backend="triton")
    assert linear_logprob(hidden, weight, rows, targets).isfinite().all()  # auto takes torch
    with pytest.raises(ValueError, match='backend: expected "auto", "triton" or "torch"'):
        linear_logprob(hidden, weight, rows, targets, backend="cuda")
