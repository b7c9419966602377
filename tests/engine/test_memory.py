"""The estimate of --dry_run against what PyTorch holds."""

import torch
from transformers import AutoModelForCausalLM

from rrhf_fast import TrainConfig, demo
from rrhf_fast.engine.memory import activation_bytes, estimate
from rrhf_fast.engine.optimizer import build_optimizer
from rrhf_fast.model.decoder import attention
from rrhf_fast.model.lora import add_lora
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.train import main

MODEL = str(demo.MODEL_DIR)


def test_weights_gradients_and_moments_are_those_of_a_step():
    config = TrainConfig()
    lm = AutoModelForCausalLM.from_pretrained(MODEL)
    optimizer, _ = build_optimizer(lm, config, num_steps=1)
    lm(torch.zeros(1, 5, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    found = estimate(empty_model(MODEL), config, torch.float32, 1)
    for expected, tensors in (
        (found.weights, list(lm.parameters())),
        (found.gradients, [parameter.grad for parameter in lm.parameters()]),
        (found.optimizer, moments),
    ):
        assert expected == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    adapted = empty_model(MODEL)
    add_lora(adapted, TrainConfig())
    adapted = estimate(adapted, config, torch.bfloat16, 1)
    assert adapted.optimizer < found.optimizer / 2 and adapted.weights < found.weights


def saved_bytes(lm, num_tokens):
    """What autograd keeps of a plain row, weights not counted."""
    storages = {}
    weights = {parameter.data_ptr() for parameter in lm.parameters()}

    def save(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with attention(lm, "sdpa"), hooks:
        hidden = lm.base_model(input_ids=ids, use_cache=False)[0]
    return sum(storage.nbytes() for storage in storages.values()), hidden


def test_activations_are_what_autograd_keeps():
    config = TrainConfig(max_tokens_per_pack=128)
    estimated = activation_bytes(empty_model(MODEL), config, torch.float32)
    found, _ = saved_bytes(AutoModelForCausalLM.from_pretrained(MODEL), 128)
    assert abs(estimated - found) < 0.1 * found
    by_mode = {}
    for mode in ("none", "selective", "full"):
        options = {"max_tokens_per_pack": 128, "activation_checkpointing": mode}
        by_mode[mode] = activation_bytes(empty_model(MODEL), TrainConfig(**options), torch.float32)
    assert by_mode["full"] < by_mode["selective"] < by_mode["none"] == estimated


def test_more_gpus_need_less_each():
    lm, config = empty_model(MODEL), TrainConfig()
    totals = [estimate(lm, config, torch.bfloat16, n).weights for n in (1, 2, 4)]
    assert totals[0] == 2 * totals[1] == 4 * totals[2]
    lean = estimate(lm, config, torch.bfloat16, 4)
    fast = estimate(lm, TrainConfig(reshard_after_forward=False), torch.bfloat16, 4)
    assert lean.gathered < fast.gathered


def test_dry_run_prints_a_table_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--dry_run", "true", "--use_peft", "true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "GPUs", "weights", "gradients", "optimizer", "gathered", "activations", "head", "total",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "4", "8", "16", "32", "64"]
    assert not list(tmp_path.iterdir())
