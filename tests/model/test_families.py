"""Packed forests against one-response-at-a-time transformers runs, for every supported family."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rrhf_fast import reference
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.padded import build_padded
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import forest_sdpa
from rrhf_fast.model.attention import Choice
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.decoder import UnsupportedModel, attention, self_check
from rrhf_fast.model.rrhf import RRHFModel

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = SIZES | {"num_key_value_heads": 4}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Every supported family with its special features enabled; windows are shorter than the rows, so
# that a wrong window shows.
SUPPORTED = {
    "llama": SIZES,
    "llama-tied": SIZES | {"tie_word_embeddings": True},
    "qwen2": SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": SIZES | {"head_dim": 8},
    "mistral": SIZES | {"sliding_window": 6},
    "gemma": SIZES | {"head_dim": 8},
    "gemma2": SIZES | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "phi": MHA,
    "phi3": SIZES,
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
    "olmo2": SIZES,
    "smollm3": SIZES,
    "granite": SIZES | {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "starcoder2": SIZES | {"sliding_window": 6},
    "gpt_bigcode": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_oss": SIZES | MOE | {"sliding_window": 6, "head_dim": 8},
    "mixtral": SIZES | MOE,
    "qwen3_moe": SIZES
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": MHA
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "cohere": SIZES | {"logit_scale": 0.25},
}
TINY_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
# Would be silently wrong if accepted; the message says why.
REFUSED = {
    "gptj": (TINY_GPT, "AttentionInterface"),
    "codegen": (TINY_GPT, "AttentionInterface"),
    "gpt_neo": (
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "AttentionInterface",
    ),
    "falcon": (
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "AttentionInterface",
    ),
    "bloom": (
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "AttentionInterface",
    ),
    "mpt": (
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4},
        "AttentionInterface",
    ),
    "mamba": ({"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}, "layers of type"),
    "lfm2": (SIZES | {"layer_types": ["conv", "full_attention", "conv"]}, "layers of type conv"),
    "qwen3_next": (SIZES | {"head_dim": 8}, "layers of type linear_attention"),
    "llama4_text": (
        SIZES
        | {
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 8,
        },
        "layers of type chunked_attention",
    ),
    "stablelm": (SIZES, "AttentionInterface"),
}


def tiny_model(kind: str, sizes: dict, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition("-")[0], **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for (
        parameter
    ) in model.parameters():  # initial weights are so small that attention hardly matters
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def queries() -> list[TokenisedQuery]:
    """Shared response prefixes, a duplicate, a response that is a prefix of another, ragged k."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(3, VOCAB, n, dtype=np.int32)

    begin = draw(4)
    first = [np.append(begin, draw(n)) for n in (3, 8, 1)] + [draw(9)]
    first += [first[1], begin]
    return [
        TokenisedQuery(draw(11), first, np.array([3, 1, 2, 2, 5, 4], np.float32)),
        TokenisedQuery(draw(3), [draw(2), draw(12)], np.array([0, 1], np.float32)),
        TokenisedQuery(draw(7), [draw(1), draw(5), draw(5)], np.array([2, 0, 1], np.float32)),
    ]


def unpacked_loss(model, cases):
    """The reference: each response alone, with transformers' eager attention."""
    logps, losses = [], []
    with attention(model, "eager") if model._can_set_attn_implementation() else nullcontext():
        for case in cases:
            prompt = torch.from_numpy(case.prompt_ids).long()
            group = [
                reference.response_logps(model, prompt, torch.from_numpy(ids).long())
                for ids in case.response_ids
            ]
            logps += group
            losses.append(reference.rrhf_loss(group, torch.from_numpy(case.rewards))[0])
    return torch.cat(logps), torch.stack(losses).mean()


def gradients(loss, model):
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_equal_to_unpacked(lm, wrapped: RRHFModel, pack, tolerance: float):
    logps, loss = unpacked_loss(lm, queries())
    expected = gradients(loss, lm)
    with torch.no_grad():
        ours = wrapped.edge_logps(pack)
    out = wrapped(pack)
    torch.testing.assert_close(ours[pack.path_edges], logps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.loss, loss, rtol=tolerance, atol=tolerance)
    actual = gradients(out.loss, lm)
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(
            actual[name], expected[name], rtol=tolerance, atol=tolerance * scale, msg=name
        )


@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_forest_equals_unpacked(kind, multiple):
    lm = tiny_model(kind, SUPPORTED[kind])
    wrapped = RRHFModel(lm, LossConfig(), max_length=64)
    pack = build_forest(queries(), pad_to_multiple_of=multiple)
    assert_equal_to_unpacked(lm, wrapped, pack, 1e-5)


NO_SOFTCAP = [kind for kind in SUPPORTED if kind != "gemma2"]


@pytest.mark.usefixtures("varlen_on_cpu")
@pytest.mark.parametrize("kind", NO_SOFTCAP)
def test_gathered_keys_equal_unpacked(kind):
    lm = tiny_model(kind, SUPPORTED[kind])
    wrapped = RRHFModel(lm, LossConfig(), max_length=64)
    wrapped.attention = Choice("forest_flash", "with a stand-in for its kernel")
    pack = build_forest(queries(), pad_to_multiple_of=128, plan=wrapped.plan)
    assert_equal_to_unpacked(lm, wrapped, pack, 1e-5)


@torch.no_grad()
@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("kind", SUPPORTED)
def test_flex_equals_unpacked(kind):
    """Forward only: FlexAttention has no backward on a CPU."""
    lm = tiny_model(kind, SUPPORTED[kind])
    wrapped = RRHFModel(lm, LossConfig(), max_length=64)
    wrapped.attention = Choice("forest_flex", "forward only")
    pack = build_forest(queries(), pad_to_multiple_of=wrapped.pad_to_multiple_of)
    assert pack.num_tokens == 128
    expected, _ = unpacked_loss(lm, queries())
    logps = wrapped.edge_logps(pack)[pack.path_edges]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2"])
def test_forest_equals_unpacked_in_float64(kind):
    lm = tiny_model(kind, SUPPORTED[kind], torch.float64)
    wrapped = RRHFModel(lm, LossConfig(), max_length=64, compute_dtype=torch.float32)
    # Libraries keep RoPE, norms or softmax in float32, so 1e-12 is out of reach.
    assert_equal_to_unpacked(lm, wrapped, build_forest(queries()), 2e-6)


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_what_would_be_silently_wrong(kind):
    sizes, reason = REFUSED[kind]
    lm = tiny_model(kind, sizes)
    with pytest.raises(UnsupportedModel, match=f"^{kind}: .*{reason}.*--packing none"):
        RRHFModel(lm, LossConfig(), max_length=64)


@pytest.mark.parametrize("kind", ["llama", *REFUSED])
def test_padding_supports_every_model(kind):
    sizes = SUPPORTED[kind] if kind in SUPPORTED else REFUSED[kind][0]
    lm = tiny_model(kind, sizes)
    wrapped = RRHFModel(lm, LossConfig(), max_length=64, packing="none")
    assert_equal_to_unpacked(lm, wrapped, build_padded(queries(), pad_token_id=2), 2e-5)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_refuses_rope_that_depends_on_the_pack_only_beyond_its_window(rope_type):
    lm = with_rope(rope_type, 64)
    RRHFModel(lm, LossConfig(), max_length=64)
    with pytest.raises(UnsupportedModel, match=f"{rope_type} RoPE .* lower --max_length to 64"):
        RRHFModel(lm, LossConfig(), max_length=65)


def with_rope(rope_type: str, window: int):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    rope["original_max_position_embeddings"] = window
    if rope_type == "longrope":
        rope |= {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    return tiny_model("llama", SIZES | {"rope_parameters": rope})


def test_padding_does_not_let_the_longest_row_rotate_the_others():
    """Some of the rows are longer than the window of 21 tokens, others shorter."""
    lm = with_rope("longrope", 21)
    wrapped = RRHFModel(lm, LossConfig(), max_length=64, packing="none")
    assert_equal_to_unpacked(lm, wrapped, build_padded(queries(), pad_token_id=2), 2e-5)


@pytest.mark.parametrize("rope_type, is_sharded", [("dynamic", False), ("longrope", True)])
def test_padding_refuses_rope_that_would_depend_on_other_rows(rope_type, is_sharded):
    lm, more = with_rope(rope_type, 64), {"packing": "none", "is_sharded": is_sharded}
    RRHFModel(lm, LossConfig(), max_length=64, **more)
    with pytest.raises(ValueError, match=f"llama: its {rope_type} RoPE .*lower it to 64"):
        RRHFModel(lm, LossConfig(), max_length=65, **more)


@pytest.mark.parametrize("kind", ["stablelm", "gptj"])
def test_self_check_catches_a_decoder_that_ignores_the_forest(kind):
    sizes = SIZES if kind == "stablelm" else TINY_GPT
    with pytest.raises(UnsupportedModel, match="layers called the forest attention 0 times"):
        self_check(tiny_model(kind, sizes), max_length=64)


def test_a_decoder_that_hides_its_window_is_refused():
    """Qwen2-MoE builds the window into a mask and does not pass it to the attention function."""
    sizes = SIZES | {
        "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    with pytest.raises(UnsupportedModel, match="of its layers see 24 tokens, but 0 pass"):
        self_check(tiny_model("qwen2_moe", sizes), max_length=64)
    self_check(tiny_model("qwen2_moe", sizes), max_length=24)


def test_padding_supports_only_causal_models():
    lm = tiny_model("bert", SIZES | {"is_decoder": False})
    with pytest.raises(ValueError, match="bert: a token sees the tokens to its right"):
        RRHFModel(lm, LossConfig(), packing="none", max_length=64)


def test_self_check_catches_a_wrong_mask(monkeypatch):
    """A decoder that attends to a masked token is refused."""
    right = forest_sdpa.plan

    def wrong(pack):
        plan = right(pack)
        return replace(plan, key_rows=plan.key_rows.flip(0))

    monkeypatch.setattr(forest_sdpa, "plan", wrong)
    with pytest.raises(UnsupportedModel, match=r"log-probs .* away from unpacked runs"):
        RRHFModel(tiny_model("llama", SIZES), LossConfig(), max_length=64)


def test_activation_checkpointing_changes_nothing():
    losses = []
    for mode in ("none", "full", "selective"):
        lm = tiny_model("llama", SIZES)
        wrapped = RRHFModel(lm, LossConfig(), max_length=64, activation_checkpointing=mode)
        out = wrapped(build_forest(queries()))
        losses.append((out.loss, gradients(out.loss, lm)))
        assert list(lm.state_dict()) == list(tiny_model("llama", SIZES).state_dict())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_bfloat16_keeps_log_probs_and_rewards_accurate():
    lm = tiny_model("llama", SIZES)
    pack = build_forest(queries())
    exact = RRHFModel(lm, LossConfig(), max_length=64)(pack)
    rounded = RRHFModel(lm, LossConfig(), max_length=64, compute_dtype=torch.bfloat16)(pack)
    assert rounded.logp_scores.dtype == torch.float32
    torch.testing.assert_close(rounded.logp_scores, exact.logp_scores, rtol=0.05, atol=0.05)
    assert torch.equal(rounded.num_pairs, exact.num_pairs)


def test_rewards_that_are_equal_in_bfloat16_are_ranked():
    lm = tiny_model("llama", SIZES)
    close = torch.tensor([1.0, 1.0 + 2**-20, 1.0 + 2**-19])
    query = TokenisedQuery(np.arange(3, 9), [np.arange(i, 20) for i in (3, 4, 5)], close.numpy())
    pack = build_forest([query])
    assert len(close.bfloat16().unique()) == 1
    out = RRHFModel(lm, LossConfig(), max_length=64, compute_dtype=torch.bfloat16)(pack)
    assert out.num_pairs.item() == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3"])
def test_bfloat16_rounds_only_products(kind):
    """RoPE, norms, residual stream, log-probs, weights and gradients are float32."""
    lm = tiny_model(kind, SUPPORTED[kind])
    wrapped = RRHFModel(lm, LossConfig(), max_length=64, compute_dtype=torch.bfloat16)
    seen = {}

    def watch(name):
        def hook(module, inputs, output):
            outputs = output if isinstance(output, tuple) else (output,)
            seen.setdefault(name, set()).update(x.dtype for x in outputs)

        return hook

    for name, module in lm.named_modules():
        last = name.rpartition(".")[2]
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and "layers" not in name:
            module.register_forward_hook(watch("norm"))
        if last in ("input_layernorm", "ln_1", "ln_2"):
            module.register_forward_hook(watch("norm"))
        if last == "rotary_emb":
            module.register_forward_hook(watch("rope"))
        if last in ("q_proj", "c_attn", "up_proj", "c_fc"):
            module.register_forward_hook(watch("product"))
    pack = build_forest(queries())
    out = wrapped(pack)
    with wrapped.autocast():
        assert wrapped.edge_logps(pack).dtype == torch.float32
    assert seen.pop("product") == {torch.bfloat16}
    assert seen.pop("norm") == {torch.float32}
    assert seen.pop("rope", {torch.float32}) == {torch.float32}
    assert out.loss.dtype == out.logp_scores.dtype == torch.float32
    assert {grad.dtype for grad in gradients(out.loss, lm).values()} == {torch.float32}


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_attention_computes_in_the_compute_dtype(compute_dtype, monkeypatch):
    lm = tiny_model("llama", SIZES)
    wrapped = RRHFModel(lm, LossConfig(), max_length=64, compute_dtype=compute_dtype)
    seen, right = set(), forest_sdpa.attend

    def attend(*tensors, **options):
        seen.update(x.dtype for x in tensors[:3])
        return right(*tensors, **options)

    monkeypatch.setattr(forest_sdpa, "attend", attend)
    wrapped(build_forest(queries()))
    assert seen == {compute_dtype}


def test_attention_of_16_bits_runs_in_float32_on_a_cpu(monkeypatch):
    lm = tiny_model("llama", SIZES)
    wrapped = RRHFModel(lm, LossConfig(), max_length=64, compute_dtype=torch.bfloat16)
    seen, right = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*tensors, **options):
        out = right(*tensors, **options)
        seen.extend(x.dtype for x in (*tensors[:3], out))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    wrapped(build_forest(queries()))
    assert set(seen) == {torch.float32}


def test_a_plan_made_while_packing_is_not_made_again(monkeypatch):
    lm = tiny_model("llama", SIZES)
    wrapped = RRHFModel(lm, LossConfig(), max_length=64)
    expected = wrapped(build_forest(queries())).loss
    pack = build_forest(queries(), plan=wrapped.plan)
    monkeypatch.setattr(forest_sdpa, "plan", None)
    torch.testing.assert_close(wrapped(pack.to("cpu")).loss, expected)
