"""The chunked head against log_softmax in float64: values, all gradients, no [E, V] tensor."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rrhf_fast import reference
from rrhf_fast.losses import linear_logprob

HEADS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 2.0, "logit_scale": 1.7},
]
TINY_WORKSPACE = 1 / 2**10  # MiB: 1 kB, so that even small vocabularies take many chunks


def inputs(n=7, h=16, v=37, e=19, dtype=torch.float64, bias=False, size=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64) * size
    weight = torch.randn(v, h, generator=g, dtype=torch.float64)
    tensors = [hidden, weight] + (
        [torch.randn(v, generator=g, dtype=torch.float64)] if bias else []
    )
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    rows = torch.randint(0, n, (e,), generator=g)
    targets = torch.randint(0, v, (e,), generator=g)
    upstream = torch.randn(e, generator=g, dtype=torch.float64)
    return tensors, rows, targets, upstream


def run(function, tensors, rows, targets, upstream, **options):
    hidden, weight, *bias = tensors
    out = function(hidden, weight, rows, targets, bias=bias[0] if bias else None, **options)
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype), allow_unused=True)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("workspace_mb", [TINY_WORKSPACE, 64])
def test_equals_reference_in_float64(head, bias, workspace_mb):
    case = inputs(bias=bias)
    ours = run(linear_logprob, *case, **head, workspace_mb=workspace_mb)
    theirs = run(reference.linear_logprob, *case, **head)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("v", "e", "n"), [(1, 3, 2), (127, 1, 1), (129, 300, 5), (50, 0, 4)])
def test_odd_sizes(v, e, n):
    case = inputs(v=v, e=e, n=n, bias=True)
    ours = run(linear_logprob, *case, workspace_mb=TINY_WORKSPACE)
    theirs = run(reference.linear_logprob, *case)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_exact_than_plain_torch_in_the_same_dtype(dtype):
    case = inputs(n=20, h=64, v=999, e=64, dtype=dtype)
    exact_case = ([t.detach().double().requires_grad_() for t in case[0]], *case[1:])
    exact = run(reference.linear_logprob, *exact_case)
    plain = run(reference.linear_logprob, *case)
    ours = run(linear_logprob, *case, workspace_mb=TINY_WORKSPACE)
    assert ours[0].dtype == torch.float32
    eps = 4 * torch.finfo(dtype).eps  # per element, of the tensor's scale
    for a, b, c in zip(ours, plain, exact, strict=True):
        allowed = (b.double() - c).abs() + eps * c.abs().max()
        assert ((a.double() - c).abs() <= allowed).all()


def test_large_logits_do_not_overflow():
    case = inputs(size=1e4, dtype=torch.float32)
    ours = run(linear_logprob, *case, workspace_mb=TINY_WORKSPACE)
    assert all(t.isfinite().all() for t in ours)


def test_autocast_does_not_round_the_logits():
    (hidden, weight), rows, targets, _ = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprob(hidden, weight, rows, targets)
    assert torch.equal(inside, linear_logprob(hidden, weight, rows, targets))


def test_zero_rows_cost_nothing_and_frozen_tensors_get_nothing():
    (hidden, weight), rows, targets, upstream = inputs()
    upstream[::2] = 0
    out = linear_logprob(hidden, weight, rows, targets)
    with Shapes() as seen:
        ours = torch.autograd.grad(out, [hidden, weight], upstream)
    active = int((upstream != 0).sum())
    assert (active, weight.shape[0]) in seen.shapes  # logits of the active rows only
    assert (len(rows), weight.shape[0]) not in seen.shapes
    theirs = torch.autograd.grad(
        reference.linear_logprob(hidden, weight, rows, targets), [hidden, weight], upstream
    )
    torch.testing.assert_close(ours, theirs)

    frozen = weight.detach()
    out = linear_logprob(hidden, frozen, rows, targets)
    with Shapes() as seen:
        out.backward(upstream)
    assert frozen.grad is None and tuple(weight.shape) not in seen.shapes

    out = linear_logprob(hidden, weight, rows, targets)
    assert not any(g.any() for g in torch.autograd.grad(out, [hidden, weight], upstream * 0))


def test_never_holds_logits_of_the_whole_vocabulary():
    case = inputs(n=64, h=16, v=4096, e=256, dtype=torch.float32)
    with Shapes() as seen:
        run(linear_logprob, *case, workspace_mb=1)
    largest = max(rows * columns for rows, columns in seen.shapes if rows == 256 or columns == 256)
    assert largest <= 2**20 / 4 < 256 * 4096 / 2


def test_gradcheck():
    (hidden, weight, bias), rows, targets, _ = inputs(n=3, h=8, v=11, e=5, bias=True)
    for head in HEADS:
        assert torch.autograd.gradcheck(
            lambda h, w, b, head=head: linear_logprob(
                h, w, rows, targets, bias=b, workspace_mb=TINY_WORKSPACE, **head
            ),
            (hidden, weight, bias),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(5, 3)},
            r"hidden, weight: expected .* found \(7, 16\) and \(5, 3\)",
        ),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"rows, targets: .* \(19,\) and \(3,\)"),
        (
            {"targets": torch.full((19,), -100)},
            r"targets: expected .*\[0, 37\), found -100 to -100",
        ),
        ({"bias": torch.zeros(2)}, r"bias: expected \(37,\), found \(2,\)"),
    ],
)
def test_shapes_are_checked(change, message):
    (hidden, weight), rows, targets, _ = inputs()
    arguments = {"hidden": hidden, "weight": weight, "rows": rows, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


class Shapes(TorchDispatchMode):
    """Records the shape of every matrix that an operator makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        is_matrix = isinstance(out, torch.Tensor) and out.dim() == 2
        if is_matrix and out.untyped_storage().data_ptr() not in storages:  # no view, not in place
            self.shapes.add(tuple(out.shape))
        return out
