"""Recipes: what their options and comments promise, and that they run, on the embedded model."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from transformers import LlamaConfig

from recipes import math_reward
from rrhf_fast import demo
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample.config import SampleConfig
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.parse import parse_config
from rrhf_fast.train.config import TrainConfig
from tests import jsonl

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
CONFIGS = {
    "sample": SampleConfig,
    "score": ScoreConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "iterate": IterateConfig,
}
# Shapes without weights: Alpaca-7B (LLaMA's, with a padding token), Llama 3.1 8B.
WIDE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES = {
    "7B": {"vocab_size": 32001, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "8B": {
        "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
ESTIMATED = {"alpaca_hh": "7B", "wombat": "7B", "chat_8b": "8B"}


def parts(path):
    """The name of a recipe and its command."""
    return path.name.split(".")[:2]


def config_of(path, *words):
    command = parts(path)[1]
    return parse_config(CONFIGS[command], ["--config", str(path), *words], name=command)


def comments(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def run(command, path, *words):
    """The exit code of a command on a recipe, with options of a test after it."""
    main = import_module(f"rrhf_fast.{command}.__main__").main
    return main(["--config", str(path), *map(str, words)])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_recipe_is_valid(path):
    config = config_of(path)
    config.validate()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_recipe_says_where_it_is_from_and_whether_it_was_run(path):
    text = comments(path)
    assert re.search(r"^Source: .*", text, re.MULTILINE)
    assert ("Not run here." in text) != ("Run here" in text)
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "-m rrhf_" in line]
    is_asked = path.name == "wombat.score.yaml"  # an endpoint: one process keeps it busy
    assert is_asked or any(line[0] in ("torchrun", "srun") for line in lines)
    for line in lines:
        start = line.index("-m") + 1
        command, (option, file, *words) = line[start], line[start + 1 :]
        assert command == f"rrhf_fast.{parts(path)[1]}" and option == "--config"
        assert ROOT / file == path
        config_of(path, *words).validate()


def test_only_the_small_recipe_was_run():
    assert [path.name for path in FILES if "Run here" in comments(path)] == ["laptop.iterate.yaml"]


def test_stages_pass_files_on():
    """Each stage reads what the one before it writes."""
    by_name = {path.name: config_of(path) for path in FILES}
    for name in ("alpaca_hh", "wombat"):
        sampled = by_name[f"{name}.sample.yaml"].output
        assert by_name[f"{name}.score.yaml"].data == sampled
        assert by_name[f"{name}.train.yaml"].train_data == by_name[f"{name}.score.yaml"].output
    trained = by_name["alpaca_hh.train.yaml"].output_dir
    assert by_name["alpaca_hh.evaluate.yaml"].model_name_or_path == trained


def test_chat_models_are_trained_at_rates_without_a_warning():
    for path in FILES:
        config = config_of(path)
        if parts(path)[0] in ("chat_8b", "chat_8b_rounds", "math"):
            train = getattr(config, "train", config)
            assert 5e-7 <= train.learning_rate <= 1e-6 and train.num_train_epochs == 1


def test_margins_are_for_own_samples_only():
    """Provided responses are trained on without one, and so is what is right or wrong."""
    margins = {path.name: config_of(path) for path in FILES if parts(path)[1] != "evaluate"}
    for name, config in margins.items():
        if isinstance(config, IterateConfig):
            assert (config.train.margin > 0) == (not name.startswith("math.")), name
            assert all(policy.method != "provided" for policy in config.policies), name
        elif isinstance(config, TrainConfig):
            assert config.margin == 0, name


@pytest.mark.parametrize("name", ESTIMATED)
def test_memory_is_what_the_dry_run_says(name, tmp_path, capsys):
    """The figure of the comment, from the shape alone."""
    path = ROOT / "recipes" / f"{name}.train.yaml"
    shape = LlamaConfig(**WIDE | SHAPES[ESTIMATED[name]], dtype="bfloat16")
    shape.save_pretrained(tmp_path)
    words = ["--dry_run", "true", "--train_data", "null"]
    assert " ".join(words) in comments(path)
    assert run("train", path, *words, "--model_name_or_path", tmp_path) == 0
    table = capsys.readouterr().out.splitlines()
    (total,) = [line.split()[-1] for line in table[:13] if line.split()[0] == "8"]
    (claimed,) = re.findall(r"8 GPUs of 80 GiB: ([\d.]+) GiB per GPU", comments(path))
    assert float(claimed) == pytest.approx(float(total), abs=0.05)


def test_the_papers_stages_run_one_after_another(tmp_path):
    """Rows of HH's layout through all four files, with the embedded model and its reward."""
    rows = [
        {"prompt": f"\n\nHuman: Why {word}?\n\nAssistant:", "response": " So.", "chosen": " So.",
         "rejected": " No."}
        for word in ("rain", "snow", "wind", "sun")
    ]  # fmt: skip
    data, model = jsonl.write(tmp_path / "hh.jsonl", rows), str(demo.MODEL_DIR)
    sampled, scored, trained = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "model"))
    reward = "--reward_model_name_or_path", "null", "--reward_fn", "rrhf_fast.demo.reward:score"
    files = {path.name: path for path in FILES}
    options = {
        "sample": ("--model_name_or_path", model, "--data", data, "--output", sampled),
        "score": ("--data", sampled, "--output", scored, *reward),
        "train": ("--model_name_or_path", model, "--train_data", scored, "--output_dir", trained),
        "evaluate": (
            *("--model_name_or_path", trained, "--baseline", model, "--data", data),
            *("--ranking_data", data, "--output_dir", tmp_path / "evaluation", *reward),
            *("--reference_model_name_or_path", model),
        ),
    }
    for command, words in options.items():
        assert run(command, files[f"alpaca_hh.{command}.yaml"], *words) == 0
    for row in jsonl.read(scored):
        assert row["sources"][-2:] == ["chosen", "rejected"] and 3 <= len(row["scores"]) <= 6
        assert not any("\n\nHuman:" in response for response in row["responses"])
    assert (tmp_path / "evaluation" / "report.html").exists()


def test_the_chat_recipe_reads_ultrafeedback_rows(chat_model, tmp_path, capsys):
    rows = [
        {
            "instruction": f"Why {i}?",
            "completions": [
                {"model": name, "response": f"Because of {name}.", "overall_score": score}
                for name, score in zip("abcd", (8.5, 3.0, 6.0, 6.0), strict=True)
            ],
        }
        for i in range(100)
    ]
    rows[1]["completions"][0]["response"] = ""
    data = jsonl.write(tmp_path / "rows.jsonl", rows)
    path = ROOT / "recipes" / "chat_8b.train.yaml"
    words = ["--model_name_or_path", chat_model, "--train_data", data, "--max_steps", "1"]
    assert run("train", path, *words, "--output_dir", tmp_path / "out") == 0
    out, errors = capsys.readouterr()
    assert ", 1 left out: empty response" in out and "bypasses" not in out
    assert "warning" not in errors


def test_mathematics_runs_in_rounds(chat_model, tmp_path, monkeypatch):
    """A round with the embedded model in place of the server, on rows of GSM8K's fields."""
    rows = {
        name: jsonl.write(
            tmp_path / f"{name}.jsonl",
            [
                {"question": f"{name} {i} + 1?", "answer": f"Add them.\n#### {i + 1}"}
                for i in range(3)
            ],
        )
        for name in ("train", "test")
    }
    monkeypatch.setenv("MATH_SOURCES", " ".join(map(str, rows.values())))
    math_reward._answers.cache_clear()
    policies = "[{method: sample, num_responses: 4, max_new_tokens: 4}]"
    words = ["--model_name_or_path", chat_model, "--data", rows["train"], "--eval_data"]
    words += [rows["test"], "--output_dir", tmp_path / "out", "--serve_command", "null"]
    words += ["--policies", policies, "--finished_only", "false", "--max_new_tokens", "4"]
    words += ["--rounds", "1", "--num_samples", "2", "--train.max_length", "256"]
    assert run("iterate", ROOT / "recipes" / "math.iterate.yaml", *words) == 0
    scored = jsonl.read(tmp_path / "out" / "round-1" / "scored.jsonl")
    assert len(scored) == 3 and {score for row in scored for score in row["scores"]} <= {0.0, 1.0}
    math_reward._answers.cache_clear()


def test_answers_are_compared_as_numbers(tmp_path, monkeypatch):
    data = jsonl.write(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": "#### 1,072"}])
    monkeypatch.setenv("MATH_SOURCES", str(data))
    math_reward._answers.cache_clear()
    right = ["It is 1072.", "2 x 536 = 1,072", r"\boxed{1072.0}", "so 1072, as 7 says: 1072"]
    wrong = ["It is 1073.", "", "none", "-1072", "1072 or 5", "10720"]
    prompts = ["How many?", [{"role": "user", "content": "How many?"}]]
    for prompt in prompts:
        scores = math_reward.reward([prompt] * 10, right + wrong)
        assert scores == [1.0] * 4 + [0.0] * 6
    with pytest.raises(KeyError, match="Who"):
        math_reward.reward(["Who?"], ["1"])
    math_reward._answers.cache_clear()


def test_the_table_lists_each_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for path in FILES:
        assert f"../recipes/{path.name})" in page
    assert len(re.findall(r"\.\./recipes/[\w.]+\.yaml", page)) == len(FILES)
