"""Callbacks of transformers (`transformers.TrainerCallback`): early stopping, loggers of one's own.

Called are on_init_end, on_train_begin, on_epoch_begin, on_step_begin, on_step_end, on_log,
on_evaluate, on_save, on_epoch_end and on_train_end, on every rank. Metrics are named as in TRL:
loss, rewards/accuracies, eval_loss, eval_rewards/accuracies, ...
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace

from transformers import TrainerCallback, TrainerControl, TrainerState

from rrhf_fast.train.best import watched_metric
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.prepare import Run


def checked_callbacks(
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None,
) -> list[TrainerCallback]:
    """The callbacks, made where classes are given. Raises ValueError for anything else."""
    if not isinstance(callbacks, Sequence | None):
        problem = f"expected a list of callbacks, found a {type(callbacks).__name__}"
        raise ValueError(f"callbacks: {problem}")
    made = [c() if isinstance(c, type) else c for c in callbacks or ()]
    for callback in made:
        if not isinstance(callback, TrainerCallback):
            problem = f"expected transformers' TrainerCallback, found {callback!r:.80}"
            raise ValueError(f"callbacks: {problem}")
    return made


class _Arguments(SimpleNamespace):
    """The options of `TrainConfig`, and those of TrainingArguments that callbacks read."""

    def __init__(self, config: TrainConfig, run: Run):
        super().__init__(**asdict(config))
        self.output_dir = self.logging_dir = str(run.output_dir)
        self.eval_strategy = "no" if run.held_out is None else "steps"
        self.logging_strategy, self.save_strategy = "steps", "steps" if config.save_steps else "no"
        self.logging_first_step = False
        self.eval_delay, self.gradient_accumulation_steps = 0, 1
        self.per_device_train_batch_size = config.train_batch_size
        self.world_size, self.process_index = run.world.size, run.world.rank
        _, self.greater_is_better = watched_metric(config)

    def to_dict(self) -> dict:
        """The options by name."""
        return dict(vars(self))

    def to_json_string(self) -> str:
        """The options as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)


class Callbacks:
    """The callbacks of a run, and what they see: args, `state`, `control`, and the model, which is
    a plain one while they run."""

    def __init__(self, callbacks: list[TrainerCallback], run: Run):
        self.callbacks, self.run, self.control = callbacks, run, TrainerControl()
        self.any_rank_has_some = any(run.world.gather(bool(callbacks)))
        config = run.config
        self.args = _Arguments(config, run)
        self.state = TrainerState(
            max_steps=run.num_steps,
            num_train_epochs=-(-run.num_steps // run.steps_per_epoch),
            train_batch_size=config.train_batch_size,
            logging_steps=config.logging_steps,
            eval_steps=config.eval_steps or run.steps_per_epoch,
            save_steps=config.save_steps or run.num_steps,
            is_local_process_zero=run.world.device.index in (None, 0),
            is_world_process_zero=run.world.is_first,
        )
        self.given: dict = {}  # optimizer and lr_scheduler, once there are any

    def __call__(self, event: str, **more) -> None:
        """Call `event` of all; `more` are its own arguments, such as logs or metrics."""
        if not self.callbacks:
            return
        shared = {"model": self.run.model.lm, "processing_class": self.run.tokenizer, **self.given}
        with self.run.model.generation():
            for callback in self.callbacks:
                call = getattr(callback, event)
                control = call(self.args, self.state, self.control, **shared, **more)
                if not isinstance(control, TrainerControl | None):
                    name = f"{type(callback).__name__}.{event}"
                    problem = f"expected the control or None from {name}, found {control!r:.80}"
                    raise ValueError(f"callbacks: {problem}")
                self.control = control or self.control

    def logged(self, record: dict[str, float]) -> None:
        """on_log, and the record in `state.log_history`."""
        self.state.log_history.append(record)
        self("on_log", logs=record)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """on_log and on_evaluate; then update `state.best_metric`, as transformers does."""
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.logged(named | {"step": self.state.global_step, "epoch": self.state.epoch})
        self("on_evaluate", metrics=named)
        value = named.get("eval_" + self.args.metric_for_best_model.removeprefix("eval_"))
        best = self.state.best_metric
        sign = 1 if self.args.greater_is_better else -1
        if value is not None and (best is None or sign * value > sign * best):
            self.state.best_metric = value
            self.state.best_global_step = self.state.global_step

    def take(self, name: str) -> bool:
        """Whether a callback of any rank asked for `should_<name>`; the wish is granted once."""
        if not self.any_rank_has_some:
            return False
        wish = getattr(self.control, f"should_{name}")
        setattr(self.control, f"should_{name}", False)
        return any(self.run.world.gather(wish))
