"""Locating the tensors of an empty model, and its small twin."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from rrhf_fast import demo
from rrhf_fast.model.decoder import UnsupportedModel, self_check
from rrhf_fast.model.sharded import (
    empty_model,
    fill_weights,
    locate_weights,
    named_tensors,
    small_twin,
)


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that tests may change."""
    for path in demo.MODEL_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def rename(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "new")
    (folder / "new").rename(folder / "model.safetensors")


@pytest.mark.parametrize("without_prefix", [False, True])
def test_a_filled_model_is_the_loaded_one(folder, without_prefix):
    if without_prefix:  # as in saved models without a head
        rename(folder, lambda name: name.removeprefix("model."))
    lm = empty_model(str(folder))
    assert {parameter.device.type for parameter in lm.parameters()} == {"meta"}
    locations = locate_weights(lm, str(folder))
    lm.to_empty(device="cpu")
    lm.tie_weights()  # FSDP preserves ties, a plain module does not
    fill_weights(lm, locations)
    loaded = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    ids = torch.arange(50)[None]
    assert torch.equal(lm(ids).logits, loaded(ids).logits)
    assert lm.generation_config.to_dict() == loaded.generation_config.to_dict()


def test_other_names_and_shapes_are_left_to_transformers(folder):
    rename(folder, lambda name: name.replace("up_proj", "w3"))
    assert locate_weights(empty_model(str(folder)), str(folder)) is None
    rename(folder, lambda name: name.replace("w3", "up_proj"))
    lm = empty_model(str(folder))
    assert locate_weights(lm, str(folder)).keys() == named_tensors(lm).keys()
    config = (folder / "config.json").read_text().replace("256", "128")
    (folder / "config.json").write_text(config)
    assert locate_weights(empty_model(str(folder)), str(folder)) is None


def test_a_twin_has_each_kind_of_layer():
    config = Gemma3TextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=12,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with torch.device("meta"):
        lm = Gemma3ForCausalLM(config)
    twin = small_twin(lm, torch.device("cpu"))
    assert len(twin.model.layers) == 6
    assert set(twin.config.layer_types) == set(lm.config.layer_types)
    assert lm.config.num_hidden_layers == 12
    # What multiplies by one or adds zero could be left out, and nobody would see.
    assert all(len(weight.unique()) > 1 for weight in twin.parameters())


def test_a_twin_shows_what_initial_weights_hide():
    """Doge's own mask, which the forest cannot follow, does nothing before its weights are trained;
    one process, which has the weights, refuses the model."""
    config = DogeConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        lm = DogeForCausalLM(config)
    with pytest.raises(UnsupportedModel, match="away from unpacked runs"):
        self_check(small_twin(lm, torch.device("cpu")), max_length=64)
