"""Unusable models are refused in one line that says why."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrhf_fast import demo

ROW = {"prompt": "Why?", "responses": ["So.", "No."], "scores": [1, 0]}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n" * 4)
    return path


def run(command, *arguments):
    module = importlib.import_module(f"rrhf_fast.{command}.__main__")
    return module.main([str(word) for word in arguments])


def commands(model, rows, out):
    data = ("--data", rows)
    by_policy = ("--policy_as_reward", "true")
    function = ("--reward_fn", "rrhf_fast.demo.reward:score")
    return {
        "train": ("--model_name_or_path", model, "--train_data", rows, "--output_dir", out),
        "sample": ("--model_name_or_path", model, *data, "--output", out),
        "score": ("--model_name_or_path", model, *data, "--output", out, *by_policy),
        "evaluate": ("--model_name_or_path", model, *data, *function, "--output_dir", out),
    }


@pytest.mark.parametrize("command", ["train", "sample", "score", "evaluate"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(command, value, rows, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL_DIR, model)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = float(value)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert run(command, *commands(model, rows, tmp_path / "out")[command]) == 2
    what = "NaN" if value == "nan" else "infinite values"
    problem = f"{model}: its weights are damaged: {name} holds {what}"
    assert problem in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("packing", ["forest", "none"])
def test_either_packing(packing, rows, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL_DIR, model)
    weights = {
        name: torch.full_like(x, torch.nan)
        for name, x in load_file(model / "model.safetensors").items()
    }
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    arguments = commands(model, rows, tmp_path / "out")["train"]
    assert run("train", *arguments, "--packing", packing) == 2
    assert "its weights are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sample", "score", "evaluate"])
def test_adapters_are_not_a_model(command, rows, tmp_path, capsys):
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL_DIR / name, folder)
    assert run(command, *commands(folder, rows, tmp_path / "out")[command]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"model_name_or_path: {folder} holds LoRA adapters, not a model" in error
    assert f"python -m rrhf_fast.export --checkpoint {folder} --merge true" in error
    assert not list(tmp_path.glob("out*"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder that holds checkpoints of a run, and no model."""
    folder = tmp_path_factory.mktemp("run")
    run("train", "--output_dir", folder, "--max_steps", 2, "--save_steps", 1)
    for file in folder.glob("*.*"):
        file.unlink()
    return folder


@pytest.mark.parametrize("command", ["train", "sample", "score", "evaluate"])
def test_checkpoints_are_not_a_model(command, checkpoints, rows, tmp_path, capsys):
    for folder in (checkpoints, checkpoints / "checkpoint-2"):
        assert run(command, *commands(folder, rows, tmp_path / "out")[command]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        export = f"python -m rrhf_fast.export --checkpoint {checkpoints}/checkpoint-2"
        assert (
            f"model_name_or_path: {folder}: no model, but a checkpoint of a run ({export}" in error
        )
    written = [path.name for path in tmp_path.rglob("out/*")]
    assert not set(written) - {"options.json"}


def test_evaluate_names_its_own_options(checkpoints, rows, tmp_path, capsys):
    """Not those of `sample`, through which it reads the weights."""
    arguments = commands(demo.MODEL_DIR, rows, tmp_path / "out")["evaluate"]
    assert run("evaluate", *arguments, "--baseline", checkpoints / "checkpoint-2") == 2
    assert f"error: baseline: {checkpoints}" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_that_is_not_complete_is_not_named(checkpoints, rows, tmp_path, capsys):
    folder = tmp_path / "a run"
    shutil.copytree(checkpoints, folder)
    (folder / "checkpoint-2" / "checksums.json").unlink()
    (folder / "checkpoint-2" / ".metadata").unlink()
    assert run("train", *commands(folder, rows, tmp_path / "out")["train"]) == 2
    assert f"--checkpoint '{folder}/checkpoint-1'" in capsys.readouterr().err.splitlines()[-1]


def test_checkpoints_of_other_programs_are_named(rows, tmp_path, capsys):
    for step in ("9", "10"):
        shutil.copytree(demo.MODEL_DIR, tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "checkpoint-10.tar").touch()
    assert run("train", *commands(tmp_path / "run", rows, tmp_path / "out")["train"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"(name one of them, as {tmp_path}/run/checkpoint-10)" in error
