"""A saved folder: generation stops where training taught it to; all tokenizer files are kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rrhf_fast import TrainConfig, train
from rrhf_fast.export.__main__ import main
from rrhf_fast.model.save import SaveFailed, learn_end_tokens

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Name a pet"}]


def make_tokenizer(template=TEMPLATE):
    """Byte tokens, an EOS that does not end turns, and tokens that delimit turns."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|eos|>", "<|turn|>", "<|end|>")
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder, tokenizer, generation=None):
    """A random base model; `generation` adds entries to its generation_config.json."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    if generation is not None:
        path.write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id} | generation))
    return str(folder)


def run(folder, model, prompt=MESSAGES, **options):
    """Train until the model generates the first response."""
    row = {"prompt": prompt, "responses": ["cat", "dog"], "scores": [1, 0]}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    options = {"max_steps": 60, "learning_rate": 1e-2, "output_dir": str(folder / "out")} | options
    return train(
        TrainConfig(
            model_name_or_path=model, train_data=str(folder / "rows.jsonl"), train_batch_size=8,
            lr_scheduler_type="constant", overwrite_output_dir=True, **options,
        )
    ).output_dir  # fmt: skip


def says(folder, **options):
    """The output of plain transformers for the folder."""
    lm = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = lm.generate(**ids, max_new_tokens=20, do_sample=False, **options)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def export(folder, checkpoint, **options):
    arguments = ["--checkpoint", str(checkpoint), "--output_dir", str(folder)]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    assert main(arguments) == 0
    return folder


def settings(folder):
    return json.loads((Path(folder) / "generation_config.json").read_text())


def test_a_model_trained_on_messages_stops_by_itself(tmp_path):
    tokenizer = make_tokenizer()
    out = run(tmp_path, make_model(tmp_path / "base", tokenizer), save_steps=60)
    exported = export(tmp_path / "exported", out / "checkpoint-60")
    for folder in (out, exported):
        assert says(folder) == "cat<|end|>"
        config = GenerationConfig.from_pretrained(folder)
        assert sorted(config.eos_token_id) == [256, 258] and config.pad_token_id == 256
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<|eos|>"
        assert AutoConfig.from_pretrained(folder).eos_token_id == 256
    assert settings(out / "checkpoint-60") == settings(out)
    again = run(tmp_path, str(out), output_dir=str(tmp_path / "again"), max_steps=1)
    assert settings(again)["eos_token_id"] == settings(out)["eos_token_id"]


def test_adapters_carry_the_end_tokens_and_a_merged_model_stops(tmp_path):
    model = make_model(tmp_path / "base", make_tokenizer())
    options = {
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 64,
        "max_steps": 150,
        "save_steps": 150,
    }
    out = run(tmp_path, model, **options)
    checkpoint = out / "checkpoint-150"
    alone = export(tmp_path / "alone", checkpoint)
    for folder in (out, alone):
        config = GenerationConfig.from_pretrained(folder)
        assert config.eos_token_id == [256, 258]
        assert says(folder, generation_config=config) == "cat<|end|>"
    for name, source in {"merged": out, "from a checkpoint": checkpoint, "alone": alone}.items():
        assert says(export(tmp_path / f"{name}, merged", source, merge="true")) == "cat<|end|>"
    assert settings(tmp_path / "base")["eos_token_id"] == 256


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 0.6, "top_p": 0.9, "do_sample": False},
        {"pad_token_id": -1},
        {"length_penalty": 0.5, "output_scores": True},
        {"eos_token_id": [256, 257]},
        {"pad_token_id": 7, "do_sample": True, "top_k": 20},
    ],
    ids=str,
)
def test_settings_that_transformers_refuses_to_save_are_kept(tmp_path, generation):
    model = make_model(tmp_path / "base", make_tokenizer(), generation)
    out = run(tmp_path, model, max_steps=1, save_steps=1)
    exported = export(tmp_path / "exported", out / "checkpoint-1")
    ends = generation.get("eos_token_id", [256])
    pad = max(generation.get("pad_token_id", 256), 0) or 256
    for folder in (out, out / "checkpoint-1", exported):
        saved = settings(folder)
        assert saved.pop("eos_token_id") == [*ends, 258]
        assert saved.pop("pad_token_id") == (256 if generation.get("pad_token_id") == -1 else pad)
        for name, value in generation.items():
            if name not in ("eos_token_id", "pad_token_id"):
                assert saved.get(name, getattr(GenerationConfig(), name) or value) == value
    AutoModelForCausalLM.from_pretrained(out)


def test_without_generation_config_and_with_text_prompts(tmp_path):
    model = make_model(tmp_path / "base", make_tokenizer())
    os.unlink(tmp_path / "base/generation_config.json")
    out = run(tmp_path, model, prompt="Name a pet:", max_steps=1)
    assert settings(out)["eos_token_id"] == 256  # training taught EOS


def test_end_tokens_are_unique_and_a_single_one_is_a_number(tmp_path):
    tokenizer = make_tokenizer()
    lm = LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, vocab_size=9, hidden_size=32))
    for known, learned, expected in (
        (None, [256], 256), (256, [256], 256), ([258, 256, 258], [256], [258, 256]),
        (2, [256, 258], [2, 256, 258]), ([], [258], 258),
    ):  # fmt: skip
        lm.generation_config = GenerationConfig(eos_token_id=known)
        learn_end_tokens(lm, tokenizer, learned)
        assert lm.generation_config.eos_token_id == expected
    lm.generation_config = None  # the model does not generate
    learn_end_tokens(lm, tokenizer, [256])


def contents(folder):
    """Relative path -> bytes, without the run's records."""
    ours = {"metrics.jsonl", "training.png"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ours
    }


def test_named_templates_are_saved_again_and_again(tmp_path):
    templates = {"default": TEMPLATE, "tool_use": TEMPLATE + " ", "rag": TEMPLATE + "  "}
    model = make_model(tmp_path / "base", make_tokenizer(templates))
    before = os.umask(0o027)
    try:
        for _ in range(2):
            out = run(tmp_path, model, max_steps=1, save_steps=1)
            assert AutoTokenizer.from_pretrained(out).chat_template == templates
            assert {path.stat().st_mode & 0o777 for path in out.rglob("*.j*")} == {0o640}
            assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o640
            assert (out / "additional_chat_templates").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)
    exported = export(tmp_path / "exported", out / "checkpoint-1")
    for folder in (out / "checkpoint-1", exported):
        assert AutoTokenizer.from_pretrained(folder).chat_template == templates
    assert not (out / ".saving").exists()


def test_stale_files_of_an_earlier_save_are_removed(tmp_path):
    """Other shards, templates, adapters and settings; the user's own files stay."""
    plain = make_model(tmp_path / "plain", make_tokenizer())
    fresh = run(tmp_path, plain, max_steps=1, output_dir=str(tmp_path / "fresh"))
    named = make_tokenizer({"default": TEMPLATE, "tool_use": TEMPLATE + " "})
    out = run(tmp_path, make_model(tmp_path / "named", named), max_steps=1)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json",
                 "adapter_model-00001-of-00002.safetensors", "adapter_config.json",
                 "added_tokens.json", "chat_template.json"):  # fmt: skip
        (out / name).write_text("{}")
    own = {"notes.txt": "mine", "train.py": "print()", "additional_chat_templates/notes.txt": "a"}
    for name, text in own.items():
        (out / name).write_text(text)
    run(tmp_path, plain, max_steps=1)
    assert contents(out).keys() == contents(fresh).keys() | own.keys()
    shutil.rmtree(out / "additional_chat_templates")
    adapted = run(tmp_path, plain, max_steps=1, use_peft=True)
    assert {"config.json", "model.safetensors"}.isdisjoint(contents(adapted))
    assert says(adapted)


MODEL_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .parts import SIZE

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_model_and_tokenizer_is_saved(tmp_path):
    source = tmp_path / "base"
    model = make_model(source, make_tokenizer())
    code = {
        "own_model.py": MODEL_CODE,
        "parts.py": "SIZE = 1\n",
        "own_tokenizer.py": TOKENIZER_CODE,
    }
    for name, text in code.items():
        (source / name).write_text(text)
    changes = {
        "config.json": {
            "model_type": "own",
            "architectures": ["OwnModel"],
            "auto_map": {
                "AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel",
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]},
        },
    }  # fmt: skip
    for name, entries in changes.items():
        (source / name).write_text(json.dumps(json.loads((source / name).read_text()) | entries))
    for _ in range(2):
        out = run(tmp_path, model, max_steps=1, save_steps=1, trust_remote_code=True)
    shutil.rmtree(source)
    exported = export(tmp_path / "exported", out / "checkpoint-1", trust_remote_code="true")
    for folder in (out, exported):
        assert code.keys() <= contents(folder).keys()
        lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert (type(lm).__name__, type(tokenizer).__name__) == ("OwnModel", "OwnTokenizer")


def test_files_that_cannot_be_moved_are_not_lost(tmp_path):
    model = make_model(tmp_path / "base", make_tokenizer())
    out = tmp_path / "out"
    (out / "model.safetensors/in the way").mkdir(parents=True)
    with pytest.raises(SaveFailed, match=r"the new files are in .*\.saving") as caught:
        run(tmp_path, model, max_steps=1)
    assert "\n" not in str(caught.value)
    assert (out / ".saving/model.safetensors").is_file()


def test_adapters_do_not_replace_their_base_model(tmp_path):
    model = make_model(tmp_path / "base", make_tokenizer())
    before = contents(tmp_path / "base")
    with pytest.raises(ValueError, match="output_dir: .* holds the adapters' base model"):
        run(tmp_path, model, max_steps=1, use_peft=True, output_dir=model)
    assert contents(tmp_path / "base") == before
