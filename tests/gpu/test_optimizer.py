"""The optimizer on a GPU: its kernel against the eager update, and synchronisations per step."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the kernel needs triton")

from rrhf_fast import TrainConfig
from rrhf_fast.kernels import adamw_bf16 as kernel
from rrhf_fast.train import adamw_bf16
from rrhf_fast.train import step as one_step
from rrhf_fast.train.adamw_bf16 import AdamWBF16
from rrhf_fast.train.distributed import World
from rrhf_fast.train.optimizer import build_optimizer
from rrhf_fast.train.progress import Progress

pytestmark = pytest.mark.gpu

SHAPES = {
    "matrix": lambda: torch.randn(1000, 777),
    "number": lambda: torch.randn(()),
    "nothing": lambda: torch.randn(0, 4),
    "unaligned": lambda: torch.randn(10_002)[1:],
    "transposed": lambda: torch.randn(300, 200).t(),
}


def stepped(kind, dtype):
    """A parameter before and after one step in mid-run, and its moments."""
    torch.manual_seed(0)
    start = SHAPES[kind]().to("cuda", dtype)
    if kind == "unaligned":  # a copy to the device is aligned
        start = torch.cat([start[:1], start])[1:]
    parameter, start = nn.Parameter(start), start.clone()
    optimizer = AdamWBF16([parameter], lr=0.1, weight_decay=0.1)
    parameter.grad = torch.zeros_like(parameter).copy_(torch.randn(parameter.shape))
    moments = [torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in range(2)]
    moments[0].copy_(torch.randn(parameter.shape))
    moments[1].copy_(torch.rand(parameter.shape))
    names = ("exp_avg", "exp_avg_sq")
    optimizer.state[parameter] = {
        "step": torch.tensor(4.0),
        **dict(zip(names, moments, strict=True)),
    }
    optimizer.grad_scale = torch.full((), 3.0, device="cuda")
    optimizer.step()
    return start, parameter.detach(), moments


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_the_eager_update_up_to_rounding(kind, dtype, monkeypatch):
    start, updated, moments = stepped(kind, dtype)
    again = stepped(kind, dtype)
    for one, other in zip([updated, *moments], [again[1], *again[2]], strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(adamw_bf16, "HAS_TRITON", False)
    _, expected, others = stepped(kind, dtype)
    assert not updated.numel() or (updated != start).any()
    start, updated, expected = start.double(), updated.double(), expected.double()
    change = (expected - start).abs()
    # The eager update rounds to the parameter's dtype twice.
    allowed = 2 * torch.finfo(dtype).eps * (start.abs() + change) + 1e-5 * (change + 0.1)
    assert ((updated - expected).abs() <= allowed).all()
    spacing = torch.finfo(torch.bfloat16).eps
    for ours, theirs in zip(moments, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=spacing, atol=1e-6)


def test_one_kernel_for_all_steps_rates_and_sizes():
    parameters = [nn.Parameter(torch.randn(n, device="cuda")) for n in (1, 16, 5000, 4096 * 16)]
    optimizer = AdamWBF16(parameters, lr=1e-2)
    compiled = set()
    for step in range(20):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.param_groups[0]["lr"] = 1.0 / (step + 1)
        if step % 2:
            optimizer.grad_scale = torch.full((), 2.0, device="cuda")
        else:
            optimizer.grad_scale = None
        optimizer.step()
        (cache, *_) = kernel.update_kernel.device_caches[torch.cuda.current_device()]
        compiled.add(len(cache))
    assert len(compiled) == 1


def test_offsets_beyond_32_bits():
    n = 2**31 + 5000
    parameter = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    parameter.grad = torch.full_like(parameter, -2.0)
    optimizer = AdamWBF16([parameter], lr=0.5)
    optimizer.step()
    assert parameter.min() == parameter.max() == 1.5
    assert optimizer.state[parameter]["exp_avg"][-5000:].float().mean().item() < -0.19


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_a_step_waits_once(dtype, max_grad_norm, monkeypatch):
    """After its backward, which is not tested here."""
    config = TrainConfig(optimizer_state_dtype=dtype, max_grad_norm=max_grad_norm, active_set="off")
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 3)).cuda()
    model.device = torch.device("cuda")
    run = SimpleNamespace(model=model, world=World(model.device), config=config)

    def backward(model, batch, config, world, totals):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        totals.sums += torch.arange(1, len(totals.sums) + 1, device="cuda")
        torch.cuda.set_sync_debug_mode("warn")

    monkeypatch.setattr(one_step, "backward_whole", backward)
    optimizer, _ = build_optimizer(model, config, 10)
    signals = SimpleNamespace(stop=False, hold=lambda: None)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):  # the first creates the optimizer's state
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                totals, norm, problem = one_step.take_step(
                    run, None, optimizer, step, Progress(), signals
                )
                totals.means(), totals.num_tokens, totals.flagged, totals.active_fraction
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # Enabling the mode also warns that it misses some cases.
        waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        assert problem is None and norm > 0 and len(waits) <= 1, waits
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
