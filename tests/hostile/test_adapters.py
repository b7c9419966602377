"""Adapters from anywhere: merged as peft merges them, or refused in one line."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import demo
from tests.hostile.zoo import BAD_JSON, edit

peft = pytest.importorskip("peft", reason="adapters are merged by peft")
export = importlib.import_module("rrhf_fast.export.__main__").main

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
SMALL = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "plain": {},
    "all linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*layers\.[01]\..*(q|up)_proj"},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "dora": {"use_dora": True},
    "with a module": {"modules_to_save": ["norm"]},
    "with the head": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "single tokens": {"trainable_token_indices": [3, 5]},
    "ranks by layer": {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"v": 3}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "some layers": {"layers_to_transform": [1, 2]},
}


def make(folder, base=demo.MODEL_DIR, **settings):
    """Adapters as peft writes them, with random values; the model with them."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(lm, peft.LoraConfig(**SMALL | settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def merge(folder, out, *arguments):
    return export(
        ["--checkpoint", str(folder), "--merge", "true", "--output_dir", str(out), *arguments]
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make(tmp_path_factory.mktemp("good") / "adapters")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_merge_to_the_same_bits(kind, tmp_path, capsys):
    adapters = make(tmp_path / "adapters", **KINDS[kind])
    assert merge(adapters, tmp_path / "merged") == 0
    assert "error" not in capsys.readouterr().err
    lm = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(lm, adapters).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_adapters_without_a_tokenizer_get_that_of_their_base(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "adapters")
    for path in folder.glob("*token*"):
        path.unlink()
    assert merge(folder, tmp_path / "merged") == 0
    expected = AutoTokenizer.from_pretrained(demo.MODEL_DIR).get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == expected


def tensors(change):
    def on_folder(folder):
        content = load_file(folder / WEIGHTS)
        save_file(change(content) or content, folder / WEIGHTS)

    return on_folder


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def settings(**entries):
    return lambda folder: edit(folder / SETTINGS, **entries)


HOSTILE = {
    "missing tensor": (tensors(lambda t: t.pop(B) is None), f"{B} is missing"),
    "missing tensors": (
        tensors(lambda t: {A: t[A]}),
        "q_proj.lora_B.weight and 14 more are missing",
    ),
    "no tensors": (tensors(lambda t: {"x": torch.zeros(1)}), "and 15 more are missing"),
    "NaN": (tensors(lambda t: t[A].fill_(torch.nan) is None), f"{A} holds NaN"),
    "infinite": (tensors(lambda t: t[B][0].fill_(torch.inf) is None), f"{B} holds NaN or inf"),
    "foreign tensor": (
        tensors(lambda t: t.update(foreign=torch.zeros(2))),
        "foreign is not among their tensors",
    ),
    "other layer": (
        tensors(lambda t: t.update({A.replace("layers.0", "layers.9"): t[A] + 0})),
        "layers.9.self_attn.q_proj.lora_A.weight is not among",
    ),
    "other name": (
        tensors(lambda t: t.update({A.replace("lora_A", "lora_A.default"): t[A] + 0})),
        "lora_A.default.weight is not among",
    ),
    "other shape": (
        tensors(lambda t: t.update({A: torch.zeros(3, 64)})),
        f"{A}: expected [2, 64], found [3, 64]",
    ),
    "transposed": (tensors(lambda t: t.update({A: t[A].T.contiguous()})), "found [64, 2]"),
    "integers": (
        tensors(lambda t: t.update({A: t[A].long()})),
        f"{A} holds I64, expected floating-point numbers",
    ),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]),
        f"{WEIGHTS} cannot be read",
    ),
    "empty": (content(WEIGHTS, b""), f"{WEIGHTS} cannot be read"),
    "pickled": (content(WEIGHTS, b"\x80\x04."), f"{WEIGHTS} cannot be read"),
    "only pickles": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        f"holds no {WEIGHTS}",
    ),
    "no base": (settings(base_model_name_or_path=None), "base_model_name_or_path: expected"),
    "base of numbers": (settings(base_model_name_or_path=5), "expected the name of a model"),
    "base of no text": (settings(base_model_name_or_path=" "), "expected the name of a model"),
    "base in a list": (settings(base_model_name_or_path=["x"]), "expected the name of a model"),
    "base that is not there": (
        settings(base_model_name_or_path="/no/such/model"),
        "base_model_name_or_path: /no/such/model: no such folder",
    ),
    "base with a null byte": (settings(base_model_name_or_path="a\0b"), "base_model_name_or_path"),
    "base of half a pair": (settings(base_model_name_or_path="\ud800"), "surrogate"),
    "base itself": (
        lambda f: edit(f / SETTINGS, base_model_name_or_path=str(f)),
        "names the folder of the adapters",
    ),
    "rank 0": (settings(r=0), "r: expected an integer from 1"),
    "rank -1": (settings(r=-1), "r: expected an integer from 1"),
    "rank huge": (settings(r=10**12), "r: expected an integer from 1"),
    "rank larger": (settings(r=60_000), "expected [60000, 64], found [2, 64]"),
    "rank other": (settings(r=3), "expected [3, 64], found [2, 64]"),
    "rank text": (settings(r="2"), "r: expected an integer from 1"),
    "rank missing": (settings(r=None), "r: expected an integer from 1"),
    "rank pattern": (settings(rank_pattern={"q_proj": 10**9}), "rank_pattern[q_proj]: expected"),
    "rank pattern list": (settings(rank_pattern=[1]), "rank_pattern: expected an object"),
    "rank pattern (": (settings(rank_pattern={"(": 2}), "no regular expression"),
    "alpha NaN": (settings(lora_alpha=float("nan")), "lora_alpha: expected a finite number"),
    "alpha infinite": (settings(lora_alpha=float("inf")), "lora_alpha: expected a finite"),
    "alpha huge": (settings(lora_alpha=10**400), "lora_alpha: expected a finite number"),
    "alpha text": (settings(lora_alpha="x"), "lora_alpha: expected a finite number"),
    "alpha pattern": (settings(alpha_pattern={"q": "x"}), "alpha_pattern[q]: expected a finite"),
    "targets nothing": (settings(target_modules=["nothing"]), "do not fit"),
    "targets (": (settings(target_modules="("), "'(' is no regular expression"),
    "targets of numbers": (settings(target_modules=[1, 2]), "target_modules: expected names"),
    "targets none": (settings(target_modules=[]), "do not fit"),
    "targets without end": (settings(target_modules=r"(\w+\.?)+\w+(\w+\.?)+!"), "do not fit"),
    "targets more": (settings(target_modules=["q_proj", "v_proj", "o_proj"]), "are missing"),
    "targets fewer": (settings(target_modules=["q_proj"]), "not among their tensors"),
    "targets the norm": (settings(target_modules=["norm"]), "do not fit"),
    "modules of numbers": (settings(modules_to_save=[5]), "modules_to_save: expected names"),
    "modules": (settings(modules_to_save=["norm"]), "norm.weight and 8 more are missing"),
    "peft_type": (settings(peft_type="IA3"), "peft_type: expected LORA"),
    "peft_type unknown": (settings(peft_type="NEW"), "peft_type: expected LORA"),
    "peft_type missing": (settings(peft_type=None), "peft_type: expected LORA"),
    "task_type": (settings(task_type="NEW"), "Invalid task type"),
    "megatron": (
        settings(megatron_config={"a": 1}, megatron_core="evil"),
        "megatron_config: adapters with such settings",
    ),
    "layers": (settings(layer_replication=[[0, 10**12]]), "layer_replication"),
    "layers of text": (settings(layer_replication="x"), "do not fit|adapter_config.json"),
    "bias": (settings(bias="nonsense"), "do not fit|adapter_config.json"),
    "initialisation": (settings(init_lora_weights="nonsense"), "do not fit|adapter_config"),
    "token beyond": (settings(trainable_token_indices=[10**9]), "do not fit|missing"),
    "generation settings": (content("generation_config.json", b"[]"), "generation_config.json"),
    **{
        f"settings {kind}": (content(SETTINGS, data), "adapter_config.json|base_model_name")
        for kind, data in BAD_JSON.items()
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_adapters_are_refused_in_one_line(
    name, good, tmp_path, capfd, recwarn, monkeypatch
):
    limits = importlib.import_module("rrhf_fast.export.merge").FINDING_LAYERS
    monkeypatch.setattr(limits, "_seconds", 1)
    change, problem = HOSTILE[name]
    folder, out = shutil.copytree(good, tmp_path / "adapters"), tmp_path / "merged"
    change(folder)
    capfd.readouterr()
    code = merge(folder, out)
    error = capfd.readouterr().err.replace("\r", "\n")
    lines = [line for line in error.splitlines() if line.strip() and "it/s]" not in line]
    assert code == 2 and len(lines) == 1, (code, lines)
    start = f"rrhf_fast.export: error: checkpoint: {folder}"
    assert lines[0].startswith(start) and len(lines[0]) < 700, lines
    assert any(part in lines[0] for part in problem.split("|")), lines
    assert not out.exists()
    assert not recwarn.list


def test_a_base_that_is_adapters_itself(good, tmp_path, capsys):
    folder = shutil.copytree(good, tmp_path / "adapters")
    edit(folder / SETTINGS, base_model_name_or_path=str(good))
    assert merge(folder, tmp_path / "merged") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"checkpoint: {folder}: base_model_name_or_path: {good} holds LoRA adapters" in line


def test_a_base_with_other_weights(good, tmp_path, capsys):
    base = shutil.copytree(demo.MODEL_DIR, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    folder = shutil.copytree(good, tmp_path / "adapters")
    edit(folder / SETTINGS, base_model_name_or_path=str(base))
    assert merge(folder, tmp_path / "merged") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"checkpoint: {folder}: base_model_name_or_path: {base}: its weights are damaged" in line
    assert not (tmp_path / "merged").exists()


def test_adapters_that_overflow(tmp_path, capsys):
    folder = make(tmp_path / "adapters")
    weights = {name: x * 0 + 1e30 for name, x in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    assert merge(folder, tmp_path / "merged") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"checkpoint: {folder}: its weights are damaged" in line


def test_settings_of_a_newer_peft(good, tmp_path, capsys):
    folder = shutil.copytree(good, tmp_path / "adapters")
    edit(folder / SETTINGS, an_option_of_tomorrow=None)
    assert merge(folder, tmp_path / "merged") == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == 576
