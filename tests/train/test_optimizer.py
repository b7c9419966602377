"""Optimizers with low-precision state, against torch.optim.AdamW."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rrhf_fast import TrainConfig
from rrhf_fast.train import adamw_bf16
from rrhf_fast.train.adamw_bf16 import AdamWBF16, round_at_random
from rrhf_fast.train.distributed import whole
from rrhf_fast.train.optimizer import build_optimizer, clipped_step


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "kernel"])
def way(request, monkeypatch):
    """The implementation of AdamWBF16's update. Without a GPU, the kernel is interpreted."""
    if request.param == "kernel":
        pytest.importorskip("triton", reason="the kernel needs triton")
        monkeypatch.setattr(adamw_bf16, "_kernel_takes", lambda *tensors: True)
    return request.param


def trained(config, *, num_steps=30):
    """A layer after some steps towards a target, and its optimizer."""
    torch.manual_seed(1)
    model = nn.Linear(64, 64)
    inputs, targets = torch.randn(2, 256, 64)
    optimizer, schedule = build_optimizer(model, config, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(float(schedule.get_last_lr()[0]))
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, optimizer, rates


LOW_BITS = [
    {"optimizer_state_dtype": "bfloat16"},
    pytest.param({"optim": "adamw_8bit"}, marks=pytest.mark.slow),  # compiles its step
]


@pytest.mark.parametrize("options", LOW_BITS)
def test_low_precision_follows_the_same_path(options):
    if "optim" in options:
        pytest.importorskip("torchao")
    shared = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 3}
    exact, _, rates = trained(TrainConfig(**shared))
    ours, optimizer, our_rates = trained(TrainConfig(**shared, **options))
    assert our_rates == pytest.approx(rates)
    assert all(g["initial_lr"] == pytest.approx(1e-2) for g in optimizer.param_groups)
    torch.manual_seed(1)
    start = nn.Linear(64, 64)
    way = exact.weight - start.weight
    assert (ours.weight - exact.weight).norm() < 0.1 * way.norm()
    assert ours.weight.dtype == torch.float32
    state = optimizer.state[ours.weight]
    for moment in (state["exp_avg"], state["exp_avg_sq"]):
        if "optim" in options:
            assert type(moment).__name__ == "OptimState8bit"
        else:
            assert moment.dtype == torch.bfloat16


def test_weight_decay_applies_only_to_matrices():
    for options in ({}, {"optimizer_state_dtype": "bfloat16"}):
        config = TrainConfig(weight_decay=0.5, **options)
        optimizer, _ = build_optimizer(nn.Linear(3, 2), config, 10)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_stochastic_rounding_is_unbiased_and_returns_a_neighbour():
    x = torch.tensor([1.0, -1.0, 1.0 + 2**-9, -3.1415927, 1e-30, 0.0, 65504.3])
    samples = torch.stack([round_at_random(x) for _ in range(4000)])
    assert samples.dtype == torch.bfloat16
    samples = samples.double()
    spacing = torch.finfo(torch.bfloat16).eps * x.abs().double()
    assert ((samples - x.double()).abs() <= spacing).all()
    # Five standard deviations of the mean of 4000.
    error = (samples.mean(0) - x.double()).abs()
    assert (error <= 5 * spacing / (2 * 4000**0.5)).all()
    assert (samples[:, [0, 1, 5]] == x[[0, 1, 5]].double()).all()


def test_a_second_moment_decays(way):
    """Rounded to nearest, it would be frozen: 0.999 of a number rounds to that number."""
    assert (torch.tensor(1.0).bfloat16() * 0.999).item() == 1.0
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = AdamWBF16([parameter], lr=1e-3)
    for step in range(300):
        parameter.grad = torch.full_like(parameter, 100.0 if step == 0 else 0.0)
        optimizer.step()
    moment = optimizer.state[parameter]["exp_avg_sq"].double().mean().item()
    assert moment == pytest.approx(100**2 * 0.001 * 0.999**299, rel=0.01)


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (4, 2, 3)])
def test_an_update_by_parts_equals_an_update(shape, monkeypatch):
    monkeypatch.setattr(adamw_bf16, "round_at_random", torch.Tensor.bfloat16)
    start, gradient = torch.randn(shape), torch.randn(shape)
    results = []
    for part in (6, 10**6):
        monkeypatch.setattr(adamw_bf16, "PART", part)
        parameter = nn.Parameter(start.clone())
        optimizer = AdamWBF16([parameter], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]["exp_avg_sq"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][0] != start).all()


def test_a_saved_state_is_loaded_unchanged(way):
    parameter = nn.Parameter(torch.randn(10))
    optimizer = AdamWBF16([parameter], lr=1e-3)
    parameter.grad = torch.randn(10)
    optimizer.step()
    copy = AdamWBF16([nn.Parameter(parameter.detach().clone())], lr=1.0)
    copy.load_state_dict(optimizer.state_dict())
    (loaded,), (expected,) = copy.state.values(), optimizer.state.values()
    assert loaded.keys() == expected.keys()
    for name in expected:
        assert torch.equal(loaded[name], expected[name])
        assert loaded[name].dtype == expected[name].dtype
    assert copy.param_groups[0]["lr"] == 1e-3


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards_are_updated_in_place(way, mesh):
    """Parameters of a sharded model are DTensors."""
    whole = torch.randn(6, 4)
    parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = AdamWBF16([parameter], lr=0.1)
    gradient = torch.randn(6, 4)
    parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer.step()
    expected = whole - 0.1 * gradient.sign()
    updated = parameter.redistribute(mesh, [Replicate()]).to_local()
    torch.testing.assert_close(updated, expected, rtol=0.01, atol=1e-3)
    assert isinstance(optimizer.state[parameter]["exp_avg"], DTensor)


def test_several_steps_equal_torchs(way):
    """Up to the moments' rounding; every option reaches its parameters."""

    def trained(kind, dtype):
        generator = torch.Generator().manual_seed(1)
        parameters = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in ((50, 3), (7,), (9,))
        ]
        groups = [{"params": parameters[:1], "weight_decay": 1.0}, {"params": parameters[1:]}]
        optimizer = kind(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.0)
        for _ in range(5):
            for parameter in parameters[:2]:  # the last has no gradient
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()
        return [p.detach().float() for p in parameters]

    exact = trained(torch.optim.AdamW, torch.float64)
    for actual, expected in zip(trained(AdamWBF16, torch.float32), exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"device": torch.device("cpu")}, False),
        ({"is_contiguous": lambda: False}, False),
        ({"dtype": torch.float64}, False),
    ],
)
def test_which_tensors_the_kernel_supports(changed, expected, monkeypatch):
    monkeypatch.setattr(adamw_bf16, "HAS_TRITON", True)
    gpu = {"device": torch.device("cuda"), "is_contiguous": lambda: True, "dtype": torch.bfloat16}
    tensor, other = SimpleNamespace(**gpu), SimpleNamespace(**(gpu | changed))
    assert adamw_bf16._kernel_takes(tensor, other) is expected
    monkeypatch.setattr(adamw_bf16, "HAS_TRITON", False)
    assert not adamw_bf16._kernel_takes(tensor, tensor)


OPTIMIZERS = [{}, *LOW_BITS]


@pytest.mark.parametrize("options", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 100.0, float("inf")])
@pytest.mark.parametrize("sharded", [False, True])
def test_clipped_steps_equal_those_after_clip_grad_norm(options, max_norm, sharded, way, mesh):
    if "optim" in options:
        pytest.importorskip("torchao")
    config = TrainConfig(learning_rate=1e-2, adam_epsilon=1e-2, warmup_steps=0, **options)

    def stepped(clip):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        place = (lambda t: distribute_tensor(t, mesh, [Shard(0)])) if sharded else (lambda t: t)
        for name, parameter in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(place(parameter.detach())))
        optimizer, _ = build_optimizer(model, config, 10)
        for scale in (1.0, 1e-3):  # the second step's gradient may need no clipping
            for parameter in model.parameters():
                parameter.grad = place(scale * torch.randn(parameter.shape))
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
            else:
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
                clipped_step(optimizer, whole(norm).item(), max_norm)
        return [whole(p.detach()) for p in model.parameters()]

    for actual, expected in zip(stepped(False), stepped(True), strict=True):
        # Low-precision moments may be rounded the other way the second time.
        tolerance = {"rtol": 1e-3, "atol": 2e-5} if options else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(actual, expected, **tolerance)


def test_eight_bits_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match="^optim: adamw_8bit needs torchao.*; pip install torchao"):
        build_optimizer(nn.Linear(3, 2), TrainConfig(optim="adamw_8bit"), 10)
