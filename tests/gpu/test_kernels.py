"""Kernels on a GPU: bfloat16, real vocabularies, memory, the engine on CUDA."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from rrhf_fast import TrainConfig, reference, train
from rrhf_fast.losses import linear_logprob, linear_rrhf_loss, rrhf_loss

pytestmark = pytest.mark.gpu

# Llama 3's, Gemma 2's, and one that is not a multiple of any tile.
VOCABULARIES = [128_256, 256_000, 50_257]


def case(e, h, v, dtype, n=None, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(n or e, h, generator=g, device="cuda") * 4 / h**0.5
    weight = torch.randn(v, h, generator=g, device="cuda")
    rows = torch.randint(0, n or e, (e,), generator=g, device="cuda")
    targets = torch.randint(0, v, (e,), generator=g, device="cuda")
    upstream = torch.randn(e, generator=g, device="cuda")
    tensors = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    return tensors, rows, targets, upstream


@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("head", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_exact_than_plain_torch_in_the_same_dtype(v, head, dtype):
    (hidden, weight), rows, targets, upstream = case(300, 256, v, dtype)

    def run(function, *tensors, **options):
        out = function(*tensors, rows, targets, **options, **head)
        return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    exact_tensors = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = run(reference.linear_logprob, *exact_tensors)
    plain = run(reference.linear_logprob, hidden, weight)
    ours = run(linear_logprob, hidden, weight, backend="triton")
    eps = 4 * torch.finfo(dtype).eps
    for a, b, c in zip(ours, plain, exact, strict=True):
        allowed = (b.double() - c).abs() + eps * c.abs().max()
        assert ((a.double() - c).abs() <= allowed).all()


def test_two_runs_agree_bit_for_bit():
    (hidden, weight), rows, targets, upstream = case(2000, 512, 50_257, torch.bfloat16, n=900)
    runs = []
    for _ in range(2):
        out = linear_logprob(hidden, weight, rows, targets)
        runs.append([out, *torch.autograd.grad(out, [hidden, weight], upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory_is_the_workspace_and_the_gradients():
    (hidden, weight), rows, targets, upstream = case(8192, 1024, 128_256, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_logprob(hidden, weight, rows, targets, workspace_mb=256)
    torch.autograd.grad(out, [hidden, weight], upstream)
    extra = torch.cuda.max_memory_allocated() - before
    states = 8192 * 1024
    # d_weight and one slice of it, the workspace, and states, d_states (twice) and d_hidden.
    allowed = 2 * weight.numel() * 2 + 256 * 2**20 + states * (2 + 4 + 4 + 4 + 2)
    assert extra < allowed < 8192 * 128_256 * 2


def queries(num_edges, k=4, length=32):
    """Layout and rewards of queries of k responses; num_edges a multiple of k * length."""
    g = torch.Generator("cuda").manual_seed(1)
    count = num_edges // length
    layout = {
        "path_edges": torch.arange(num_edges, device="cuda"),
        "path_offsets": torch.arange(count + 1, device="cuda") * length,
        "group_offsets": torch.arange(0, count + 1, k, device="cuda"),
    }
    return torch.randn(count, generator=g, device="cuda"), layout


@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("head", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("workspace_mb", [1, 40, 512], ids=["sliced", "chunks", "whole"])
def test_one_sweep_equals_two_steps(v, head, workspace_mb):
    (hidden, weight), rows, targets, _ = case(512, 256, v, torch.bfloat16)
    rewards, layout = queries(512)
    out = linear_rrhf_loss(
        hidden, weight, rows, targets, rewards, workspace_mb=workspace_mb, **layout, **head
    )
    gradients = torch.autograd.grad(out.loss, [hidden, weight])
    logps = linear_logprob(hidden, weight, rows, targets, **head)
    two_steps = rrhf_loss(logps, rewards, **layout)
    torch.testing.assert_close(out.loss, two_steps.loss, rtol=1e-4, atol=1e-4)
    # With the scores of the two steps, so that a near tie cannot change a count.
    upstream = torch.autograd.grad(two_steps.loss, logps, retain_graph=True)[0]
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(
        reference.linear_logprob(*doubles, rows, targets, **head), doubles, upstream.double()
    )
    for a, b in zip(gradients, exact, strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


def test_offsets_beyond_32_bits():
    """17,024 edges x 128,256 tokens: more than 2**31 elements in one workspace."""
    num_edges, v = 17_024, 128_256
    (hidden, weight), rows, targets, _ = case(num_edges, 64, v, torch.bfloat16)
    rewards, layout = queries(num_edges)
    arguments = (hidden, weight, rows, targets, rewards)
    whole = linear_rrhf_loss(*arguments, workspace_mb=5000, **layout)
    chunks = linear_rrhf_loss(*arguments, workspace_mb=500, **layout)
    torch.testing.assert_close(whole.logp_scores, chunks.logp_scores, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(whole.loss, [hidden, weight]),
        torch.autograd.grad(chunks.loss, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-4)


def test_memory_of_the_sweep_is_the_workspace_and_the_gradients():
    (hidden, weight), rows, targets, _ = case(8192, 1024, 128_256, torch.bfloat16)
    rewards, layout = queries(8192)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_rrhf_loss(hidden, weight, rows, targets, rewards, workspace_mb=256, **layout)
    torch.autograd.grad(out.loss, [hidden, weight])
    extra = torch.cuda.max_memory_allocated() - before
    states = 8192 * 1024
    # d_weight in float32 and rounded; states, d_states and d_hidden in float32, and d_hidden.
    allowed = weight.numel() * (4 + 2) + 260 * 2**20 + states * (2 + 4 + 4 + 4 + 2)
    assert extra < allowed


def test_the_demo_trains_on_cuda_as_on_the_cpu(tmp_path, monkeypatch):
    def losses(name):
        config = TrainConfig(output_dir=str(tmp_path / name), max_steps=3, dtype="float32")
        return [record["loss"] for record in train(config).metrics if "loss" in record]

    on_cuda = losses("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_cuda == pytest.approx(losses("cpu"), rel=1e-3)
