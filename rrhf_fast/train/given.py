"""Models, datasets and functions that are given to `RRHFTrainer` as objects."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import transformers

from rrhf_fast.data.sources import InMemory
from rrhf_fast.stages.reward_fn import RewardFn
from rrhf_fast.train.config import TrainConfig

# What a dataset can be given as.
Rows = str | list[str] | Iterable[dict]


@dataclass(frozen=True)
class Given:
    """What is given as an object instead of by a name in the options."""

    model: str | transformers.PreTrainedModel | None = None
    train_dataset: Rows | None = None
    eval_dataset: Rows | None = None
    processing_class: transformers.PreTrainedTokenizerBase | None = None
    reward_fn: RewardFn | None = None

    def complete(self, config: TrainConfig) -> TrainConfig:
        """The options, with the names of what is given."""
        model, names = self.model, {}
        if isinstance(model, str):
            names["model_name_or_path"] = model
        elif isinstance(model, transformers.PreTrainedModel):
            names["model_name_or_path"] = model.config._name_or_path or "model"
        elif model is not None:
            kind = type(model).__name__
            raise ValueError(f"model: expected a name or a PreTrainedModel, found a {kind}")
        if self.reward_fn is not None:
            names["eval_reward_fn"] = getattr(self.reward_fn, "__qualname__", "reward_fn")
        for argument, option in DATASETS.items():
            if (rows := getattr(self, argument)) is not None:
                names[option] = rows if _is_name(rows) else argument
        return replace(config, **names)

    def rows(self, argument: str, config: TrainConfig) -> str | list[str] | InMemory | None:
        """What `load_rows` reads for "train_dataset" or "eval_dataset"."""
        rows = getattr(self, argument)
        if rows is None or _is_name(rows):
            return getattr(config, DATASETS[argument])
        return InMemory(argument, rows)


DATASETS = {"train_dataset": "train_data", "eval_dataset": "eval_data"}


def _is_name(rows: Rows) -> bool:
    return isinstance(rows, str) or (
        isinstance(rows, list) and len(rows) > 0 and all(isinstance(row, str) for row in rows)
    )
