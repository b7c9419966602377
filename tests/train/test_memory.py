"""The estimate of --dry_run against PyTorch's actual memory."""

from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rrhf_fast import TrainConfig, demo
from rrhf_fast.model.decoder import attention
from rrhf_fast.model.lora import add_lora
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.train import memory, prepare
from rrhf_fast.train.__main__ import main
from rrhf_fast.train.distributed import World
from rrhf_fast.train.memory import (
    activation_bytes,
    activation_line,
    choose_tokens,
    estimate,
    memory_table,
)
from rrhf_fast.train.optimizer import build_optimizer

MODEL = str(demo.MODEL_DIR)


def test_weights_gradients_and_moments_equal_those_of_a_step():
    config = TrainConfig()
    lm = AutoModelForCausalLM.from_pretrained(MODEL)
    optimizer, _ = build_optimizer(lm, config, num_steps=1)
    lm(torch.zeros(1, 5, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    memory = estimate(empty_model(MODEL), config, torch.float32, 1)
    for expected, tensors in (
        (memory.weights, list(lm.parameters())),
        (memory.gradients, [parameter.grad for parameter in lm.parameters()]),
        (memory.optimizer, moments),
    ):
        assert expected == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    adapted = empty_model(MODEL)
    add_lora(adapted, TrainConfig())
    adapted = estimate(adapted, config, torch.bfloat16, 1)
    assert adapted.optimizer < memory.optimizer / 2 and adapted.weights < memory.weights


@pytest.mark.parametrize("use_peft", [False, True])
def test_copies_of_weights_are_counted(use_peft):
    config, lm = TrainConfig(use_peft=use_peft), empty_model(MODEL)
    options = {"max_length": 64, "compute_dtype": torch.bfloat16}
    model = RRHFModel(AutoModelForCausalLM.from_pretrained(MODEL), config, **options)
    copies = sum(layer.weight_copy.nbytes for layer in model.copied)
    if use_peft:
        add_lora(lm, config)
        copies = 0  # adapters have none
    counted = estimate(lm, config, torch.bfloat16, 1).gathered
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert copies <= counted == 2 * trained and (use_peft or copies > 0.1 * counted)
    assert estimate(lm, config, torch.float32, 1).gathered == 0


def saved_bytes(lm, num_tokens):
    """Bytes that autograd saves for a plain row, without weights."""
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


def test_activations_are_close_to_what_autograd_saves():
    estimated = activation_bytes(empty_model(MODEL), TrainConfig(), torch.float32, 128)
    saved, _ = saved_bytes(AutoModelForCausalLM.from_pretrained(MODEL), 128)
    assert abs(estimated - saved) < 0.1 * saved
    by_mode = {}
    for mode in ("none", "selective", "full"):
        config = TrainConfig(activation_checkpointing=mode)
        by_mode[mode] = activation_bytes(empty_model(MODEL), config, torch.float32, 128)
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
    assert [line.split()[0] for line in lines[2:13]] == [f"{2**n:,}" for n in range(11)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("packing", ["forest", "none"])
def test_activations_are_linear_in_tokens(mode, packing):
    config = TrainConfig(activation_checkpointing=mode, packing=packing)
    line = activation_line(empty_model(MODEL), config, torch.bfloat16)
    for num_tokens in (5000, 32768):
        direct = activation_bytes(empty_model(MODEL), config, torch.bfloat16, num_tokens)
        assert line(num_tokens) == pytest.approx(direct, rel=0.02)


def test_padded_batches_need_their_logits():
    forest, padded = (
        activation_bytes(empty_model(MODEL), TrainConfig(packing=packing), torch.float32, 128)
        for packing in ("forest", "none")
    )
    logits = empty_model(MODEL)(torch.zeros(1, 128, dtype=torch.int64, device="meta")).logits
    assert padded - forest == 3 * logits.nbytes


@pytest.mark.parametrize(
    ("room", "largest_query", "expected"),
    [
        (10_000, 0, 9 * 1024),
        (9 * 1024, 0, 9 * 1024),
        (9 * 1024 - 1, 0, 8 * 1024),
        (1e9, 0, 32768),
        (2047, 0, 2048),  # even the smallest does not fit
        (0, 2048, 2048),
        (0, 2049, 3072),
        (10_000, 2049, 9 * 1024),
        (10_000, 9999, 10 * 1024),
        (1e9, 40_000, 40 * 1024),
    ],
)
def test_the_size_chosen(room, largest_query, expected):
    assert choose_tokens(float, room, largest_query) == expected


def resolve(config, memories, monkeypatch):
    """The pack size chosen by ranks whose GPUs have these bytes."""

    class Ranks(World):
        def gather(self, value):
            assert value == memories[0]
            return memories

    properties = SimpleNamespace(total_memory=memories[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    before = torch.get_rng_state()
    num_tokens = prepare._resolve_pack(config, Ranks(torch.device("cuda")), 3098)
    assert torch.equal(torch.get_rng_state(), before)  # as if the number had been given
    return num_tokens


@pytest.mark.parametrize("use_peft", [False, True])
def test_auto_fills_85_percent_of_the_smallest_gpu(use_peft, monkeypatch):
    config = TrainConfig(max_tokens_per_pack="auto", model_name_or_path=MODEL, dtype="bfloat16")
    config = replace(config, use_peft=use_peft)
    lm = empty_model(MODEL)
    if use_peft:
        add_lora(lm, config)
    total = {
        n: sum(astuple(estimate(lm, config, torch.bfloat16, 1, activation_bytes(
            lm, config, torch.bfloat16, n)))) for n in (8192, 9216)
    }  # fmt: skip
    for share, expected in ((0.8501, 8192), (0.8499, 9216)):
        memory = total[9216] / share
        assert resolve(config, [80 * 2**30, memory], monkeypatch) == expected
    assert resolve(config, [1, 80 * 2**30], monkeypatch) == 4096
    assert resolve(config, [80 * 2**30], monkeypatch) == 32768


def test_dry_run_chooses_packs_for_each_number_of_gpus(monkeypatch):
    config = TrainConfig(max_tokens_per_pack="auto", model_name_or_path=MODEL)
    lm = empty_model(MODEL)
    activations = {n: activation_bytes(lm, config, torch.bfloat16, n) for n in (2048, 9216, 32768)}
    just_too_much = sum(astuple(estimate(lm, config, torch.bfloat16, 1, activations[9216])))
    for num_bytes, sizes in (
        (80 * 2**30, [32768]),
        (1, [2048]),
        (just_too_much / 0.8501, [8192, *10 * [9216]]),  # more GPUs: less of the weights each
    ):
        monkeypatch.setattr(memory, "DRY_RUN_MEMORY", num_bytes)
        first, _, *rows = memory_table(config).splitlines()
        assert f"packs of {', '.join(map(str, sizes))} tokens (auto, on GPUs of 80 GiB)" in first
        assert rows[-1].split()[5] == f"{activations[sizes[-1]] / 2**30:.2f}"
