"""The warning about learning rates that are too high for all weights of a chat model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_fast import RRHFTrainer, TrainConfig, demo, train

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": [{"role": "user", "content": f"{i}?"}], "responses": ["a", "b"], "scores": [1, 0]}
    for i in range(4)
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(demo.MODEL_DIR, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def warnings(capsys, model, folder, **options):
    """The warnings on stderr of a run of one step; none are on stdout."""
    args = TrainConfig(output_dir=str(folder), max_steps=1, **options)
    RRHFTrainer(model, args, ROWS).train()
    out, errors = capsys.readouterr()
    assert "learning_rate" not in out
    return [line for line in errors.splitlines() if "warning: learning_rate" in line]


def test_a_high_rate_is_warned_of_once(chat_model, tmp_path, capsys):
    (line,) = warnings(capsys, chat_model, tmp_path / "out", learning_rate=1e-5)
    said = ("1e-05 is high", "5e-7 to 1e-6 is advised", "this one has 283k", "SimPO", "Alpaca-7B")
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 5e-6}, {"learning_rate": 1e-6}, {"learning_rate": 1e-3, "use_peft": True}],
    ids=str,
)
def test_a_low_rate_and_adapters_are_not(chat_model, tmp_path, capsys, options):
    assert not warnings(capsys, chat_model, tmp_path / "out", **options)


def test_a_model_without_a_chat_template_is_not(tmp_path, capsys):
    rows = [{**row, "prompt": row["prompt"][0]["content"]} for row in ROWS]
    options = {"learning_rate": 1e-3, "max_steps": 1, "output_dir": str(tmp_path / "out")}
    RRHFTrainer(str(demo.MODEL_DIR), TrainConfig(**options), rows).train()
    assert "warning" not in capsys.readouterr().err


def test_a_mostly_frozen_model_is_not(chat_model, tmp_path, capsys):
    lm = AutoModelForCausalLM.from_pretrained(chat_model)
    for parameter in lm.parameters():
        parameter.requires_grad_(False)
    lm.model.norm.weight.requires_grad_(True)
    assert not warnings(capsys, lm, tmp_path / "out", learning_rate=1e-3)


def test_ranks_warn_once(chat_model, tmp_path):
    """Two processes over gloo."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", "-m", "rrhf_fast.train", "--model_name_or_path", chat_model, "--train_data"]
    command += [str(rows), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: learning_rate 2e-05") == 1
    assert "learning_rate" not in done.stdout


def test_no_warning_without_training(chat_model, capsys):
    train(TrainConfig(model_name_or_path=chat_model, dry_run=True))
    assert "learning_rate" not in capsys.readouterr().err
