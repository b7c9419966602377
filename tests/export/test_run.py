"""The export command: an exported model has the logits of the trained one."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.export.__main__ import main


def make_model(folder, *, tied, dtype=torch.float32):
    """A random model with a chat template and its own generation settings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=576, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).to(dtype)
    lm.generation_config.temperature, lm.generation_config.do_sample = 0.7, True
    lm.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained(folder, model, **options):
    """Train for two steps with a checkpoint after the second."""
    lines = demo.TRAIN_FILE.read_text().splitlines(keepends=True)[:8]
    (folder / "rows.jsonl").write_text("".join(lines))
    return train(
        TrainConfig(
            model_name_or_path=model, train_data=str(folder / "rows.jsonl"), train_batch_size=4,
            max_steps=2, save_steps=2, learning_rate=1e-2, output_dir=str(folder / "out"),
            **options,
        )
    )  # fmt: skip


@torch.no_grad()
def logits(folder):
    ids = torch.arange(40)[None]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def export(folder, **options):
    arguments = ["--checkpoint", str(folder / "out/checkpoint-2")]
    options = {"output_dir": str(folder / "model")} | options
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    assert main(arguments) == 0
    return Path(options["output_dir"])


def test_a_checkpoint_of_a_version_with_lora_dropout(tmp_path):
    trained(tmp_path, make_model(tmp_path / "source", tied=True))
    file = tmp_path / "out/checkpoint-2/trainer_state.json"
    state = json.loads(file.read_text())
    del state["checksums"]  # which came later
    (file.parent / "checksums.json").unlink()
    file.write_text(json.dumps(state | {"config": state["config"] | {"lora_dropout": 0.0}}))
    assert torch.equal(logits(export(tmp_path)), logits(tmp_path / "out"))
    config = {name: value for name, value in state["config"].items() if name != "max_steps"}
    config |= {"max_steps": 3, "resume_from_checkpoint": "latest"}
    assert train(TrainConfig(**config)).steps == 3


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_checkpoint_becomes_a_model(tmp_path, tied):
    source = make_model(tmp_path / "source", tied=tied)
    trained(tmp_path, source)
    model = export(tmp_path)
    assert torch.equal(logits(model), logits(tmp_path / "out"))
    assert not torch.allclose(logits(model), logits(source), atol=1e-2)
    name = "chat_template.jinja"
    assert (model / name).read_text() == (Path(source) / name).read_text()
    before, after = (
        json.loads((Path(folder) / "generation_config.json").read_text())
        for folder in (source, model)
    )
    learned = {"eos_token_id": [before["eos_token_id"], 1], "pad_token_id": 2}
    assert after == before | learned  # from the tokenizer; the config lacked them
    assert sorted(p.name for p in model.iterdir()) == sorted(p.name for p in Path(source).iterdir())


def test_the_dtype_is_the_sources_by_default(tmp_path):
    trained(tmp_path, make_model(tmp_path / "source", tied=True, dtype=torch.bfloat16))
    exact = export(tmp_path, dtype="float32", output_dir=str(tmp_path / "exact"))
    for folder, dtype in (
        (tmp_path / "out", torch.bfloat16),
        (export(tmp_path), torch.bfloat16),
        (exact, torch.float32),
    ):
        lm = AutoModelForCausalLM.from_pretrained(folder)
        assert lm.dtype == dtype and lm.model.norm.weight.dtype == dtype, folder
    rounded = logits(tmp_path / "out")
    assert torch.equal(rounded, logits(tmp_path / "model"))
    assert 0 < (rounded - logits(exact)).abs().max() < 0.05


def test_adapters_are_exported_alone_or_merged(tmp_path):
    source = make_model(tmp_path / "source", tied=False)
    result = trained(tmp_path, source, use_peft=True, lora_r=4)
    out = result.output_dir
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == source and settings["r"] == 4
    assert not (out / "model.safetensors").exists()
    expected = logits(out)  # transformers loads them with their base model
    assert not torch.allclose(expected, logits(source), atol=1e-2)
    alone = export(tmp_path)
    name = "adapter_model.safetensors"
    assert (alone / name).read_bytes() == (out / name).read_bytes()
    merged = export(tmp_path, merge="true", output_dir=str(tmp_path / "merged"))
    also = export(tmp_path, merge="true", checkpoint=str(out), output_dir=str(tmp_path / "also"))
    for folder in (merged, also):
        assert not (folder / "adapter_config.json").exists()
        assert torch.allclose(logits(folder), expected, atol=1e-5)


def test_adapters_without_their_options_are_refused(tmp_path, capsys):
    source = make_model(tmp_path / "source", tied=False)
    trained(tmp_path, source, use_peft=True, lora_r=4)
    folder = tmp_path / "out/checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())
    for name in ("model_name_or_path", "lora_r", "lora_alpha", "lora_target_modules"):
        config = {key: value for key, value in state["config"].items() if key != name}
        (folder / "trainer_state.json").write_text(json.dumps(state | {"config": config}))
        (folder / "checksums.json").unlink(missing_ok=True)
        assert main(["--checkpoint", str(folder), "--output_dir", str(tmp_path / "model")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.endswith(f"checkpoint: {folder}: trainer_state.json: config lacks {name}")


def test_a_mistake_has_its_exit_code_and_line(tmp_path, capsys):
    trained(tmp_path, make_model(tmp_path / "source", tied=True))
    checkpoint = tmp_path / "out/checkpoint-2"
    cases = {
        "checkpoint: expected a complete checkpoint": (tmp_path, "model", "false"),
        "already holds a model": (checkpoint, "out", "false"),
        "holds no LoRA adapters": (checkpoint, "model", "true"),
    }
    for problem, (folder, target, merge) in cases.items():
        arguments = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / target)]
        assert main([*arguments, "--merge", merge]) == 2
        assert problem in capsys.readouterr().err
    (tmp_path / "file").touch()
    arguments = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "file")]
    assert main(arguments) == 1
    assert "could not be written" in capsys.readouterr().err
    os.unlink(checkpoint / ".metadata")
    assert main([*arguments[:3], str(tmp_path / "model")]) == 2
    assert not (tmp_path / "model").exists()


TOKENS_KEPT_AS = {
    "whole embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved with the adapters": {},
    "single tokens": {"trainable_token_indices": [576, 577]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", TOKENS_KEPT_AS)
def test_adapters_of_a_model_with_added_tokens(kind, tied, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_model(tmp_path / "base", tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{i}>" for i in range(578 - len(tokenizer))])
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(lm, peft.LoraConfig(**settings | TOKENS_KEPT_AS[kind]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters, merged = tmp_path / "adapters", tmp_path / "merged"
    model.save_pretrained(adapters, save_embedding_layers=kind != "single tokens" or "auto")
    tokenizer.save_pretrained(adapters)
    options = ["--merge", "true", "--output_dir", str(merged)]
    assert main(["--checkpoint", str(adapters), *options]) == 0
    with torch.no_grad():
        expected = model.eval()(torch.arange(538, 578)[None]).logits
        lm = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        torch.testing.assert_close(lm(torch.arange(538, 578)[None]).logits, expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_adapters_of_embeddings_without_their_weights_are_refused(tied, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    lm = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "base", tied=tied))
    lm.resize_token_embeddings(578, mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    adapters = tmp_path / "adapters"
    peft.get_peft_model(lm, config).save_pretrained(adapters)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(adapters)
    options = ["--merge", "true", "--output_dir", str(tmp_path / "merged")]
    assert main(["--checkpoint", str(adapters), *options]) == 2
    why = "the head shares" if tied else "2 tokens more than its base, and they do not hold lm_head"
    assert why in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "merged").exists()


def test_adapters_of_another_model_are_refused(tmp_path, capsys):
    pytest.importorskip("peft")
    model = make_model(tmp_path / "base", tied=False)
    trained(tmp_path, model, use_peft=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(demo.MODEL_DIR)
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    options = ["--merge", "true", "--output_dir", str(tmp_path / "merged")]
    assert main(["--checkpoint", str(tmp_path / "out"), *options]) == 2
    assert f"do not fit {demo.MODEL_DIR}" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert main(["--checkpoint", str(tmp_path / "out"), *options]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err.splitlines()[-1]


def merge_from(folder, monkeypatch, checkpoint, *options):
    """Merge adapters while in another folder."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    return main(["--checkpoint", str(checkpoint), "--merge=true", "--output_dir=merged", *options])


@pytest.mark.parametrize("name", ["out", "out/checkpoint-2"])
def test_a_base_that_was_named_by_a_relative_path(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "models" / "base", tied=False)
    trained(tmp_path, "models/base", use_peft=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # From elsewhere it is found above the adapters, also by a relative path to them.
    elsewhere = tmp_path / "elsewhere"
    assert merge_from(elsewhere, monkeypatch, f"../{name}") == 0
    note = f"note: the base model models/base is taken to be {tmp_path.resolve()}/models/base"
    assert note in capsys.readouterr().out
    expected = logits(elsewhere / "merged")
    # What is here comes first, if it is a model.
    (elsewhere / "models" / "base").mkdir(parents=True)
    for place, here in (("empty", False), ("model", True)):
        if here:
            make_model(elsewhere / "models" / "base", tied=False)
        (elsewhere / "merged").rename(elsewhere / f"before {place}")
        assert merge_from(elsewhere, monkeypatch, f"../{name}") == 0
        assert (note in capsys.readouterr().out) == (not here)
        assert torch.equal(logits(elsewhere / "merged"), expected)

    # Moved away, it can be named.
    (tmp_path / "models" / "base").rename(tmp_path / "moved")
    (elsewhere / "models" / "base").rename(elsewhere / "also moved")
    last = tmp_path / "last"
    assert merge_from(last, monkeypatch, f"../{name}") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    problem = "base_model_name_or_path: models/base: no such folder"
    assert f"rrhf_fast.export: error: checkpoint: ../{name}: {problem}" in line
    assert not (last / "merged").exists()
    base = "--base_model_name_or_path=../moved"
    assert merge_from(last, monkeypatch, f"../{name}", base) == 0
    assert torch.equal(logits(last / "merged"), expected)
    if name != "out":  # and recorded in adapters exported alone
        assert main([f"--checkpoint=../{name}", "--output_dir=adapters", base]) == 0
        settings = json.loads((last / "adapters" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "../moved"
    wrong = "--base_model_name_or_path=../nowhere"
    (last / "merged").rename(last / "before")
    assert merge_from(last, monkeypatch, f"../{name}", wrong) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "rrhf_fast.export: error: base_model_name_or_path: ../nowhere: no such folder" in line


def test_a_base_for_what_has_none_is_refused(tmp_path, capsys):
    source = make_model(tmp_path / "source", tied=True)
    trained(tmp_path, source)
    options = ["--checkpoint", str(tmp_path / "out/checkpoint-2"), "--output_dir", "model"]
    assert main([*options, "--base_model_name_or_path", source]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("rrhf_fast.export: error: base_model_name_or_path: ")
    assert line.endswith("checkpoint-2 holds no LoRA adapters")
