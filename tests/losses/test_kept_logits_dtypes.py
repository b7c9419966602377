"""Products of the head's backward are rounded to 16 bits only where that is faster."""

import pytest
import torch

from rrhf_fast.losses import linear_rrhf_loss


def weight_gradient(hidden, weight):
    """One query of three responses of two tokens each; the first is ranked wrong."""
    weight = weight.clone().requires_grad_()
    linear_rrhf_loss(
        hidden, weight, torch.arange(6), torch.arange(6) * 3,
        rewards=torch.tensor([0.0, 1.0, 2.0]), path_edges=torch.arange(6),
        path_offsets=torch.tensor([0, 2, 4, 6]), group_offsets=torch.tensor([0, 3]),
    ).loss.backward()  # fmt: skip
    return weight.grad.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_fast", [False, True])
def test_the_gradient_of_the_weight_against_float64(dtype, is_fast, monkeypatch):
    if not is_fast:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16).to(dtype), torch.randn(40, 16)
    exact = weight_gradient(hidden.double(), weight.double())
    error = (weight_gradient(hidden, weight) - exact).norm() / exact.norm()
    is_rounded = is_fast and dtype == torch.bfloat16
    assert error < (1e-2 if is_rounded else 1e-5)
