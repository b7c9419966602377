"""Callbacks of transformers (`transformers.TrainerCallback`): early stopping, loggers of one's own.

Called are on_init_end, on_train_begin, on_epoch_begin, on_step_begin, on_step_end, on_log,
on_evaluate, on_save, on_epoch_end and on_train_end, on every rank. Metrics are named as in TRL:
loss, rewards/accuracies, eval_loss, eval_rewards/accuracies, ...
"""

from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace

from transformers import TrainerCallback, TrainerControl, TrainerState

from rrhf_fast.train.prepare import Run


class Callbacks:
    """The callbacks of a run, and what they see: `state` and `control`.

    `args` holds the options of `TrainConfig`, and those of TrainingArguments that the callbacks of
    transformers rely on.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], run: Run):
        self.callbacks = [c() if isinstance(c, type) else c for c in callbacks]
        self.run, self.control = run, TrainerControl()
        config, lower = run.config, not run.config.metric_for_best_model.endswith("loss")
        self.args = SimpleNamespace(
            **asdict(config) | {"output_dir": str(run.output_dir)},
            eval_strategy="no" if run.held_out is None else "steps",
            logging_dir=str(run.output_dir),
            load_best_model_at_end=False,
        )
        if self.args.greater_is_better is None:
            self.args.greater_is_better = lower
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
        shared = {"model": self.run.model.lm, "processing_class": self.run.tokenizer, **self.given}
        for callback in self.callbacks:
            control = getattr(callback, event)(
                self.args, self.state, self.control, **shared, **more
            )
            self.control = control or self.control

    def evaluated(self, metrics: dict[str, float]) -> None:
        """on_evaluate; afterwards `state.best_metric` is up to date, as transformers has it."""
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self("on_evaluate", metrics=named)
        value = named.get("eval_" + self.args.metric_for_best_model.removeprefix("eval_"))
        best = self.state.best_metric
        sign = 1 if self.args.greater_is_better else -1
        if value is not None and (best is None or sign * value > sign * best):
            self.state.best_metric = value
            self.state.best_global_step = self.state.global_step

    def take(self, name: str) -> bool:
        """Whether a callback of any rank asked for `should_<name>`; the wish is granted once."""
        if not self.callbacks:
            return False
        wish = getattr(self.control, f"should_{name}")
        setattr(self.control, f"should_{name}", False)
        return any(self.run.world.gather(wish))
