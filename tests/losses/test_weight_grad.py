"""The gradient of the head's weight, added where it is wanted instead of made apart."""

import pytest
import torch

from rrhf_fast.losses import linear_rrhf_loss
from tests.losses.test_linear_rrhf import BACKENDS, HEADS, WORKSPACES, case


def largest_new_tensors(run) -> int:
    """Bytes of the largest tensor that `run` makes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    return max(max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in events)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("head", HEADS[::3], ids=str)
def test_it_is_added_to_what_is_there(backend, workspace_mb, head):
    dtype = torch.float64 if backend == "torch" else torch.float32
    (hidden, weight, bias), indices, layout = case(dtype=dtype)
    options = {"bias": bias, "backend": backend, "workspace_mb": workspace_mb, **head, **layout}
    expected = torch.autograd.grad(
        linear_rrhf_loss(hidden, weight, *indices, **options).loss, [hidden, weight, bias]
    )
    before = torch.randn_like(weight).detach()
    total = before.clone()
    out = linear_rrhf_loss(hidden, weight, *indices, weight_grad=total, **options)
    found = torch.autograd.grad(out.loss, [hidden, weight, bias], allow_unused=True)
    assert found[1] is None
    torch.testing.assert_close(total - before, expected[1], atol=1e-5 if head else 1e-6, rtol=1e-5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensor_of_its_size_is_made(backend):
    (hidden, weight, _), indices, layout = case(h=64, v=4096, dtype=torch.float32)
    total = torch.zeros_like(weight).detach()
    options = {"backend": backend, "workspace_mb": 0.25, **layout}

    def backward(weight_grad=None):
        linear_rrhf_loss(
            hidden, weight, *indices, weight_grad=weight_grad, **options
        ).loss.backward()

    assert largest_new_tensors(lambda: backward(total)) <= 2**18
    assert largest_new_tensors(backward) == 4096 * 64 * 4


def test_what_it_cannot_be():
    (hidden, weight, _), indices, layout = case(dtype=torch.float32)
    for total in (weight.new_zeros(150, 15), weight.new_zeros(150, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"weight_grad: expected \[150, 16\] torch.float32, f"):
            linear_rrhf_loss(hidden, weight, *indices, weight_grad=total, **layout)
    out = linear_rrhf_loss(
        hidden, weight, *indices, weight_grad=torch.zeros_like(weight).detach(), **layout
    )
    with pytest.raises(RuntimeError, match="of its loss itself, found its gradient to be 0.5"):
        (out.loss / 2).backward()
