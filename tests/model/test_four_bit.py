"""Adapters over weights in 4 bits, on the packed path, saved and merged; against bitsandbytes' own
layers under plain transformers, and against the weights that they stand for."""

import importlib.metadata
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rrhf_fast import ExportConfig, RRHFTrainer, TrainConfig, demo, export, train
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.flops import decoder_flops
from rrhf_fast.model.four_bit import (
    BITS,
    IN_4BIT,
    SETTINGS,
    linear_weights,
    load_in_four_bits,
    round_to_four_bits,
)
from rrhf_fast.model.lora import add_lora, init_lora
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.train.memory import estimate
from tests.model.test_lora import queries
from tests.train.test_trainer import HELD_OUT, ROWS

MODEL = str(demo.MODEL_DIR)


@pytest.fixture(autouse=True)
def bitsandbytes():
    if not list(importlib.metadata.distributions(name="bitsandbytes")):
        pytest.skip("bitsandbytes is not installed")


def quantised() -> PreTrainedModel:
    return load_in_four_bits(MODEL, torch.device("cpu"))


def rounded() -> PreTrainedModel:
    lm = load_model(MODEL)
    round_to_four_bits(lm)
    return lm


def test_what_is_rounded_is_what_4_bits_hold():
    """The head, embeddings and norms keep their values, all linear layers below the head do not."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    lm, plain, whole = quantised(), rounded(), load_model(MODEL)
    layers = {n: m for n, m in lm.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 4 * 7 == len(list(linear_weights(plain)))
    for name, layer in layers.items():
        held = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(plain.get_submodule(name).weight, held), name
        original = whole.get_submodule(name).weight
        assert 0 < (held - original).abs().max() < 0.2 * original.abs().max()
    for name, parameter in whole.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(plain.get_parameter(name), parameter), name


def test_packed_loss_and_gradient_are_those_of_the_rounded_weights():
    config = TrainConfig(use_peft=True, lora_r=4)
    (pack,) = PackPlanner(queries(3), packing="forest", max_tokens_per_pack=5000).packs(range(3))
    found = []
    for lm in (quantised(), rounded()):
        add_lora(lm, config)
        init_lora(lm, seed=0)
        model = RRHFModel(lm, config, max_length=256)
        loss = model(pack).loss
        loss.backward()
        trained = {name: p.grad for name, p in lm.named_parameters() if p.requires_grad}
        found.append((loss.item(), trained))
    (loss, gradients), (expected, references) = found
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in references.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-5), name


OPTIONS = {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "learning_rate": 1e-3}
OPTIONS |= {"train_batch_size": 4, "max_steps": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    if not list(importlib.metadata.distributions(name="bitsandbytes")):
        pytest.skip("bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("trained")
    args = TrainConfig(output_dir=str(folder), save_steps=2, **OPTIONS)
    trainer = RRHFTrainer(MODEL, args, ROWS, HELD_OUT)
    return folder, trainer.train(), trainer.evaluate()


def test_a_merged_checkpoint_is_the_model_that_was_trained(trained, tmp_path):
    folder, result, measures = trained
    assert result.after["loss"] < result.before["loss"]
    merged = ExportConfig(str(folder / "checkpoint-4"), str(tmp_path / "merged"), merge=True)
    export(merged)
    args = TrainConfig(output_dir=str(tmp_path / "out"))
    again = RRHFTrainer(str(tmp_path / "merged"), args, ROWS, HELD_OUT).evaluate()
    assert again["eval_loss"] == pytest.approx(measures["eval_loss"], rel=1e-5)
    # Those that the run left are the same, and say so; on the whole weights they are another model.
    export(ExportConfig(str(folder), str(tmp_path / "told"), merge=True))
    files = [tmp_path / name / "model.safetensors" for name in ("merged", "told")]
    assert files[0].read_bytes() == files[1].read_bytes()
    export(ExportConfig(str(folder), str(tmp_path / "whole"), merge=True, load_in_4bit=False))
    args = TrainConfig(output_dir=str(tmp_path / "other"))
    other = RRHFTrainer(str(tmp_path / "whole"), args, ROWS, HELD_OUT).evaluate()
    assert abs(other["eval_loss"] / measures["eval_loss"] - 1) > 1e-4
    # Adapters that are exported alone say it, too.
    export(ExportConfig(str(folder / "checkpoint-4"), str(tmp_path / "alone")))
    assert json.loads((tmp_path / "alone" / IN_4BIT).read_text()) == SETTINGS


def test_a_run_resumes_to_the_same_adapters(trained, tmp_path):
    folder, *_ = trained
    saved = str(folder / "checkpoint-2")
    args = TrainConfig(output_dir=str(tmp_path), resume_from_checkpoint=saved, **OPTIONS)
    RRHFTrainer(MODEL, args, ROWS, HELD_OUT).train()
    one, other = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_others_load_the_adapters(trained):
    folder, *_ = trained
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == MODEL
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.isfinite(lm(torch.arange(8)[None]).logits).all()


def test_work_and_memory_are_counted_in_numbers_not_bytes():
    lm, plain = quantised(), load_model(MODEL).requires_grad_(False)
    assert decoder_flops(lm) == decoder_flops(plain)
    empty = empty_model(MODEL)
    add_lora(empty, config := TrainConfig(**OPTIONS))
    linear = sum(weight.numel() for weight in linear_weights(empty))
    every = sum(p.numel() for p in empty.parameters())
    adapters = sum(p.numel() for p in empty.parameters() if p.requires_grad)
    found = estimate(empty, config, torch.bfloat16, 1).weights
    assert found == 4 * adapters + 2 * (every - adapters - linear) + BITS / 8 * linear
    weights = [m.weight for m in lm.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    scales = [weight.quant_state for weight in weights]
    held = sum(weight.nbytes for weight in weights)
    held += sum(scale.absmax.nbytes + scale.state2.absmax.nbytes for scale in scales)
    assert held == pytest.approx(BITS / 8 * linear, rel=0.01)


@pytest.mark.parametrize("packing", ["forest", "none"])
def test_in_16_bits(packing, tmp_path):
    """As GPUs compute: the same run to bfloat16's precision."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        args = TrainConfig(
            output_dir=str(tmp_path / dtype), dtype=dtype, packing=packing, **OPTIONS
        )
        losses.append(RRHFTrainer(MODEL, args, ROWS, HELD_OUT).train().after["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("kind", ["gpt2", "falcon"])
def test_layers_that_an_export_could_not_round_are_refused(kind, tmp_path):
    sizes = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^load_in_4bit: {kind} has layers that cannot be kept"):
        load_in_four_bits(str(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[3, 5] = value
    lm.save_pretrained(tmp_path)
    message = "its weights are damaged: model.layers.1.mlp.up_proj.weight holds NaN or inf"
    with pytest.raises(ValueError, match=message):
        load_in_four_bits(str(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit: needs use_peft"),
        (OPTIONS | {"compile": True}, "load_in_4bit, compile: "),
        (OPTIONS | {"use_dora": True}, "load_in_4bit, use_dora: "),
    ],
)
def test_what_4_bits_do_not_allow(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train(TrainConfig(**options))


def test_a_loaded_model_is_refused(tmp_path):
    args = TrainConfig(output_dir=str(tmp_path), **OPTIONS)
    with pytest.raises(ValueError, match="^load_in_4bit: needs the name of a model"):
        RRHFTrainer(load_model(MODEL), args, ROWS)
