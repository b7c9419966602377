"""Gated MLPs and norms that keep less: the same gradient, fewer activations."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.lean_layers import (
    ACTIVATIONS,
    _Gated,
    _gated_mlp,
    _rms_norm,
    _RMSNorm,
    find_lean_layers,
    use_lean_layers,
    use_own_layers,
)  # fmt: skip
from rrhf_fast.model.rrhf import RRHFModel

SIZES = dict(
    vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
# Model, and how many MLPs and norms of it are lean.
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES), 2, 5),
    "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True), 2, 5),
    "norms of heads": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8), 2, 9),
    "another activation": (
        LlamaForCausalLM, LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"), 2, 5,
    ),
    "norms of another formula": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8), 2, 0),
    "norms without weights": (OlmoForCausalLM, OlmoConfig(**SIZES), 2, 0),
    "one projection for gate and up": (Phi3ForCausalLM, Phi3Config(**SIZES), 0, 5),
}  # fmt: skip


def lm_of(name):
    kind, config, *_ = MODELS[name]
    torch.manual_seed(0)
    lm = kind(config).eval()
    for parameter in lm.parameters():  # norms begin with weights of 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    return lm


def lean_modules(lm):
    found = [vars(module)["forward"].func for module in lm.modules() if "forward" in vars(module)]
    return found.count(_gated_mlp), found.count(_rms_norm)


def run(lm):
    """The gradient of every weight, and the sizes of what was kept for it."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(12).view(1, -1) * 5
    lm.zero_grad()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = lm(input_ids=ids, use_cache=False).logits.square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_same(name):
    lm = lm_of(name)
    expected, _ = run(lm)
    use_lean_layers(find_lean_layers(lm))
    assert lean_modules(lm) == MODELS[name][2:]
    ours, _ = run(lm)
    for parameter, value in expected.items():
        # A shift of all keys hardly changes attention: its gradient is what rounding leaves of a
        # sum of terms as large as the queries'.
        terms = expected[parameter.replace("k_proj.bias", "q_proj.bias")]
        assert (ours[parameter] - value).norm() < 1e-6 * terms.norm(), parameter
    use_own_layers(lm)
    assert lean_modules(lm) == (0, 0)


def test_norms_and_products_in_float64():
    x, weight, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert gradcheck(lambda x, weight: _RMSNorm.apply(x, weight[0], 1e-5), (x, weight))
    for act, derivative in ACTIVATIONS:
        assert gradcheck(lambda x, up, fs=(act, derivative): _Gated.apply(x, up, *fs), (x, up))


@pytest.mark.parametrize("kind", ["mlp", "norm"])
def test_fewer_activations_are_kept(kind):
    config = LlamaConfig(**SIZES)
    module = LlamaMLP(config) if kind == "mlp" else LlamaRMSNorm(24)
    holder = nn.Module()
    holder.base_model = nn.ModuleList([module])
    sizes = []
    for is_lean in (False, True):
        if is_lean:
            use_lean_layers(find_lean_layers(holder))
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        x = torch.randn(1, 50, 24)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x.requires_grad_())
        for parameter in module.parameters():
            kept.pop(parameter.data_ptr(), None)
        sizes.append(sum(kept.values()) - x.numel())
    if kind == "mlp":  # gate, act(gate), up, product; gate, up
        assert sizes == [4 * 50 * 40, 2 * 50 * 40]
    else:
        assert sizes[0] > 50 * 24 and sizes[1] == 50


class Relu(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.act_fn = nn.ReLU()


class Odd(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 1.01


class Clamped(LlamaMLP):
    def forward(self, x):
        up = self.up_proj(x).clamp(-10, 10)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


class WithBias(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return super().forward(x) + self.bias


class Needy(LlamaMLP):
    def forward(self, x, gates):
        return super().forward(x) * gates


@pytest.mark.parametrize("kind", [Odd, Relu, Clamped, WithBias, Needy])
def test_modules_that_compute_something_else_are_left_alone(kind):
    module = kind(24) if kind is WithBias else kind(LlamaConfig(**SIZES))
    holder = nn.Module()
    holder.base_model = nn.ModuleList([module])
    use_lean_layers(find_lean_layers(holder))
    assert lean_modules(holder) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_uses_them_where_nothing_does_better(dtype):
    lm = lm_of("llama")
    plain = deepcopy(lm)
    options = {"max_length": 64, "compute_dtype": dtype}
    assert lean_modules(RRHFModel(lm, LossConfig(), **options).lm) == (2, 5)
    checkpointed = RRHFModel(lm, LossConfig(), activation_checkpointing="selective", **options)
    assert lean_modules(checkpointed.lm) == (0, 0)
    state = torch.get_rng_state()
    find_lean_layers(lm)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(1, 6, 24)
    with torch.no_grad():  # as in generation
        use_lean_layers(find_lean_layers(lm))
        for ours, other in zip(lm.modules(), plain.modules(), strict=True):
            if isinstance(ours, LlamaMLP | LlamaRMSNorm):
                assert torch.equal(ours(x), other(x))
