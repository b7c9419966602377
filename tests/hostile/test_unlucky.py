"""Mistakes of everyday use: cut files, empty and odd names, pipes, links, names given twice."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rrhf_fast import EvaluateConfig, TrainConfig, demo, evaluate, train
from rrhf_fast.data.load import load_rows
from rrhf_fast.iterate import IterateConfig
from rrhf_fast.iterate.run import run as iterate
from rrhf_fast.score import __main__ as score
from rrhf_fast.stages.secrets import hide, keep_secret, repeats_secret
from rrhf_fast.train import __main__ as train_command
from tests.jsonl import read, write

ROWS = [{"prompt": f"p{i}", "responses": ["a", "b"], "scores": [1.0, 0.0]} for i in range(4)]


@pytest.fixture
def evaluation(tmp_path):
    rows = [{"prompt": row["prompt"]} for row in read(demo.EVAL_FILE)[:4]]
    return EvaluateConfig(
        model_name_or_path=str(demo.MODEL_DIR),
        data=write(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "out"),
        reward_fn=demo.SETTINGS["eval_reward_fn"],
        max_new_tokens=4,
        num_samples=2,
        num_bootstrap=10,
    )


def test_cut_samples_are_not_measured(evaluation):
    evaluate(evaluation)
    out = Path(evaluation.output_dir)
    before = (out / "evaluation.json").read_bytes()
    write(out / "scored.jsonl", read(out / "scored.jsonl")[:2])
    with pytest.raises(ValueError, match=r"^output_dir: .*scored\.jsonl has other prompts than"):
        evaluate(evaluation)
    assert (out / "evaluation.json").read_bytes() == before


def test_damaged_options_of_a_run(evaluation):
    evaluate(evaluation)
    Path(evaluation.output_dir, "options.json").write_text("[")
    with pytest.raises(ValueError, match=r"^output_dir: .* is damaged .*choose another folder"):
        evaluate(evaluation)


def test_a_pipe_is_refused_where_rows_are_read_twice(evaluation, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    problem = f"^{{}}: {pipe}: expected a file, found a pipe"
    with pytest.raises(ValueError, match=problem.format("data")):
        evaluate(replace(evaluation, data=str(pipe)))
    options = {"model_name_or_path": str(demo.MODEL_DIR), "output_dir": str(tmp_path / "rounds")}
    options |= {"data": evaluation.data, "reward_fn": evaluation.reward_fn}
    with pytest.raises(ValueError, match=problem.format("eval_data")):
        iterate(IterateConfig(**options, eval_data=str(pipe)))


@pytest.mark.parametrize("path", ["(" * 3000 + "a", "[" * 3000, "a." * 5000 + "a"])
def test_deep_expressions_are_one_line(path, tmp_path, capsys):
    options = ["--train_data", str(write(tmp_path / "rows.jsonl", ROWS))]
    options += ["--columns", f"{{prompt: {path!r}}}", "--output_dir", str(tmp_path / "out")]
    assert train_command.main([*options, "--model_name_or_path", str(demo.MODEL_DIR)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "columns" in line


def test_names_of_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"model_name_or_path": "~/m", "train_data": ["~/x.jsonl", "y~.jsonl"]}
    config = TrainConfig(output_dir=tmp_path / "a", **options)
    config.validate()
    assert config.output_dir == str(tmp_path / "a")
    assert config.model_name_or_path == str(tmp_path / "m")
    assert config.train_data == [str(tmp_path / "x.jsonl"), "y~.jsonl"]
    with pytest.raises(ValueError, match="^output_dir: missing"):
        TrainConfig(output_dir="", **options).validate()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_name_that_stands_twice_in_a_row(name, tmp_path):
    good = json.dumps(ROWS[0])
    rows = [good, good[:-1] + ', "scores": [0.0, 1.0]}']
    text = "\n".join(rows) if name.endswith("l") else f"[{','.join(rows)}]"
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=r"the name 'scores' stands twice"):
        load_rows(str(file))
    kept, report = load_rows(str(file), on_bad_rows="skip")
    assert len(kept) == 1 and report.bad.total() == 1


def test_the_first_example_is_one_of_its_own(tmp_path, capsys):
    rows = [
        {"prompt": ["a"], "responses": ["x", "y"]},
        {"prompt": "a", "responses": [1, "y", "z"]},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    options = {"data": file, "output": tmp_path / "out.jsonl", "on_bad_rows": "skip"}
    options["reward_fn"] = demo.SETTINGS["eval_reward_fn"]
    assert score.main([word for k, v in options.items() for word in (f"--{k}", str(v))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"first: {file}:1: prompt[0]" in lines[0]
    assert f"first: {file}:2: responses[0]" in lines[1]


def test_metrics_are_not_written_through_a_link(tmp_path):
    options = TrainConfig(
        model_name_or_path=str(demo.MODEL_DIR), train_data=str(demo.TRAIN_FILE),
        max_steps=2, train_batch_size=2, save_steps=1, output_dir=str(tmp_path / "out"),
        resume_from_checkpoint="latest",
    )  # fmt: skip
    train(replace(options, max_steps=1))
    precious, metrics = tmp_path / "precious", tmp_path / "out" / "metrics.jsonl"
    precious.write_text("mine")
    metrics.unlink()
    metrics.symlink_to(precious)
    with pytest.raises(ValueError, match=r"^output_dir: .*metrics\.jsonl is a link"):
        train(options)
    assert precious.read_text() == "mine"


def test_keys_in_entities_of_html(monkeypatch):
    key = "sk-entity-0123456789"
    keep_secret(key)
    for form in ("&#{};", "&#x{:x};", "&#X{:04X};", "&#00{};"):
        text = "Bad key " + "".join(form.format(ord(letter)) for letter in key)
        assert hide(text) == "Bad key [key]"


def test_words_that_serve_as_keys_may_stand_in_answers():
    for word in ("not-needed", "lm-studio"):
        keep_secret(word)
        assert not repeats_secret(f"A key is {word} here.")
    keep_secret("sk-1234abcd")
    assert repeats_secret("It is sk-1234abcd.")
