"""Scaling by a scalar on the device: on a GPU, or under Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernel needs triton")

from rrhf_fast.kernels import scale as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, 0.3, 0.0, float("nan")])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 129), (128, 96)], ids=str)
def test_values_are_multiplied_in_place(monkeypatch, dtype, factor, shape):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # fewer than the blocks of the largest
    factor = torch.tensor(factor, device=DEVICE)
    room = torch.randn(torch.Size(shape).numel() + 1, device=DEVICE).to(dtype)
    values, before = room[:-1].view(shape), room.clone()
    kernels.scale(values, factor)
    expected = before[:-1].view(shape) * factor
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert room[-1] == before[-1]  # memory beyond the view is untouched


@pytest.mark.parametrize("factor, written", [(1.0, False), (0.5, True)])
def test_a_factor_of_one_writes_nothing(factor, written):
    """Bit for bit: a product would change a signalling NaN."""
    bits = torch.full((5000,), 0x7F800001, dtype=torch.int32, device=DEVICE)
    values = bits.clone().view(torch.float32)
    kernels.scale(values, torch.tensor(factor, device=DEVICE))
    assert torch.equal(values.view(torch.int32), bits) != written


def test_values_in_another_order_are_multiplied_too():
    values = torch.randn(90, 70, device=DEVICE).t()
    expected = values * 3
    kernels.scale(values, torch.tensor(3.0, device=DEVICE))
    assert torch.equal(values, expected)
