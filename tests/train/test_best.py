"""The best evaluation's model is what a run leaves, and it ends when evaluations get no better."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from rrhf_fast import ExportConfig, RRHFTrainer, TrainConfig, demo, export, train
from rrhf_fast.train.best import best_step, has_stalled, worse_than_before
from tests.train.test_trainer import HELD_OUT, ROWS, Wishes, records

OPTIONS = {"train_batch_size": 4, "max_steps": 6, "eval_steps": 1, "learning_rate": 1e-4}
# At this rate the held-out loss falls with each step, so that the highest is the first.
FIRST = {"load_best_model_at_end": True, "greater_is_better": True}


def trainer(folder, callbacks=(), **more):
    args = TrainConfig(output_dir=str(folder), **OPTIONS | more)
    return RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, HELD_OUT, callbacks=list(callbacks))


def kept(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


VALUES = st.sampled_from([None, 0.0, 1.0, 1.5, 2.0])  # a metric that is not finite becomes None


@given(st.lists(VALUES, max_size=8), st.integers(1, 4), st.booleans())
def test_it_decides_as_the_callback_of_transformers(values, patience, higher):
    """Told the same evaluations, its EarlyStoppingCallback stops at the same one."""
    config = TrainConfig(
        early_stopping_patience=patience,
        metric_for_best_model="eval_rewards/accuracies",
        greater_is_better=higher,
    )
    args = SimpleNamespace(metric_for_best_model="rewards/accuracies", greater_is_better=higher)
    callback, state = EarlyStoppingCallback(patience), TrainerState()
    found = [{"step": 0, "eval/rewards/accuracies": 9.0 if higher else -9.0}]  # does not count
    for step, value in enumerate(values, 1):
        found += [{"step": step, "loss": 1.0}, {"step": step, "eval/rewards/accuracies": value}]
        worst = -torch.inf if higher else torch.inf
        metrics = {"eval_rewards/accuracies": worst if value is None else value}
        control = TrainerControl()
        callback.on_evaluate(args, state, control, metrics)
        now, best = metrics["eval_rewards/accuracies"], state.best_metric
        if best is None or (now > best if higher else now < best):
            state.best_metric, state.best_global_step = now, step
        finite = any(value is not None for value in values[:step])
        assert best_step(found, config) == (state.best_global_step if finite else None)
        assert has_stalled(found, config) == control.should_training_stop


def test_a_best_that_is_worse_than_no_training_is_warned_of(tmp_path, capsys):
    trainer(tmp_path, max_steps=2, learning_rate=0.3, load_best_model_at_end=True).train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert line.startswith("warning: loss was ") and "never as good again, at best" in line
    config, higher = TrainConfig(), TrainConfig(metric_for_best_model="eval_rewards/accuracies")
    assert worse_than_before({"loss": 2.0}, {"loss": 2.0}, config) is None
    assert worse_than_before({"loss": 2.0}, {}, config) is None
    assert worse_than_before({"loss": 2.0}, {"loss": float("nan")}, config) is None
    low, high = {"rewards/accuracies": 0.4}, {"rewards/accuracies": 0.5}
    assert worse_than_before(low, high, higher) is None and worse_than_before(high, low, higher)


class Remember(TrainerCallback):
    """The weights at each evaluation."""

    def __init__(self):
        self.weights = {}

    def on_evaluate(self, args, state, control, model, **more):
        self.weights[state.global_step] = {
            name: tensor.clone() for name, tensor in model.state_dict().items()
        }


@pytest.mark.parametrize("more", [{}, {"use_peft": True}, {"dtype": "bfloat16"}], ids=str)
def test_the_model_of_the_best_evaluation_is_saved(more, tmp_path):
    seen = Remember()
    made = trainer(tmp_path, [seen], **FIRST, **more)
    result = made.train()
    assert (result.best_step, result.steps) == (1, 6)
    evaluated = {r["step"]: r for r in records(tmp_path) if "eval/loss" in r}
    assert (
        max(step for step in evaluated if evaluated[step]["eval/loss"] == result.after["loss"]) == 1
    )
    now = made.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in seen.weights[1].items())
    assert any(not torch.equal(now[name], tensor) for name, tensor in seen.weights[6].items())
    assert made.evaluate()["eval_loss"] == pytest.approx(result.after["loss"], rel=1e-6)
    file = "adapter_model.safetensors" if more.get("use_peft") else "model.safetensors"
    export(ExportConfig(str(tmp_path / "checkpoint-1"), str(tmp_path / "exported")))
    saved, expected = load_file(tmp_path / file), load_file(tmp_path / "exported" / file)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert "that of step 1, the best by held-out loss" in (tmp_path / "README.md").read_text()


def test_a_last_step_that_is_best_needs_no_checkpoint(tmp_path, capsys):
    result = trainer(tmp_path, load_best_model_at_end=True, eval_steps=6).train()
    assert (result.best_step, kept(tmp_path)) == (6, [])
    said = capsys.readouterr().out
    assert "done after 6 steps; the model of step 6, the best, and metrics are in" in said


def test_the_best_checkpoint_takes_the_place_of_the_one_before(tmp_path):
    """The loss falls: each evaluation but the last writes one. Those that are due stay."""
    trainer(tmp_path / "a", load_best_model_at_end=True).train()
    assert kept(tmp_path / "a") == ["checkpoint-5"]
    trainer(tmp_path / "b", load_best_model_at_end=True, save_steps=2).train()
    assert kept(tmp_path / "b") == ["checkpoint-2", "checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_the_limit_spares_the_best(tmp_path):
    trainer(tmp_path, save_steps=2, save_total_limit=1, **FIRST).train()
    assert kept(tmp_path) == ["checkpoint-1", "checkpoint-6"]


def test_evaluations_that_get_no_better_end_training(tmp_path):
    made = trainer(tmp_path, max_steps=20, early_stopping_patience=2, **FIRST)
    result = made.train()
    assert (result.steps, result.best_step, result.interrupted) == (3, 1, False)
    assert [r["step"] for r in records(tmp_path) if "grad_norm" in r] == [1, 2, 3]
    # Without load_best_model_at_end the model is the last one.
    options = {"early_stopping_patience": 2, "greater_is_better": True, "max_steps": 20}
    result = trainer(tmp_path / "last", **options).train()
    assert (result.steps, result.best_step) == (3, None)
    found = records(tmp_path / "last")
    assert result.after["loss"] == found[-1]["eval/loss"]


def test_a_resumed_run_decides_as_an_undisturbed_one(tmp_path):
    """Cut off after step 2, it still knows that step 1 was best and counts its patience on."""
    options = {"max_steps": 8, "early_stopping_patience": 3, "save_steps": 2, **FIRST}
    whole = trainer(tmp_path / "whole", **options).train()
    assert (whole.steps, whole.best_step) == (4, 1)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 2:
                raise KeyError("cut off")

    with pytest.raises(KeyError):
        trainer(tmp_path / "cut", [Stop()], **options).train()
    resumed = trainer(tmp_path / "cut", resume_from_checkpoint="latest", **options).train()
    assert (resumed.steps, resumed.best_step, resumed.after) == (4, 1, whole.after)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    files = [tmp_path / name / "model.safetensors" for name in ("cut", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_that_is_gone_loses_no_model(tmp_path):
    class Remove(Wishes):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == 5:
                (tmp_path / "checkpoint-1").rename(tmp_path / "elsewhere")

    with pytest.raises(ValueError, match="^load_best_model_at_end: .*checkpoint-1"):
        trainer(tmp_path, [Remove("save", 9)], **FIRST).train()
    assert (tmp_path / "model.safetensors").exists()
    assert "the best" not in (tmp_path / "README.md").read_text()


class Interrupt(TrainerCallback):
    """A signal after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **more):
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGTERM)


def test_the_best_is_kept_where_a_signal_cut_off_its_evaluation(tmp_path):
    options = {"save_steps": 1, "save_total_limit": 1, **FIRST}
    assert trainer(tmp_path, [Interrupt(1)], **options).train().preempted
    result = trainer(tmp_path, resume_from_checkpoint="latest", **options).train()
    assert (result.best_step, result.steps) == (1, 6)
    assert kept(tmp_path) == ["checkpoint-1", "checkpoint-6"]


def test_a_best_without_a_checkpoint_is_missed_before_training(tmp_path):
    trainer(tmp_path, save_steps=4, save_total_limit=1, max_steps=4).train()
    again = {"resume_from_checkpoint": "latest", "save_steps": 4, "max_steps": 8}
    with pytest.raises(ValueError, match="^load_best_model_at_end: step 1 was best so far, and"):
        trainer(tmp_path, **again, **FIRST).train()


def test_a_run_that_ended_early_ends_at_once_when_it_is_resumed(tmp_path):
    options = {"early_stopping_patience": 2, "save_steps": 1, "max_steps": 9, **FIRST}
    first = trainer(tmp_path, **options).train()
    model = (tmp_path / "model.safetensors").read_bytes()
    again = trainer(tmp_path, resume_from_checkpoint="latest", **options).train()
    assert first.stalled and again.stalled and (first.steps, again.steps) == (3, 3)
    assert (tmp_path / "model.safetensors").read_bytes() == model
    assert "(early_stopping_patience)" in (tmp_path / "README.md").read_text()


def test_a_checkpoint_that_a_callback_wants_stays(tmp_path):
    trainer(tmp_path, [Wishes("save", 2)], load_best_model_at_end=True).train()
    assert kept(tmp_path) == ["checkpoint-2", "checkpoint-5"]


def test_checkpoints_of_the_best_do_not_pile_up_over_crashes(tmp_path):
    class Crash(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_begin(self, args, state, control, **more):
            if state.global_step == self.step:
                raise KeyError("crash")

    for step in (2, 4):
        with pytest.raises(KeyError):
            resumed = {"resume_from_checkpoint": "latest"} if step > 2 else {}
            trainer(tmp_path, [Crash(step)], load_best_model_at_end=True, **resumed).train()
    trainer(tmp_path, load_best_model_at_end=True, resume_from_checkpoint="latest").train()
    assert kept(tmp_path) == ["checkpoint-5"]


def test_a_damaged_checkpoint_of_earlier_is_left_alone(tmp_path):
    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 3:
                (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{")

    trainer(tmp_path, [Damage()], save_steps=2, load_best_model_at_end=True).train()
    assert (tmp_path / "checkpoint-2").exists() and (tmp_path / "model.safetensors").exists()


def test_a_metric_without_a_number_is_no_guide(tmp_path):
    tied = [row | {"scores": [1.0] * len(row["scores"])} for row in HELD_OUT]
    args = TrainConfig(
        output_dir=str(tmp_path),
        load_best_model_at_end=True,
        metric_for_best_model="rewards/accuracies",
        **OPTIONS,
    )
    with pytest.raises(ValueError, match="^metric_for_best_model: eval/rewards/accuracies of the"):
        RRHFTrainer(str(demo.MODEL_DIR), args, ROWS, tied).train()


DATA = {"model_name_or_path": "m", "train_data": "rows.jsonl"}
HELD = DATA | {"eval_fraction": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DATA | {"load_best_model_at_end": True}, "load_best_model_at_end: needs held-out rows"),
        (DATA | {"early_stopping_patience": 1}, "early_stopping_patience: needs held-out rows"),
        (
            {"early_stopping_patience": 1, "metric_for_best_model": "accuracy"},
            "metric_for_best_model: expected loss, .*, found 'accuracy'",
        ),
        (
            DATA
            | {
                "eval_fraction": 0.1,
                "load_best_model_at_end": True,
                "metric_for_best_model": "reward",
            },
            "metric_for_best_model: reward needs eval_reward_fn",
        ),
        (
            {"load_best_model_at_end": True, "optim": "adamw_8bit"},
            "load_best_model_at_end, optim: the moments",
        ),
    ],
)
def test_what_cannot_decide_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train(TrainConfig(**options))


def test_the_demo_by_its_reward(tmp_path):
    options = {"metric_for_best_model": "reward", "load_best_model_at_end": True, "max_steps": 3}
    result = train(TrainConfig(output_dir=str(tmp_path), eval_steps=1, **options))
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rewards = {r["step"]: r["eval/reward"] for r in found if r.get("eval/reward") and r["step"]}
    assert result.after["reward"] == max(rewards.values()) == rewards[result.best_step]
