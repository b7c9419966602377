"""Models, datasets and functions that are given to `RRHFTrainer` as objects."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import transformers

from rrhf_fast.data.sources import InMemory
from rrhf_fast.model.decoder import load_tokenizer
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

    @classmethod
    def of(cls, **objects) -> "Given":
        """What is given, with paths as names, a DataFrame as rows, a tokenizer by its name."""
        for name, value in objects.items():
            if isinstance(value, os.PathLike):
                objects[name] = os.fspath(value)
            elif hasattr(value, "to_dict") and hasattr(value, "columns"):  # pandas
                objects[name] = value.to_dict("records")
        if isinstance(objects["processing_class"], str):
            tokenizer = load_tokenizer(objects["processing_class"], option="processing_class")
            objects["processing_class"] = tokenizer
        return cls(**objects)

    def complete(self, config: TrainConfig) -> TrainConfig:
        """The options, with the names of what is given. Raises ValueError for what cannot serve."""
        model, names = self.model, {}
        if isinstance(model, str):
            names["model_name_or_path"] = model
        elif isinstance(model, transformers.PreTrainedModel):
            names["model_name_or_path"] = model.config._name_or_path or "model"
            if not model.can_generate():
                kind = type(model).__name__
                raise ValueError(f"model: expected a causal language model, found a {kind}")
            if config.use_peft and not model.config._name_or_path:
                raise ValueError("model: adapters need a model with a name (save it and name it)")
            if not model.config._name_or_path and self.processing_class is None:
                raise ValueError("processing_class: missing (the model has no name to find it by)")
            if not any(p.requires_grad for p in model.parameters()):
                raise ValueError("model: all of its weights are frozen (requires_grad is False)")
        elif model is not None:
            kind = type(model).__name__
            raise ValueError(f"model: expected a name or a PreTrainedModel, found a {kind}")
        if not (self.reward_fn is None or callable(self.reward_fn)):
            problem = f"expected a function, found {self.reward_fn!r:.80}"
            raise ValueError(f"reward_fn: {problem} (args.eval_reward_fn takes a name)")
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
