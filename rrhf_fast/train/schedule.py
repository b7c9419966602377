"""The learning-rate schedule, one of transformers'."""

import inspect
import math

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from rrhf_fast.train.config import TrainConfig

# These follow a metric, which this trainer does not pass.
BY_METRIC = {"reduce_lr_on_plateau", "greedy"}
# Arguments of transformers' schedules that the trainer sets.
OURS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, num_steps: int
) -> LRScheduler:
    """Build the schedule of `num_steps` steps from `lr_scheduler_type` and `lr_scheduler_kwargs`.

    Raises:
        ValueError: no such schedule, or it does not accept these arguments; the message lists those
            that exist.
    """
    name = config.lr_scheduler_type
    given = {key: _number(value) for key, value in config.lr_scheduler_kwargs.items()}
    names = {kind.value for kind in SchedulerType} - BY_METRIC
    if name not in names:
        problem = f"{name!r} is unknown"
        if name in BY_METRIC:
            problem = f"{name!r} follows a metric, which no option names"
        raise ValueError(f"lr_scheduler_type: {problem} (expected {', '.join(sorted(names))})")
    warmup = config.warmup_steps
    warmup = int(warmup) if warmup >= 1 else math.ceil(warmup * num_steps)
    accepted = _accepted(name)
    try:
        if unknown := [argument for argument in given if argument not in accepted]:
            raise ValueError(f"it has no {unknown[0]}")
        _check_stages(name, given, warmup, num_steps)
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            # These schedules count from before the first step, where warm-up has rate 0.
            num_training_steps=num_steps + 1,
            scheduler_specific_kwargs={"last_epoch": 0} | given,
        )
        _check_rates(schedule, warmup, num_steps)
    except (ValueError, TypeError, ArithmeticError) as error:
        takes = ", ".join(
            f"{argument} (required)" if is_required else argument
            for argument, is_required in accepted.items()
        )
        problem = f"{name} takes {takes or 'no arguments'}; found {given or 'none'} ({error})"
        raise ValueError(f"lr_scheduler_kwargs: {problem}") from error
    return schedule


def _number(value: object) -> object:
    """Convert strings to numbers: YAML reads 1e-6, which has no point, as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _accepted(name: str) -> dict[str, bool]:
    """The arguments that a schedule accepts, and whether each is required."""
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    return {
        argument: parameter.default is inspect.Parameter.empty
        for argument, parameter in parameters.items()
        if argument not in OURS
    }


def _check_stages(name: str, given: dict, warmup: int, num_steps: int) -> None:
    """Reject a decay longer than the run: warmup_stable_decay would start in the middle of it."""
    decay = given.get("num_decay_steps")
    if name != "warmup_stable_decay" or not isinstance(decay, int | float):
        return  # transformers reports the problem
    if not 0 <= decay <= num_steps - warmup:
        left = f"{num_steps} steps with {warmup} of warm-up leave {num_steps - warmup}"
        raise ValueError(f"num_decay_steps is {decay}, but {left}")


def _check_rates(schedule: LRScheduler, warmup: int, num_steps: int) -> None:
    """Try the schedule at some steps, so that a bad argument fails now, not in mid-run."""
    for step in {1, warmup + 1, num_steps // 2, num_steps * 3 // 4, num_steps}:
        for factor in (function(step) for function in schedule.lr_lambdas):
            if isinstance(factor, complex) or not 0 <= factor < math.inf:
                raise ValueError(f"the learning rate of step {step} would be {factor} times itself")
