"""Which evaluation was the best so far, and whether later ones stopped getting better.

Both are read off the records of metrics.jsonl, so a resumed run decides as an undisturbed one does.
The evaluation before the first step does not count: no training made that model. Nor does one whose
metric is not finite, but it is no better than others.
"""

import math

from rrhf_fast.train.config import TrainConfig


def watched_metric(config: TrainConfig) -> tuple[str, bool]:
    """The name of `metric_for_best_model`, as the records have it, and whether higher is better."""
    name = config.metric_for_best_model.removeprefix("eval_")
    higher = config.greater_is_better
    return f"eval/{name}", not name.endswith("loss") if higher is None else higher


def best_step(records: list[dict], config: TrainConfig) -> int | None:
    """The step of the best evaluation, the first of equal ones; None before there is any."""
    values = _values(records, config)
    finite = {step: value for step, value in values.items() if value is not None}
    return max(finite, key=finite.get, default=None)


def has_stalled(records: list[dict], config: TrainConfig) -> bool:
    """Whether the last `early_stopping_patience` evaluations were all no better than an earlier
    one."""
    patience, evaluated = config.early_stopping_patience, list(_values(records, config))
    if patience is None or len(evaluated) <= patience:
        return False
    return best_step(records, config) not in evaluated[-patience:]


def check_metric(records: list[dict], config: TrainConfig) -> None:
    """Raise ValueError if the run's first evaluation has no number to go by."""
    name, _ = watched_metric(config)
    if not any(record.get(name) is not None for record in records if record["step"] == 0):
        problem = f"{name} of the held-out rows is not a number"
        raise ValueError(f"metric_for_best_model: {problem} (choose another metric)")


def worse_than_before(
    before: dict[str, float], best: dict[str, float], config: TrainConfig
) -> str | None:
    """What to say if no evaluation was as good as that before the first step."""
    name, higher = watched_metric(config)
    name = name.removeprefix("eval/")
    if not {name} <= before.keys() & best.keys():
        return None
    old, new = before[name], best[name]
    if not math.isfinite(new) or (new >= old if higher else new <= old):
        return None
    return f"{name} was {old:.4g} before the first step and never as good again, at best {new:.4g}"


def _values(records: list[dict], config: TrainConfig) -> dict[int, float | None]:
    """How good each evaluation was, by its step; None for a metric that was not finite."""
    name, higher = watched_metric(config)
    sign = 1.0 if higher else -1.0
    return {
        record["step"]: None if record[name] is None else sign * record[name]
        for record in records
        if name in record and record["step"] > 0
    }
