"""Rounds of the whole method: the demo learns, killed runs resume, OP-k keeps its optimizer."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from rrhf_fast import TrainConfig, demo, iterate
from rrhf_fast.evaluate.about import about
from rrhf_fast.evaluate.measures import Estimate
from rrhf_fast.iterate import run as rounds
from rrhf_fast.iterate.__main__ import _run, main
from rrhf_fast.iterate.config import IterateConfig, with_demo
from rrhf_fast.iterate.report import write_rounds
from rrhf_fast.sample.config import Policy
from rrhf_fast.train import trainer as engine
from tests.jsonl import read, write

STAGES = ("samples.jsonl", "scored.jsonl", "trained.json", "evaluation/evaluation.json")


def head(path, count, target):
    target.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return str(target)


@pytest.fixture
def config(tmp_path):
    """The demo on a few rows."""
    return replace(
        with_demo(IterateConfig()),
        data=head(demo.TRAIN_FILE, 32, tmp_path / "train.jsonl"),
        eval_data=head(demo.EVAL_FILE, 6, tmp_path / "eval.jsonl"),
        ranking_data=None,
        output_dir=str(tmp_path / "out"),
        num_samples=2,
        max_new_tokens=24,
        num_bootstrap=100,
        policies=[
            Policy(method="sample", num_responses=2, max_new_tokens=24),
            Policy(method="provided", use_responses="provided"),
        ],
        train=TrainConfig(learning_rate=2e-3, train_batch_size=4, num_train_epochs=1.0),
    )


@pytest.mark.slow
def test_the_reward_rises_and_every_file_is_written(config):
    config.ranking_data = config.eval_data
    records = iterate(config)
    out = Path(config.output_dir)
    assert [record["round"] for record in records] == [0, 1, 2]
    rewards = [record["reward"].value for record in records]
    assert rewards[0] + 0.5 < rewards[1] and rewards[0] + 0.5 < rewards[2]
    assert records[2]["ranking_accuracy"].value > records[0]["ranking_accuracy"].value
    assert records[2]["win"].value > 0.5 and "win" not in records[0]
    for number in (1, 2):
        assert all((out / f"round-{number}" / name).exists() for name in STAGES)
        assert (out / f"round-{number}" / "model" / "model.safetensors").exists()
    rows = read(out / "round-2/scored.jsonl")
    assert all(len(row["scores"]) == len(row["responses"]) for row in rows)
    assert {source for row in rows for source in row["sources"]} == {
        "sample",
        "provided_good",
        "provided_bad",
    }
    written = read(out / "rounds.jsonl")
    assert [record["reward"][0] for record in written] == rewards
    page = (out / "report.html").read_text()
    assert "mean reward of a sample" in page and "round 2" in page
    assert not list(out.rglob("*.journal")) and not list(out.rglob("*.saving"))


@pytest.mark.slow
def test_a_round_resumed_at_any_stage_ends_the_same(tmp_path, config):
    config.rounds, config.train.max_steps = 1, 2
    iterate(config)
    out = Path(config.output_dir)
    whole = {name: (out / "round-1" / name).read_bytes() for name in STAGES}
    report = (out / "rounds.jsonl").read_bytes()
    for done in range(len(STAGES)):  # as if killed after this many stages
        for name in STAGES[done:]:
            (out / "round-1" / name).unlink()
        if done <= 2:
            shutil.rmtree(out / "round-1" / "model")
        shutil.rmtree(out / "round-1" / "evaluation")
        iterate(config)
        assert (out / "rounds.jsonl").read_bytes() == report
        assert {name: (out / "round-1" / name).read_bytes() for name in STAGES} == whole
    with pytest.raises(ValueError, match="output_dir: .* another kl_coef"):
        iterate(replace(config, kl_coef=0.1))


@pytest.mark.parametrize("steps_per_round", [None, 1])
def test_columns_apply_to_the_callers_files(config, steps_per_round, capsys):
    for path in (config.data, config.eval_data):
        rows = read(path)
        rows = [{"q": row["prompt"], "a": row["responses"], "s": row["sources"]} for row in rows]
        write(Path(path), rows)
    shared = Path(config.eval_data).read_text().splitlines()[0]
    Path(config.data).write_text(Path(config.data).read_text() + shared)
    config = replace(config, rounds=1, steps_per_round=steps_per_round)
    config.train.max_steps = None if steps_per_round else 1
    with pytest.raises(ValueError, match="prompt: missing.*found the fields q, a, s"):
        iterate(config)
    config.columns = "{prompt: q, responses: a, sources: s}"
    assert len(iterate(config)) == 2
    assert "warning: 1 of 6 rows of eval_data have a prompt of data" in capsys.readouterr().out
    rows = read(Path(config.output_dir, "round-1", "scored.jsonl"))
    assert all(
        row.keys() <= {"prompt", "responses", "sources", "finish_reasons", "scores"} for row in rows
    )
    pushing = {"push_to_hub": True, "hub_model_id": "x", "hub_private_repo": True}
    for name, value in pushing.items():
        with pytest.raises(ValueError, match=f"train.{name}: is not used here .*--include.*merged"):
            iterate(replace(config, train=replace(config.train, **{name: value})))
    config.train.columns = "{prompt: q}"
    with pytest.raises(ValueError, match="train.columns: is not used here .say --columns"):
        iterate(config)


def test_only_missing_rounds_are_run(config, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("this stage was done")

    config.rounds = 1
    config.train.max_steps = 1
    iterate(config)
    out, last = config.output_dir, capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        f"next: open {out}/report.html; the last model is in {out}/round-1/model"
    )
    for stage in ("sample", "score", "train", "evaluate"):
        monkeypatch.setattr(rounds, stage, refuse)
    assert len(iterate(config)) == 2
    with pytest.raises(AssertionError, match="was done"):
        iterate(replace(config, rounds=2))


def test_whatever_follows_a_finished_step_is_redone_if_it_is_missing(config, monkeypatch):
    """A kill may come between an evaluation and its report, or between the rounds and theirs."""

    def refuse(*_):
        raise AssertionError("this stage was done")

    config.rounds = 1
    config.train.max_steps = 1
    iterate(config)
    out = Path(config.output_dir)
    reports = ("by_prompt.json", "evaluation.json", "evaluation.png", "report.html")
    names = [f"round-{number}/evaluation/{name}" for number in (0, 1) for name in reports]
    names += ["rounds.jsonl", "rounds.png", "report.html"]
    whole = {name: (out / name).read_bytes() for name in names}
    for stage in ("sample", "score", "train"):
        monkeypatch.setattr(rounds, stage, refuse)
    for missing in (["round-0/evaluation/evaluation.png"], names[7:8], names[-3:]):
        for name in missing:
            (out / name).unlink()
        iterate(config)
        assert {name: (out / name).read_bytes() for name in names} == whole


def test_the_journal_of_a_finished_file_is_removed(config):
    """A kill may come between the two."""
    config.rounds = 1
    config.train.max_steps = 1
    name = Path(config.output_dir, "round-1", "samples.jsonl")
    unlink, left = Path.unlink, []

    def unlink_not(path, **options):
        if path.name == "samples.jsonl.journal" and not left:
            left.append(path.read_bytes())
            raise KeyboardInterrupt
        unlink(path, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink_not)
        iterate(config)
    assert left and list(Path(config.output_dir).rglob("*.journal"))
    iterate(config)
    assert name.exists() and not list(Path(config.output_dir).rglob("*.journal"))


@pytest.mark.parametrize("steps_per_round", [None, 2])
def test_a_signal_while_training_is_exit_code_75_and_the_round_resumes(
    steps_per_round, config, monkeypatch, capsys
):
    step, taken = engine.take_step, []

    def signalled(*arguments):
        taken.append(1)
        if len(taken) == 3:  # the first of the second round
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    config.rounds, config.steps_per_round = 2, steps_per_round
    config.train = replace(config.train, max_steps=2, train_batch_size=4)
    iterate(replace(config, output_dir=f"{config.output_dir}-whole"))
    monkeypatch.setattr(engine, "take_step", signalled)
    assert _run(config) == 75
    problem = "rrhf_fast.iterate: error: stopped by a signal; what is done is kept: run the same"
    assert problem in capsys.readouterr().err
    assert not Path(config.output_dir, "round-2", "trained.json").exists()
    assert _run(config) == 0 and len(taken) == 4
    file = Path("round-2", "model", "model.safetensors")
    one, other = (Path(f"{config.output_dir}{end}", file) for end in ("", "-whole"))
    assert one.read_bytes() == other.read_bytes()


def test_the_penalty_compares_with_the_initial_model(config):
    config.rounds, config.kl_coef, config.train.max_steps = 2, 0.1, 2
    iterate(config)
    for number in (1, 2):
        rows = read(Path(config.output_dir, f"round-{number}", "scored.jsonl"))
        ratios = [ratio for row in rows for ratio in row["log_ratios"]]
        assert all(ratio == 0 for ratio in ratios) == (number == 1)
        for row in rows:
            parts = zip(row["scores"], row["rewards"], row["log_ratios"], strict=True)
            assert all(s == pytest.approx(r - 0.1 * ratio) for s, r, ratio in parts)


def test_rounds_of_steps_cycle_through_the_prompts(tmp_path, config):
    config.steps_per_round, config.train.train_batch_size = 2, 10
    seen = []
    for number in range(1, 6):  # 20 of 32 prompts per round: a little more than three passes
        path = rounds._slice(config, number, tmp_path / "prompts.jsonl")
        seen.append(read(path))
        assert len(seen[-1]) == 20
    prompts = [row["prompt"] for rows in seen for row in rows]
    assert len(set(prompts[:32])) == len(set(prompts[32:64])) == len(set(prompts[64:96])) == 32
    assert prompts[:32] != prompts[32:64]
    assert all({"responses", "sources"} <= set(row) for row in seen[0])


@pytest.mark.skipif(
    not hasattr(TrainConfig, "init_optimizer_from"), reason="the trainer saves no optimizer state"
)
def test_the_optimizer_state_passes_from_round_to_round(config, monkeypatch):
    configs, train = [], rounds.train
    monkeypatch.setattr(rounds, "train", lambda config: configs.append(config) or train(config))
    config.steps_per_round, config.rounds = 2, 2
    iterate(config)
    first, second = (Path(config.output_dir, f"round-{number}") for number in (1, 2))
    assert len((second / "samples.jsonl").read_text().splitlines()) == 2 * 4
    checkpoint = first / "model" / "checkpoint-2"
    assert checkpoint.is_dir() and (second / "model" / "checkpoint-2").is_dir()
    assert [config.init_optimizer_from for config in configs] == [None, str(checkpoint)]


def test_a_collapse_is_reported_without_a_rise_in_perplexity(config):
    """As in the demo's second round: the reward rises, and each prompt gets one answer."""
    config = replace(config, rounds=1, train=replace(config.train, max_steps=1))
    first, last = iterate(config)
    answers = {"distinct": Estimate(1.0, 1.0, 1.0)}
    few = {"distinct": Estimate(0.57, 0.45, 0.7), "perplexity": Estimate(1.0, 1.0, 1.0)}
    out = Path(config.output_dir)
    run = about(config, out / "round-1" / "evaluation" / "scored.jsonl")
    _, notes = write_rounds(out, [first | answers, last | few], run)
    assert "answers collapse" in "".join(notes) and "reward hacking" not in "".join(notes)
    assert "There are only 6 prompts" in "".join(notes)
    page = (out / "report.html").read_text()
    assert "answers collapse" in page and "There are only 6 prompts" in page
    _, notes = write_rounds(out, [first | answers, last | answers], run)
    assert "answers collapse" not in "".join(notes)


@pytest.mark.slow
def test_rounds_of_adapters_go_on_from_the_merged_model(config):
    pytest.importorskip("peft", reason="LoRA adapters are peft's")
    train = replace(config.train, use_peft=True, max_steps=1)
    config = replace(config, train=train, rounds=2)
    records = iterate(config)
    out = Path(config.output_dir)
    assert len(records) == 3
    for number in (1, 2):
        assert (out / f"round-{number}/model/adapter_config.json").exists()
        assert (out / f"round-{number}/merged/model.safetensors").exists()
    # As after a kill between merging and the note of it.
    (out / "round-2" / "trained.json").unlink()
    shutil.rmtree(out / "round-2" / "evaluation")
    assert [record["reward"] for record in iterate(config)] == [r["reward"] for r in records]


def test_moments_are_carried_on_with_the_weights_that_they_are_of(config):
    """Not to other adapters, which each round draws anew."""
    for use_peft in (False, True):
        train = replace(config.train, use_peft=use_peft)
        steps = replace(config, train=train, steps_per_round=1)
        second = steps.train_config(2, "model", Path("out", "round-2"))
        assert (second.init_optimizer_from is None) == use_peft
        assert second.warmup_steps == 0


def test_the_demo_keeps_options_that_were_set():
    config = with_demo(IterateConfig(rounds=5, train=TrainConfig(seed=3)))
    assert (config.rounds, config.train.seed, config.train.learning_rate) == (5, 3, 1e-3)
    assert config.data == str(demo.TRAIN_FILE) and len(config.policies) == 3


MISTAKES = {
    "a model without data": (["--model_name_or_path", "m", "--reward_fn", "a:b"], "data: missing"),
    "out of range": (["--rounds", "0"], "rounds: expected at least 1, found 0"),
    "in a policy": (["--policies", "[{method: sample, top_p: 0}]"], "policies[0].top_p"),
    "in the trainer's": (["--train.learning_rate", "0"], "learning_rate: expected more than 0"),
    "half a step": (["--train.warmup_steps", "1.5"], "train.warmup_steps: expected a share"),
    "another's model": (["--train.model_name_or_path", "m"], "train.model_name_or_path: is not"),
    "another's data": (["--train.train_data", "d"], "(say --data)"),
    "another's folder": (["--train.output_dir", "o"], "(say --output_dir)"),
    "no memory table": (["--train.dry_run", "true"], "(run python -m rrhf_fast.train --dry_run"),
    "moments that cannot be saved": (
        ["--steps_per_round", "1", "--train.optim", "adamw_8bit"],
        "steps_per_round, train.optim: the moments of adamw_8bit cannot be carried on",
    ),
    "a best model between rounds": (
        ["--steps_per_round", "1", "--train.load_best_model_at_end"],
        "steps_per_round, train.load_best_model_at_end: a round goes on from the last step",
    ),
    "a reward without rows": (["--train.eval_reward_fn", "a:b"], "train.eval_reward_fn: needs"),
    "unknown": (["--train.learning_rat", "0"], "learning_rat"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, problem = MISTAKES[name]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rrhf_fast.iterate: error: ")
    assert problem in lines[0] and not list(tmp_path.iterdir())
