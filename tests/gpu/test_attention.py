"""Attention on a GPU: the kernels themselves, memory, synchronisation, compilation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rrhf_fast import TrainConfig, train
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import forest_flash, forest_flex, layers
from rrhf_fast.model.attention import BACKENDS, try_backend
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel

pytestmark = pytest.mark.gpu

LLAMA_8B = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, value_size=128)
SPECS = {
    "llama": LLAMA_8B,
    "window": replace(LLAMA_8B, window=4096),
    "sinks": replace(LLAMA_8B, head_size=64, value_size=64, has_sinks=True),
    "sinks and window": replace(LLAMA_8B, head_size=64, value_size=64, has_sinks=True, window=128),
    "gemma2": replace(LLAMA_8B, num_heads=8, num_kv_heads=4, head_size=256, value_size=256,
                      softcap=50.0, window=4096),
    "smollm": replace(LLAMA_8B, num_heads=9, num_kv_heads=3, head_size=64, value_size=64),
    "phi": replace(LLAMA_8B, num_heads=4, num_kv_heads=4, head_size=80, value_size=80),
    "deepseek": replace(LLAMA_8B, num_heads=4, num_kv_heads=4, head_size=192, scale=0.1),
}  # fmt: skip


@pytest.fixture
def cuda():
    return torch.device("cuda", torch.cuda.current_device())


def forest_of(num_queries, *, prompt=700, response=200, k=5):
    rng = np.random.default_rng(num_queries)
    queries = [
        TokenisedQuery(
            rng.integers(0, 90, rng.integers(1, prompt), dtype=np.int32),
            [rng.integers(0, 90, rng.integers(1, response), dtype=np.int32) for _ in range(k)],
            np.arange(k, dtype=np.float32),
        )
        for _ in range(num_queries)
    ]
    return build_forest(queries, pad_to_multiple_of=128)


def states(spec, num_tokens, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    sizes = [
        (spec.num_heads, spec.head_size),
        (spec.num_kv_heads, spec.head_size),
        (spec.num_kv_heads, spec.value_size),
    ]
    # The layout of a decoder's projections: other strides need other graphs.
    return [
        torch.randn(1, num_tokens, heads, size, generator=g, device="cuda", dtype=dtype)
        .transpose(1, 2).detach().requires_grad_()
        for heads, size in sizes
    ]  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_float64_or_says_why_not(name, kind, dtype, cuda):
    """Forward and backward, GQA, windows, sinks, capped scores, uneven heads."""
    spec = SPECS[kind]
    problem = BACKENDS[name].obstacle(spec, cuda, dtype, 8192)
    if name == "forest_flex" and dtype == torch.float32:
        # Its float32 code exceeds shared memory or spills tens of thousands of instructions: it
        # must be refused, not tried.
        assert problem is not None and "float32" in problem
    if problem is not None:
        pytest.skip(problem)
    try_backend(BACKENDS[name], spec, cuda, dtype)


def test_flash_attention_of_pytorch_where_the_package_is_installed(monkeypatch, cuda):
    if forest_flash._flash_attn() is None:
        pytest.skip("flash-attn is not installed, so the tests above have used PyTorch's")
    monkeypatch.setattr(forest_flash, "_flash_attn", lambda: None)
    for kind in ("llama", "window", "sinks and window"):
        try_backend(forest_flash, SPECS[kind], cuda, torch.bfloat16)


def test_what_the_backends_can_serve(cuda):
    for kind in SPECS:
        assert forest_flex.obstacle(SPECS[kind], cuda, torch.bfloat16, 8192) is None
    for kind in ("llama", "window", "sinks", "phi"):
        assert forest_flash.obstacle(SPECS[kind], cuda, torch.bfloat16, 8192) is None


@pytest.mark.parametrize("name", BACKENDS)
def test_the_host_does_not_wait(name):
    backend, pack = BACKENDS[name], forest_of(6)
    tensors = states(LLAMA_8B, pack.num_tokens)
    plans = [backend.plan(pack).pin_memory().to("cuda") for _ in range(2)]

    def step(plan):
        for window in (None, 300):
            out = backend.attend(*tensors, plan, window=window)
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    step(plans[0])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(plans[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_changing_lengths_share_compilations(cuda):
    try_backend(forest_flex, LLAMA_8B, cuda, torch.bfloat16)
    before = layers.count_graphs()
    for num_queries in (1, 2, 5, 9):
        pack = forest_of(num_queries)
        tensors = states(LLAMA_8B, pack.num_tokens)
        out = forest_flex.attend(*tensors, forest_flex.plan(pack).to("cuda"))
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert layers.count_graphs() == before


def test_a_block_mask_of_64k_tokens_is_small():
    pack = forest_of(60, prompt=1500, response=400)
    assert pack.num_tokens > 2**16
    plan = forest_flex.plan(pack).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan.mask(None)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


def test_gathered_keys_stay_within_their_bound(monkeypatch):
    monkeypatch.setattr(forest_flash, "MAX_KEY_ROWS", 2**13)
    pack = forest_of(40)
    plan = forest_flash.plan(pack).to("cuda")
    assert len(plan.calls) > 3
    spec = LLAMA_8B
    tensors = states(spec, pack.num_tokens)

    def extra(function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(), torch.cuda.max_memory_allocated() - before

    gathered = 2**13 * spec.num_kv_heads * 2 * spec.head_size * 2
    of_the_pack = pack.num_tokens * spec.num_heads * (spec.head_size * 2 + 4)
    out, forward = extra(lambda: forest_flash.attend(*tensors, plan))
    # Output and log-sum-exp; one call's output; gathered keys and values.
    assert forward < 2.5 * of_the_pack + gathered
    _, backward = extra(lambda: torch.autograd.grad(out, tensors, torch.ones_like(out)))
    # The kernel sums gradients of queries, and of a key per query head, in float32.
    work = 4 * of_the_pack + spec.num_heads // spec.num_kv_heads * 4 * gathered
    keys = 2 * pack.num_tokens * spec.num_kv_heads * spec.head_size * (4 + 2)
    assert backward < 2 * of_the_pack + keys + 3 * gathered + work


@pytest.mark.parametrize("name", ["forest_flex", "forest_flash"])
def test_deterministic_algorithms_give_the_same_bits(name):
    backend, pack = BACKENDS[name], forest_of(6)
    plan = backend.plan(pack).to("cuda")
    tensors = states(LLAMA_8B, pack.num_tokens)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out = backend.attend(*tensors, plan)
            runs.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 200},
    "gemma2": {"head_dim": 64, "sliding_window": 200},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "num_local_experts": 4},
}


def tiny_model(kind, device):
    sizes = {
        "vocab_size": 97, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **FAMILIES[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["auto", "forest_flash"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_compiled_decoder_in_bfloat16_follows_float32(kind, name, checkpointing):
    exact = RRHFModel(tiny_model(kind, "cpu"), LossConfig(), max_length=1024)
    try:
        model = RRHFModel(
            tiny_model(kind, "cuda"),
            LossConfig(),
            max_length=1024,
            compute_dtype=torch.bfloat16,
            attn_implementation=name,
            compile=True,
            activation_checkpointing=checkpointing,
        )
    except ValueError as error:
        if "flash-attn" in str(error):
            pytest.skip(str(error))
        raise
    assert model.warnings == []
    assert model.attention.name == ("forest_flex" if name == "auto" else name)
    made = None
    for num_queries in (1, 3, 2):
        pack = forest_of(num_queries)
        expected, found = exact(pack), model(pack.to("cuda"))
        torch.testing.assert_close(
            found.logp_scores.cpu(), expected.logp_scores, rtol=0.05, atol=0.05
        )
        for loss, lm in ((expected.loss, exact.lm), (found.loss, model.lm)):
            lm.zero_grad()
            loss.backward()
        for a, b in zip(model.lm.parameters(), exact.lm.parameters(), strict=True):
            if b.grad is not None and b.grad.norm() > 1e-3:
                similarity = torch.cosine_similarity(
                    a.grad.cpu().flatten(), b.grad.flatten(), dim=0
                )
                assert similarity > 0.99
        made = layers.count_graphs() if made is None else made
    assert layers.count_graphs() == made


def test_a_run_says_what_computes_it(tmp_path, capsys):
    result = train(TrainConfig(output_dir=str(tmp_path), max_steps=3))
    lines = capsys.readouterr().out.splitlines()
    assert "attention  forest_flex (first choice); layers compiled" in lines
    assert not [line for line in lines if line.startswith("fallback")]
    steps = [record for record in result.metrics if "loss" in record]
    assert steps[0]["compiled_graphs"] == steps[-1]["compiled_graphs"] > 0
