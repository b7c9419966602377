"""The command: options from files and the command line, and one clear line for every mistake."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rrhf_fast import demo
from rrhf_fast.stages.command import parse_config
from rrhf_fast.train.__main__ import main
from rrhf_fast.train.config import TrainConfig

MODEL, DATA = str(demo.MODEL_DIR), str(demo.TRAIN_FILE)
ROW = {"prompt": "Why?", "responses": ["Because.", "No idea."], "scores": [1, 0]}


def python(*arguments, cwd):
    # The repository's root, since the suite also runs without an install.
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_defaults_and_overrides(tmp_path):
    assert parse_config(TrainConfig, []) == TrainConfig()
    file = tmp_path / "config.yaml"
    file.write_text("learning_rate: 1.0e-4\nseed: 3\ntrain_data: [a.jsonl, b.jsonl]\n")
    config = parse_config(
        TrainConfig, ["--config", str(file), "--seed", "4", "--report_to", "[tensorboard]"]
    )
    assert (config.learning_rate, config.seed) == (1e-4, 4)
    assert config.train_data == ["a.jsonl", "b.jsonl"]
    assert config.report_to == ["tensorboard"]


def test_print_config_is_a_config_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["--learning_rate", "3e-4", "--print_config"])
    assert done.value.code == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse_config(TrainConfig, ["--config", str(file)]) == TrainConfig(learning_rate=3e-4)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out.partition("\noptions:\n")[2]
    for option in fields(TrainConfig):
        explanation = text.partition(f"\n  --{option.name} ")[2]
        explanation = re.split(r"\n  --|\n\n|\([^()]*\)\n", explanation)[0]  # without the default
        assert len(explanation.split()) > 4, option.name


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MISTAKES = {
    "unknown option": (["--learning_rat", "1"], "learning_rat"),
    "unknown value": (["--packing", "tree"], "packing"),
    "text as number": (["--max_steps", "many"], "max_steps"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "a model without data": (["--model_name_or_path", MODEL], "train_data: missing"),
    "data without a model": (["--train_data", DATA], "model_name_or_path: missing"),
    "out of range": (["--learning_rate", "0"], "learning_rate: expected more than 0, found 0"),
    "a seed below 0": (["--data_seed", "-1"], "data_seed: expected 0 or more, found -1"),
    "half a step": (["--warmup_steps", "1.5"], "warmup_steps: expected a share of all steps"),
    "no tokens": (
        ["--max_tokens_per_pack", "0"],
        "max_tokens_per_pack: expected at least 1, or auto, found 0",
    ),
    "a size in words": (["--max_tokens_per_pack", "many"], "max_tokens_per_pack"),
    "not finite": (["--margin", ".inf"], "margin: expected 0 or more, found inf"),
    "nothing to train": (["--rank_weight", "0", "--sft_weight", "0"], "nothing to train"),
    "two held-out sets": (["--eval_data", DATA, "--eval_fraction", "0.1"], "not both"),
    "an attention for GPUs": (["--attn_implementation", "forest_flex"], "forest_flex has no back"),
    "an attention for forests": (
        ["--packing", "none", "--attn_implementation", "forest_sdpa"],
        "packing, attn_implementation: padded rows",
    ),
    "two precisions": (
        ["--optim", "adamw_8bit", "--optimizer_state_dtype", "bfloat16"],
        "optim, optimizer_state_dtype: adamw_8bit",
    ),
    "moments that cannot be saved": (
        ["--optim", "adamw_8bit", "--save_steps", "9"],
        "save_steps, optim: the moments of adamw_8bit cannot be saved",
    ),
    "latest of nowhere": (["--resume_from_checkpoint", "latest"], "latest needs an output_dir"),
    "dropout": (["--lora_dropout", "0.1"], "lora_dropout: no such option"),
    "no such schedule": (["--lr_scheduler_type", "wave"], "lr_scheduler_type: 'wave' is unknown"),
    "no such reward": (["--eval_reward_fn", "rrhf_fast.demo.reward:best"], "eval_reward_fn: rrhf"),
    "no held-out rows to sample for": (
        ["--model_name_or_path", MODEL, "--train_data", DATA, "--eval_reward_fn", "a:b"],
        "eval_reward_fn: needs held-out rows",
    ),
    "no such file": (
        ["--model_name_or_path", MODEL, "--train_data", "nowhere.jsonl"],
        "nowhere.jsonl: cannot be read (No such file or directory)",
    ),
    "no such model": (
        ["--model_name_or_path", "nowhere", "--train_data", DATA],
        "model_name_or_path: nowhere:",
    ),
    "a window too small": (["--max_length", "9"], "leave no room for a response in max_length 9"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, problem = MISTAKES[name]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("rrhf_fast.train: error: ")
    assert problem in lines[0]
    if name != "no such schedule":  # the optimizer comes after the folder
        assert [path.name for path in tmp_path.iterdir()] == []


def test_a_bad_row_is_one_line(tmp_path, capsys):
    path = rows_file(tmp_path, ROW, ROW | {"scores": [1, None]})
    arguments = ["--model_name_or_path", MODEL, "--train_data", path]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    problem = f"{path}:2: scores[1]: expected a number, found NoneType None"
    message = capsys.readouterr().err
    assert message.startswith(f"rrhf_fast.train: error: {problem} (--on_bad_rows skip leaves out")
    assert message.count("\n") == 1


def test_an_earlier_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    assert main(["--output_dir", str(tmp_path)]) == 2
    assert "already holds metrics.jsonl of another run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_a_mistake_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--model_name_or_path", MODEL, "--train_data", "nowhere.jsonl"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    [
        {"packing": "tree"},
        {"dtype": "float16"},
        {"train_batch_size": 2.5},
        {"learning_rate": "1e-3"},
        {"eval_fraction": None},
        {"stop_strings": "abc"},
        {"report_to": "tensorboard"},
        {"train_data": {"rows": "rows.jsonl"}},
        {"length_penalty": float("inf")},
        {"activation_checkpointing": 1},
        {"compile": "yes"},
        {"max_tokens_per_pack": "many"},
        {"max_tokens_per_pack": True},
    ],
)
def test_the_python_interface_checks_types_too(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        TrainConfig(**option).validate()


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"lora_r": 8}, "lora_r: needs use_peft, without which all weights are trained"),
        ({"use_dora": True}, "use_dora: needs use_peft"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: needs use_peft"),
        ({"use_peft": True, "lora_target_modules": "all"}, "lora_target_modules: expected a list"),
        ({"use_peft": True, "lora_target_modules": "q_proj, v_proj"}, "lora_target_modules: exp"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint: expected str, found True (lat"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint: expected a checkpoint's f"),
    ],
    ids=str,
)
def test_what_would_be_another_run_than_was_meant(options, problem):
    with pytest.raises(ValueError) as raised:
        TrainConfig(**options).validate()
    assert str(raised.value).startswith(problem)


def test_arguments_of_another_trainers_config():
    with pytest.raises(TypeError) as raised:
        TrainConfig(seeed=1, bf16=True)
    problem = "bf16: no such option (here: dtype); seeed: no such option (did you mean seed?)"
    assert str(raised.value) == f"TrainConfig: {problem}"
    assert replace(TrainConfig(), seed=3) == TrainConfig(seed=3)


def test_the_command_as_a_process(tmp_path):
    done = python("-m", "rrhf_fast.train", "--max_step", "3", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("rrhf_fast.train: error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    script = (
        "import sys, rrhf_fast, rrhf_fast.train.config;"
        "heavy = {'torch', 'triton', 'transformers', 'matplotlib', 'datasets'};"
        "print(heavy & set(sys.modules), len(dir(rrhf_fast)))"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.stdout.startswith("set() "), done.stderr


def test_the_python_interface_works_without_triton(tmp_path):
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import rrhf_fast, rrhf_fast.train\n"
        "assert callable(rrhf_fast.train) and rrhf_fast.rrhf_loss and rrhf_fast.linear_logprob\n"
        "print(rrhf_fast.TrainResult.__name__)"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.stdout == "TrainResult\n", done.stderr


@pytest.mark.parametrize("name", ["samples.jsonl", "config.json"])
def test_a_file_of_the_users_is_not_replaced(name, tmp_path, capsys):
    """Samples of an evaluation, or the rows themselves, under the name of a file of runs."""
    rows = tmp_path / name
    rows.write_text(demo.EVAL_FILE.read_text())
    before = rows.read_bytes()
    words = ["--train_data", str(rows), "--model_name_or_path", str(demo.MODEL_DIR)]
    assert main([*words, "--output_dir", str(tmp_path)]) == 2
    assert f"already holds {name} of another run" in capsys.readouterr().err
    assert rows.read_bytes() == before
