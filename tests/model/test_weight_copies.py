"""Products with copies of the decoder's weights: as close to float64 as plain autocast, one cast
per weight and optimizer step, and nothing extra in saved models."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from rrhf_fast import TrainConfig, train
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.padded import build_padded
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import layers, weight_copies
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.lean_layers import use_own_layers
from rrhf_fast.model.lora import add_lora, init_lora
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.model.weight_copies import CopiedLinear
from rrhf_fast.train.adamw_bf16 import AdamWBF16
from rrhf_fast.train.distributed import World
from rrhf_fast.train.prepare import prepare

pytestmark = pytest.mark.usefixtures("fresh_compiler")
KINDS = {"llama": {}, "qwen2": {}, "llama tied": {"tie_word_embeddings": True}}  # Qwen2 has biases


def tiny(kind="llama", **sizes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    } | KINDS.get(kind, {}) | sizes  # fmt: skip
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split()[0], **sizes))
    with torch.no_grad():
        for parameter in lm.parameters():  # biases start at 0 and norms at 1
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return lm.eval()


def wrap(lm, dtype=torch.bfloat16, **options):
    return RRHFModel(lm, LossConfig(), max_length=64, compute_dtype=dtype, **options)


def queries(seed):
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return rng.integers(3, 97, rng.integers(low, high), dtype=np.int32)

    return [
        TokenisedQuery(draw(3, 20), [draw(2, 15) for _ in range(3)], rng.random(3, np.float32))
        for _ in range(2)
    ]


def packs(packing="forest", count=4):
    build = build_forest if packing == "forest" else build_padded
    return [build(queries(seed)) for seed in range(count)]


def step(model, packing="forest"):
    """The losses of several packs, and their summed gradients."""
    model.zero_grad()
    losses = []
    for pack in packs(packing):
        loss = model(pack).loss
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad.clone() for name, p in model.lm.named_parameters()}
    return {"loss": torch.tensor(losses).double()} | gradients


def errors(actual, exact):
    return {
        name: ((actual[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact
    }


def is_copied(model, name):
    return name.endswith("weight") and isinstance(
        model.lm.get_submodule(name.removesuffix(".weight")), CopiedLinear
    )


@pytest.mark.parametrize("products", ["in float32", "in bfloat16"])
@pytest.mark.parametrize("packing", ["forest", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_closer_to_float64_than_those_of_autocast(
    kind, packing, products, monkeypatch
):
    if products == "in float32":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no such products")
    lm = tiny(kind)
    exact = step(wrap(deepcopy(lm).double(), torch.float32, packing=packing), packing)
    plain = wrap(deepcopy(lm), packing=packing, is_sharded=True)
    copied = wrap(lm, packing=packing)
    assert not plain.copied and len(copied.copied) == 2 * 7
    expected, actual = step(plain, packing), step(copied, packing)
    before, after = errors(expected, exact), errors(actual, exact)
    weights, biases = [], []
    for name in exact:
        if is_copied(copied, name):
            weights.append(name)
        elif name.endswith("bias"):
            biases.append(name)
            continue  # too few numbers each; compared together below
        else:
            assert torch.equal(actual[name], expected[name]), name
        assert after[name] <= 1.05 * before[name] < 0.05, name
    # Not rounded per pack, weights' gradients have a smaller error; biases are too few to show it.
    # A CPU's products of 16 bits are rounded, as those of autocast are.
    of_weights = 0.99 if products == "in float32" else 1.001
    for names, factor in ((weights, of_weights), (biases, 1.05)):
        before, after = (
            sum((run[name] - exact[name]).square().sum() for name in names) ** 0.5
            for run in (expected, actual)
        )
        assert after <= factor * before


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_compilation_and_checkpointing_change_nothing(kind, checkpointing):
    lm = tiny(kind)
    plain = wrap(deepcopy(lm))
    if checkpointing != "none":
        use_own_layers(plain.lm)  # as there
    expected = step(plain)
    options = {"activation_checkpointing": checkpointing}
    actual = step(wrap(deepcopy(lm), **options))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    compiled, plain = (
        wrap(deepcopy(lm), compile=True, is_sharded=sharded, **options) for sharded in (False, True)
    )
    exact = step(wrap(lm.double(), torch.float32))
    actual, expected = step(compiled), step(plain)
    before, after = errors(expected, exact), errors(actual, exact)
    weights = [name for name in exact if is_copied(compiled, name)]
    assert len(weights) == 2 * 7 and max(after.values()) < 0.05
    assert all(after[name] <= 1.05 * before[name] for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_generated_code_adds_in_place(checkpointing, monkeypatch):
    """Not into a copy of the gradient, which would cost the saved traffic."""
    monkeypatch.setattr(layers, "COMPILER", "inductor")
    lm, places, add = tiny("qwen2"), [], weight_copies.add_product
    exact = step(wrap(deepcopy(lm).double(), torch.float32))
    model = wrap(lm, compile=True, activation_checkpointing=checkpointing)
    noted = lambda total, a, b: places.append(total.data_ptr()) or add(total, a, b)  # noqa: E731
    monkeypatch.setattr(weight_copies, "add_product", noted)
    assert max(errors(step(model), exact).values()) < 0.05
    assert set(places) == {layer.weight.grad.data_ptr() for layer in model.copied}
    assert len(places) == len(packs()) * len(model.copied)


def test_layers_and_steps_share_their_graphs():
    """As many graphs as without copies, and no new ones for new gradients."""
    made = []
    for is_sharded in (True, False):
        torch._dynamo.reset()
        before = layers.count_graphs()
        model = wrap(tiny(), compile=True, is_sharded=is_sharded)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(3):
            step(model)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(packs()[0])
            made.append(layers.count_graphs() - before)
    assert len(set(made)) == 1, made


class Casts(TorchDispatchMode):
    """Counts casts to 16 bits per parameter."""

    def __init__(self, lm):
        super().__init__()
        self._names = {p.data_ptr(): name for name, p in lm.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        copies = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}
        source = copies.get(function.overloadpacket)
        if source is not None and out.dtype == torch.bfloat16:
            name = self._names.get(args[source].data_ptr())
            self.counts.update([name] if name else [])
        return out


def casts(model, optimizer, num_steps=1):
    """Casts of each weight in `num_steps` steps; each step trains on several packs and scores."""
    with Casts(model.lm) as counter:
        for _ in range(num_steps):
            for pack in packs():
                with torch.no_grad():
                    model(pack)
                model(pack).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    counts = counter.counts.items()
    return {name: n for name, n in counts if ".layers." in name and "weight" in name}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_weight_is_cast_once_per_step(checkpointing):
    options = {"activation_checkpointing": checkpointing}
    plain, copied = wrap(tiny(), is_sharded=True, **options), wrap(tiny(), **options)
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in (plain, copied)]
    assert min(casts(plain, optimizers[0]).values()) >= 2 * 4  # at least once per forward
    assert casts(copied, optimizers[1]) == {
        name: 1 for name, _ in copied.lm.named_parameters() if is_copied(copied, name)
    }
    assert set(casts(copied, optimizers[1], num_steps=3).values()) == {3}
    with Casts(copied.lm) as counter, torch.no_grad():
        for pack in packs():
            copied(pack)
    assert {n for name, n in counter.counts.items() if ".layers." in name} == {1}
    with Casts(copied.lm) as counter, copied.generation(), copied.autocast():
        copied.lm.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False)
    assert not [name for name in counter.counts if ".layers." in name]


class Unnoted(torch.optim.SGD):
    """Writes without incrementing versions, like a kernel."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


def updates():
    def optimizer_of(make):
        def update(model):
            optimizer = make(model.parameters())
            model(packs()[0]).loss.backward()
            optimizer.step()

        return update

    @torch.no_grad()
    def in_place(model):
        for p in model.parameters():
            p.mul_(1.5)

    def reloaded(model):
        model.load_state_dict(
            {name: 1.5 * tensor for name, tensor in model.state_dict().items()}, strict=True
        )

    def assigned(model):
        state = {name: nn.Parameter(1.5 * t) for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    def new_data(model):
        for p in model.parameters():
            p.data = 1.5 * p.data

    return {
        "fused": optimizer_of(lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True)),
        "foreach": optimizer_of(lambda ps: torch.optim.AdamW(ps, lr=0.1)),
        "bf16 moments": optimizer_of(lambda ps: AdamWBF16(ps, lr=0.1)),
        "a kernel": optimizer_of(Unnoted),
        "in place": in_place,
        "load_state_dict": reloaded,
        "assign": assigned,
        "data": new_data,
    }


@pytest.mark.parametrize("compile", [False, True])
def test_copies_follow_changes_of_the_weights(compile):
    pack, ids = packs()[1], torch.arange(3, 9)[None]
    model = wrap(tiny(), compile=compile)
    fresh = wrap(tiny(), compile=compile, is_sharded=True)
    autocast = torch.autocast("cpu", torch.bfloat16)
    losses = []
    for name, update in updates().items():
        update(model)
        model.zero_grad()
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            losses.append(model(pack).loss.item())
            assert losses[-1] == fresh(pack).loss.item(), name
        for layer in model.copied:
            assert torch.equal(layer.weight_copy, layer.weight.bfloat16()), name
        # Also outside of the model.
        update(model)
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad(), model.generation(), fresh.generation(), autocast:
            assert torch.equal(model.lm(ids).logits, fresh.lm(ids).logits), name
    assert len(set(losses)) == len(losses)


def test_gradients_may_be_cleared_at_any_time():
    """Also between a forward and its backward, and with other gradients already present."""
    model = wrap(tiny())
    expected = step(model)
    for number, pack in enumerate(packs()):
        loss = model(pack).loss
        if number == 0:
            model.zero_grad()
        loss.backward()
    gradients = {name: p.grad for name, p in model.lm.named_parameters()}
    assert all(torch.equal(gradients[name], expected[name]) for name in gradients)
    loss = model(packs()[0]).loss
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss.backward()
    with_ones = {name: p.grad.clone() for name, p in model.lm.named_parameters()}
    model.zero_grad(set_to_none=False)
    model(packs()[0]).loss.backward()
    for name, parameter in model.lm.named_parameters():
        torch.testing.assert_close(with_ones[name], parameter.grad + 1)


def test_two_forwards_may_precede_a_backward():
    model = wrap(tiny())
    first, second, *_ = packs()
    (model(first).loss + model(second).loss).backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for pack in (first, second):
        model(pack).loss.backward()
    for gradient, parameter in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_copies_are_not_saved(tmp_path):
    model, plain = wrap(tiny()), wrap(tiny(), is_sharded=True)
    step(model)
    for find in (nn.Module.state_dict, lambda m: dict(m.named_parameters()),
                 lambda m: dict(m.named_buffers())):  # fmt: skip
        assert list(find(model)) == list(find(plain))
    with model.generation():
        model.lm.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.lm.parameters(), strict=True)
    )


def test_only_weights_trained_in_float32_have_copies():
    assert not wrap(tiny(), torch.float32).copied
    frozen = tiny()
    for layer in frozen.model.layers[:1]:
        layer.requires_grad_(False)
    model = wrap(frozen)
    assert len(model.copied) == 7
    model(packs()[0]).loss.backward()
    for number, layer in enumerate(frozen.model.layers):
        assert all((p.grad is not None) == (number == 1) for p in layer.parameters())
    shared = tiny()
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    assert len(wrap(shared).copied) == 2 * 7 - 2


@pytest.mark.parametrize("compile", [False, True])
def test_weights_on_frozen_inputs_are_trained(compile):
    expected = step(wrap(tiny(), compile=compile))
    lm = tiny()
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("proj" in name)
    model = wrap(lm, compile=compile)
    for pack in packs():
        model(pack).loss.backward()
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0.02, atol=0.02)
        else:
            assert parameter.grad is None


def test_adapters_have_no_copies():
    pytest.importorskip("peft")
    lm = tiny()
    add_lora(lm, TrainConfig())
    init_lora(lm, 0)
    assert not wrap(lm).copied


def test_a_deep_copy_is_independent():
    model = wrap(tiny())
    expected = step(model)
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    gradients = step(other)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(
        torch.device("cpu"),
        mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")),
    )
    dist.destroy_process_group()


def test_a_run_has_copies_unless_it_is_sharded(tmp_path, one_rank):
    config = TrainConfig(dtype="bfloat16", max_steps=1)
    for world, has_copies in ((World(torch.device("cpu")), True), (one_rank, False)):
        run = prepare(replace(config, output_dir=str(tmp_path / f"{has_copies}")), world)
        assert bool(run.model.copied) == has_copies
        kinds = [type(module) for module in run.model.modules()]
        assert (CopiedLinear in kinds) == has_copies


def test_a_run_trains_with_copies_and_resumes(tmp_path):
    """A resumed run ends like an uninterrupted one."""
    options = {"max_steps": 4, "dtype": "bfloat16", "train_batch_size": 8, "save_steps": 2}
    whole = TrainConfig(output_dir=str(tmp_path / "whole"), **options)
    train(whole)
    again = TrainConfig(
        output_dir=str(tmp_path / "again"),
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
        **options,
    )
    train(again)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "again")
    )
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_without_autocast_the_weights_are_used():
    model, plain, ids = wrap(tiny()), wrap(tiny(), is_sharded=True), torch.arange(3, 9)[None]
    logits = []
    for m in (model, plain):
        with m.generation():
            logits.append(m.lm(ids).logits)
    assert torch.equal(*logits) and logits[0].dtype == torch.float32
