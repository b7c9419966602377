"""Adapters on the packed path: the same loss as unpacked runs, gradients for adapters alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rrhf_fast import TrainConfig, demo, reference
from rrhf_fast.data.load import load_rows
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.tokenise import tokenise_rows
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.model.lora import add_lora, init_lora, is_adapter
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.sharded import empty_model


def adapted(**options):
    config = TrainConfig(use_peft=True, lora_r=4, **options)
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR).eval()
    add_lora(lm, config)
    init_lora(lm, seed=0)
    return lm, config


def queries(count):
    rows, report = load_rows(str(demo.TRAIN_FILE))
    tokenizer = load_tokenizer(str(demo.MODEL_DIR))
    return tokenise_rows(rows[:count], tokenizer, report, max_length=256)[0]


KINDS = [{}, {"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_packed_loss_equals_the_reference_and_trains_only_adapters(kind):
    lm, config = adapted(**kind)
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:  # zero, which would hide A
                std = 0.025 if "use_rslora" in kind else 0.05  # twice the scale
                parameter.normal_(std=std, generator=generator)
    rows = queries(3)
    (pack,) = PackPlanner(rows, packing="forest", max_tokens_per_pack=5000).packs(range(3))
    model = RRHFModel(lm, config, max_length=256)
    loss = model(pack).loss
    loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in trained.items()}
    assert all(p.grad is None for name, p in lm.named_parameters() if name not in trained)
    assert lm.get_output_embeddings().weight.grad is None

    lm.zero_grad()
    losses = []
    with model.generation():
        for query in rows:
            prompt = torch.from_numpy(query.prompt_ids).long()
            logps = [
                reference.response_logps(lm, prompt, torch.from_numpy(ids).long())
                for ids in query.response_ids
            ]
            losses.append(reference.rrhf_loss(logps, torch.from_numpy(query.rewards))[0])
    expected = torch.stack(losses).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trained.items():
        assert torch.allclose(packed[name], parameter.grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layers_are_those_of_the_papers(kind):
    """rsLoRA: W + alpha / sqrt(r) B A. DoRA: m (W + V) / |W + V| by rows, for V = s B A."""
    lm, config = adapted(**kind)
    layer = lm.base_model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_(std=0.05)
    scale = config.lora_alpha / (config.lora_r**0.5 if "use_rslora" in kind else config.lora_r)
    weight = layer.base_layer.weight + scale * b @ a
    if "use_dora" in kind:
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert torch.allclose(magnitude, layer.base_layer.weight.norm(dim=1))
        with torch.no_grad():
            magnitude.mul_(1.5)
        weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    x = torch.randn(5, weight.shape[1])
    assert torch.allclose(layer(x), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapters_of_every_kind_are_the_same_on_an_empty_model(kind):
    """What several ranks and exports begin with."""
    lm, config = adapted(**kind)
    empty = empty_model(str(demo.MODEL_DIR))
    add_lora(empty, config)
    shapes = {name: p.shape for name, p in lm.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes
    assert {n for n, p in lm.named_parameters() if p.requires_grad} == set(
        filter(is_adapter, shapes)
    )


def test_fresh_adapters_change_nothing_and_follow_the_seed():
    plain = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR).eval()
    lm, _ = adapted()
    ids = torch.arange(30)[None]
    assert torch.equal(plain(ids).logits, lm(ids).logits)
    values = {name: p.clone() for name, p in lm.named_parameters() if "lora_A" in name}
    assert len(values) == 4 * 7  # all linear layers of four decoder layers, no head
    init_lora(lm, seed=0)
    assert all(torch.equal(p, values[n]) for n, p in lm.named_parameters() if n in values)
    init_lora(lm, seed=1)
    assert not any(torch.equal(p, values[n]) for n, p in lm.named_parameters() if n in values)


def test_dora_wants_weights_by_rows():
    """GPT-2 stores them by columns."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)
    options = TrainConfig(use_peft=True, use_dora=True, lora_target_modules=["c_proj"])
    with pytest.raises(ValueError, match="^use_dora: expected nn.Linear layers, found Conv1D"):
        add_lora(GPT2LMHeadModel(config), options)


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (["no_such_layer"], "lora_target_modules: .*no_such_layer"),
        (["lm_head"], "lora_target_modules: expected linear layers below the head"),
        (["embed_tokens"], "lora_target_modules: expected linear layers below the head"),
    ],
)
def test_targets_that_cannot_be_adapted(targets, problem):
    with pytest.raises(ValueError, match=problem):
        adapted(lora_target_modules=targets)
