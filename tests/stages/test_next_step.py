"""The last line of each command can be run: its options exist, and its paths are those written."""

import shlex
import shutil
from pathlib import Path

import pytest

from rrhf_fast import demo
from rrhf_fast.evaluate.__main__ import main as evaluate
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.export.__main__ import main as export
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.sample.__main__ import main as sample
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.command import parse_config
from rrhf_fast.stages.next_step import after_export, after_rounds, after_training
from rrhf_fast.train.__main__ import main as train
from rrhf_fast.train.config import TrainConfig
from tests.jsonl import read, write

MODEL, REWARD = str(demo.MODEL_DIR), ["--reward_fn", demo.SETTINGS["eval_reward_fn"]]


def words_of(line, command):
    """The arguments of the command that the line names."""
    start = f"next: python -m rrhf_fast.{command} "
    assert line.startswith(start), line
    return shlex.split(line.removeprefix(start))


def test_each_command_names_the_next_one(tmp_path, monkeypatch, capsys):
    """From prompts to an evaluation by the lines alone; what is in capitals is filled in."""
    monkeypatch.chdir(tmp_path)

    def last_line():
        return capsys.readouterr().out.splitlines()[-1]

    prompts = write(tmp_path / "prompts.jsonl", read(demo.TRAIN_FILE)[:4])
    held_out = write(tmp_path / "held out.jsonl", read(demo.EVAL_FILE)[:2])
    drawn = "[{num_responses: 1, max_new_tokens: 4}, {method: provided}]"
    files = ["--data", prompts, "--output", "it's sampled.jsonl"]
    assert sample([*files, "--model_name_or_path", MODEL, "--policies", drawn]) == 0
    words = words_of(last_line(), "score")
    assert words[-2:] == ["--reward_model_name_or_path", "REWARD_MODEL"]
    assert score([*words[:-2], *REWARD]) == 0
    words = words_of(last_line(), "train")
    assert words[:2] == ["--model_name_or_path", "MODEL"] and "--on_bad_rows" not in words
    options = ["--eval_data", held_out, "--max_steps", "1", "--save_steps", "1"]
    assert train(["--model_name_or_path", MODEL, *words[2:], *options]) == 0
    words = words_of(last_line(), "evaluate")
    at = words.index("--reward_fn")
    assert words[at + 1] == "MODULE:FUNCTION" and held_out in words
    small = ["--num_samples", "1", "--max_new_tokens", "4", "--num_bootstrap", "10"]
    assert evaluate([*words[:at], *REWARD, *words[at + 2 :], *small]) == 0
    folder = last_line().removeprefix("report.html is in ")
    assert Path(folder, "report.html").is_file() and folder == "trained-evaluation"
    files = ["--checkpoint", "trained/checkpoint-1", "--output_dir", "exported"]
    assert export(files) == 0
    expected = "AutoModelForCausalLM.from_pretrained('exported'), or vllm serve exported"
    assert last_line() == f"next: {expected}"


def test_rows_that_cannot_be_ranked_are_left_out_of_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "responses": ["b", "c"]}, {"prompt": "a", "responses": ["b"]}]
    write(tmp_path / "rows.jsonl", rows)
    assert score(["--data", "rows.jsonl", "--output", "out.jsonl", *REWARD]) == 0
    words = words_of(capsys.readouterr().out.splitlines()[-1], "train")
    assert words[-2:] == ["--on_bad_rows", "skip"]


def test_a_model_that_scored_is_not_trained_over_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo.MODEL_DIR, "trained")
    write(tmp_path / "rows.jsonl", [{"prompt": "a", "responses": ["b", "c"]}])
    itself = ["--policy_as_reward", "true", "--model_name_or_path", "trained"]
    assert score(["--data", "rows.jsonl", "--output", "out.jsonl", *itself]) == 0
    words = words_of(capsys.readouterr().out.splitlines()[-1], "train")
    assert words[words.index("--output_dir") + 1] == "trained-again"


def test_rows_that_cannot_be_ranked_at_all_are_not_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [{"prompt": "a", "responses": ["b"]}])
    assert score(["--data", "rows.jsonl", "--output", "out.jsonl", *REWARD]) == 0
    assert "next: sample more" in capsys.readouterr().out.splitlines()[-1]


def test_options_of_rows_are_passed_on():
    columns = {"prompt": "q", "responses": '"it\'s"'}
    options = {"model_name_or_path": "M", "eval_data": ["a b.jsonl", "c.jsonl"]}
    config = TrainConfig(**options, columns=columns, apply_chat_template=True)
    words = words_of(after_training(Path("my out"), config), "evaluate")
    parsed = parse_config(EvaluateConfig, words)
    parsed.validate()
    assert (parsed.data, parsed.columns) == (config.eval_data, columns)
    assert parsed.apply_chat_template and not parsed.trust_remote_code
    assert (parsed.model_name_or_path, parsed.baseline) == ("my out", "M")


def test_adapters_are_merged_first(tmp_path):
    line = after_training(Path("out"), TrainConfig(model_name_or_path="M", use_peft=True))
    expected = ExportConfig(checkpoint="out", output_dir="out-merged", merge=True)
    assert parse_config(ExportConfig, words_of(line, "export")) == expected
    (tmp_path / "adapter_config.json").write_text("{}")
    assert after_export(tmp_path).endswith(", with peft installed")


def test_after_rounds_the_report_is_named():
    line = after_rounds(Path("out"), "out/round-2/model", 2)
    assert "open out/report.html" in line and "--output_dir out --rounds 3 adds" in line


@pytest.mark.parametrize("option", ["--dry_run", "--show_tokens"])
def test_nothing_follows_where_nothing_was_trained(option, capsys):
    assert train([option, "1" if option == "--show_tokens" else "true"]) == 0
    assert "next: " not in capsys.readouterr().out


def test_nothing_follows_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert score(["--data", "none.jsonl", "--output", "out.jsonl", *REWARD]) == 2
    assert "next: " not in "".join(capsys.readouterr())


def test_the_placeholders_are_names_of_options():
    words = ["--data", "a", "--output", "b", "--reward_model_name_or_path", "REWARD_MODEL"]
    parse_config(ScoreConfig, words).validate()
