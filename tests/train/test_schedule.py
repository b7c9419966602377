"""Every offered schedule works, with its arguments; all others are refused by name."""

import inspect
import math

import pytest
import torch
from transformers.trainer_utils import SchedulerType

from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.stages.command import parse_config
from rrhf_fast.train.optimizer import build_optimizer
from rrhf_fast.train.schedule import BY_METRIC

STEPS = 20
# Required arguments of schedules.
NEEDED = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
}


def rates(name, arguments, warmup=4, steps=STEPS):
    """The learning rate of every step, as a share of the peak."""
    config = TrainConfig(
        lr_scheduler_type=name, lr_scheduler_kwargs=arguments, warmup_steps=warmup,
        learning_rate=1e-3,
    )  # fmt: skip
    config.validate()
    optimizer, schedule = build_optimizer(torch.nn.Linear(2, 2), config, steps)
    shares = []
    for _ in range(steps):
        shares.append(schedule.get_last_lr()[0] / 1e-3)
        optimizer.step()
        schedule.step()
    return shares


def names_offered():
    with pytest.raises(ValueError, match="lr_scheduler_type: 'wave' is unknown") as caught:
        rates("wave", {})
    return str(caught.value).partition("(expected ")[2].removesuffix(")").split(", ")


def test_every_offered_schedule_works():
    names = names_offered()
    assert set(names) == {kind.value for kind in SchedulerType} - BY_METRIC
    assert {"linear", "cosine_with_min_lr", "warmup_stable_decay"} <= set(names)
    for name in names:
        shares = rates(name, NEEDED.get(name, {}))
        assert max(shares) == pytest.approx(1) and min(shares) >= 0, name


@pytest.mark.parametrize("name", sorted(BY_METRIC))
def test_schedules_that_follow_a_metric_are_refused(name):
    with pytest.raises(ValueError, match=f"lr_scheduler_type: '{name}' follows a metric"):
        rates(name, {})


def test_arguments_take_effect():
    """Against the schedules' definitions; transformers counts from one step earlier."""
    cosine = rates("cosine_with_min_lr", {"min_lr": 1e-4})
    shares = [(n - 4) / (STEPS + 1 - 4) for n in range(4, STEPS + 1)]
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert cosine[3:] == pytest.approx(expected)
    stable = rates("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "linear"})
    assert stable == pytest.approx([0.25, 0.5, 0.75, *[1] * 13, 0.8, 0.6, 0.4, 0.2])
    twice = rates("cosine_with_restarts", {"num_cycles": 2}, warmup=0)
    assert twice[10] > 0.9 > 0.1 > twice[9]
    square = rates("polynomial", {"power": 2.0, "lr_end": 0.0}, warmup=0)
    assert square == pytest.approx([(1 - n / 21) ** 2 for n in range(1, 21)])
    assert rates("inverse_sqrt", {"timescale": 9}, warmup=0)[-1] == pytest.approx(math.sqrt(9 / 29))


MISTAKES = {
    "a missing argument": ("warmup_stable_decay", {}, "takes num_decay_steps (required)"),
    "one of two missing": ("cosine_with_min_lr", {}, "takes num_cycles, min_lr, min_lr_rate; "),
    "both of two": ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0.1}, "Only one of min_lr"),
    "of another schedule": ("cosine", {"min_lr": 0.1}, "cosine takes num_cycles; found"),
    "of one that takes none": ("constant", {"power": 2}, "constant takes no arguments; found"),
    "an option's own": ("linear", {"num_warmup_steps": 3}, "it has no num_warmup_steps"),
    "the start": ("cosine", {"last_epoch": 3}, "it has no last_epoch"),
    "a text": ("cosine", {"num_cycles": "two"}, "cosine takes num_cycles; found {'num_cycles'"),
    "a list that is used late": ("polynomial", {"power": [2]}, "polynomial takes lr_end, power;"),
    "a choice": ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "fall"}, "'fall'"),
    "a decay that is too long": (
        "warmup_stable_decay", {"num_decay_steps": 17}, "20 steps with 4 of warm-up leave 16",
    ),
    "an end above the start": ("polynomial", {"lr_end": 1.0}, "lr_end"),
    "a negative rate": ("polynomial", {"lr_end": -1.0}, "times itself"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_option_schedule_and_arguments(mistake):
    name, arguments, problem = MISTAKES[mistake]
    with pytest.raises(ValueError) as caught:
        rates(name, arguments)
    message = str(caught.value)
    assert message.startswith("lr_scheduler_kwargs: ") and name in message and problem in message


def test_from_a_file_and_a_command_line(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr: 1e-6\n")
    for arguments in (
        ["--config", str(file)],
        ["--lr_scheduler_kwargs", '{"min_lr": 1e-6}'],
        ["--lr_scheduler_kwargs", "{min_lr: 1e-6}"],
        ["--lr_scheduler_kwargs.min_lr", "1e-6"],
    ):
        config = parse_config(TrainConfig, arguments)
        shares = rates("cosine_with_min_lr", config.lr_scheduler_kwargs | {"num_cycles": 0.5})
        assert shares == rates("cosine_with_min_lr", {"min_lr": 1e-6})
    with pytest.raises(ValueError, match="lr_scheduler_kwargs: expected dict, found"):
        TrainConfig(lr_scheduler_kwargs=["min_lr"]).validate()


@pytest.mark.parametrize("name", ["warmup_stable_decay", "cosine_with_min_lr"])
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(tmp_path, name):
    options = {
        "model_name_or_path": str(demo.MODEL_DIR), "train_data": str(demo.TRAIN_FILE),
        "train_batch_size": 2, "max_steps": 6, "warmup_steps": 2, "save_steps": 3,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1} if "min" in name else {"num_decay_steps": 3},
    }  # fmt: skip

    def curve(result):
        return [record["learning_rate"] for record in result.metrics if "learning_rate" in record]

    whole = train(TrainConfig(output_dir=str(tmp_path / "whole"), **options))
    again = train(
        TrainConfig(
            output_dir=str(tmp_path / "again"), **options,
            resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"),
        )
    )  # fmt: skip
    assert len(curve(whole)) == 6 and curve(again) == pytest.approx(curve(whole)[3:])


def test_the_arguments_set_by_the_trainer_still_exist_in_transformers():
    from transformers.optimization import get_cosine_schedule_with_warmup

    names = set(inspect.signature(get_cosine_schedule_with_warmup).parameters)
    assert names == {
        "optimizer",
        "num_warmup_steps",
        "num_training_steps",
        "num_cycles",
        "last_epoch",
    }
