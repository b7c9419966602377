"""Saved models: they stop where they learned to, and keep what their tokenizer brings."""

import json
import stat

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from rrhf_fast import TrainConfig, train
from rrhf_fast.engine.save import SaveFailed, write_model
from rrhf_fast.export import main as export
from tests.data.test_chat import CHATML, SPACED, make_tokenizer, user


def make_model(folder, tokenizer, **generation):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    lm = AutoModelForCausalLM.from_config(config)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation:
        settings = json.loads((folder / "generation_config.json").read_text()) | generation
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def run(tmp_path, model, *, messages=True, **options):
    prompt = user() if messages else "Say cat"
    row = {"prompt": prompt, "responses": ["cat", "dog"], "scores": [1, 0]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    settings = dict(
        model_name_or_path=model,
        train_data=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "out"),
        train_batch_size=8,
        max_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    train(TrainConfig(**settings | options))
    return tmp_path / "out"


def answer(folder):
    """What plain transformers generates from the folder."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer(CHATML)
    ids = tokenizer.apply_chat_template(
        user(), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = lm.generate(**ids, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def ends(folder):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_base_model_that_learned_a_chat_stops_by_itself(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    model = make_model(tmp_path / "model", tokenizer)
    out = run(tmp_path, model, max_steps=60, save_steps=60)
    turn, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    assert sorted(ends(out)) == sorted([turn, eos])
    assert answer(out) == "cat<|im_end|>"
    exported = tmp_path / "exported"
    assert export(["--checkpoint", str(out / "checkpoint-60"), "--output_dir", str(exported)]) == 0
    assert answer(exported) == "cat<|im_end|>"
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"


def test_text_ends_with_eos_alone(tmp_path):
    tokenizer = make_tokenizer()
    out = run(tmp_path, make_model(tmp_path / "model", tokenizer), messages=False)
    assert ends(out) == tokenizer.eos_token_id


def test_adapters_say_where_to_stop_and_so_does_the_merged_model(tmp_path):
    pytest.importorskip("peft")
    tokenizer = make_tokenizer(CHATML)
    out = run(tmp_path, make_model(tmp_path / "model", tokenizer), use_peft=True)
    merged = tmp_path / "merged"
    options = ["--merge", "true", "--output_dir", str(merged)]
    assert export(["--checkpoint", str(out), *options]) == 0
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn in ends(out) and turn in ends(merged)


@pytest.mark.parametrize("setting", [{"temperature": 0.6}, {"top_p": 0.9, "top_k": 7}])
def test_settings_that_transformers_would_not_save(setting, tmp_path):
    """Published models have a temperature without sampling, which `save_pretrained` refuses."""
    model = make_model(tmp_path / "model", make_tokenizer(CHATML), do_sample=False, **setting)
    out = run(tmp_path, model)
    config = GenerationConfig.from_pretrained(out)
    assert {name: getattr(config, name) for name in setting} == setting


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_named_templates_survive_one_save_and_another(tmp_path):
    templates = {"default": CHATML, "tool_use": SPACED}
    model = make_model(tmp_path / "model", make_tokenizer(templates))
    out = run(tmp_path, model)
    first = files(out)
    assert "additional_chat_templates/tool_use.jinja" in first
    assert AutoTokenizer.from_pretrained(out).chat_template == templates
    assert run(tmp_path, model, overwrite_output_dir=True) == out and files(out) == first
    for path in out.rglob("*"):
        wanted = stat.S_IRUSR | stat.S_IWUSR | (stat.S_IXUSR if path.is_dir() else 0)
        assert path.stat().st_mode & wanted == wanted
    again = run(tmp_path, str(out), output_dir=str(tmp_path / "again"))
    assert AutoTokenizer.from_pretrained(again).chat_template == templates


def test_what_an_earlier_save_left_is_gone(tmp_path):
    run(tmp_path, make_model(tmp_path / "model", make_tokenizer({"default": CHATML, "b": SPACED})))
    plain = make_model(tmp_path / "plain", make_tokenizer(CHATML))
    out = tmp_path / "out"
    (out / "model-00001-of-00002.safetensors").write_bytes(b"")
    (out / "notes.txt").write_text("mine")
    run(tmp_path, plain, overwrite_output_dir=True)
    assert not (out / "additional_chat_templates").exists()
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML


def test_a_tokenizer_that_cannot_be_saved_costs_nothing(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(CHATML)
    folder = tmp_path / "model"
    make_model(folder, tokenizer)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    lm = AutoModelForCausalLM.from_pretrained(folder)

    def fails(_):
        raise OSError("no space left")

    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    with pytest.raises(SaveFailed, match="could not be written .no space left"):
        write_model(lm, tokenizer, folder, dtype=torch.float32, weights=lm.state_dict())
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
