"""DPO, GRPO and RLOO by TRL (pip install rrhf-fast[experiments]), for comparison.

They get the same data as the trainer: DPO the best and the worst response of each row, GRPO and
RLOO the same prompts and as many samples of the live model. TRL appends EOS to a response given as
text, as the trainer does.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt

from rrhf_fast.data.load import load_rows
from rrhf_fast.model.decoder import load_model, load_tokenizer
from rrhf_fast.stages.options import check
from rrhf_fast.stages.reward_fn import load_reward_fn


@dataclass
class PeerConfig:
    """Options of all, named as in the trainer."""

    model_name_or_path: str
    train_data: str
    train_batch_size: Annotated[int, Gt(0)] = 16
    """Prompts of one optimizer step."""
    num_train_epochs: Annotated[float, Gt(0)] = 2.0
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    beta: Annotated[float, Ge(0)] = 0.1
    """Weight of the penalty for leaving the initial model."""
    seed: int = 0

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)


@dataclass
class GRPOConfig(PeerConfig):
    """Options of GRPO and RLOO, which draw their own samples."""

    reward_fn: str = ""
    """package.module:function, called as function(prompts, responses) -> scores."""
    num_samples: int = 4
    """Responses per prompt; GRPO and RLOO learn only where their rewards differ."""
    max_new_tokens: int = 64


def dpo(config: PeerConfig, output_dir: Path) -> None:
    """Train on the best and the worst response of each row; write the model."""
    from trl import DPOConfig, DPOTrainer

    rows, _ = load_rows(config.train_data, on_bad_rows="skip")
    pairs = []
    for row in rows:
        best, worst = row.rewards.index(max(row.rewards)), row.rewards.index(min(row.rewards))
        if row.rewards[best] > row.rewards[worst]:
            chosen, rejected = row.responses[best], row.responses[worst]
            pairs.append({"prompt": row.prompt, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise ValueError(f"train_data: {config.train_data}: no row has responses of unequal scores")
    options = _shared(config, output_dir) | {
        "per_device_train_batch_size": config.train_batch_size,
    }
    _fit(DPOTrainer, config, output_dir, pairs, args=DPOConfig(**options))


def grpo(config: GRPOConfig, output_dir: Path) -> None:
    """Train on samples of the live model; write the model."""
    from trl import GRPOConfig as Arguments
    from trl import GRPOTrainer

    _fit_online(GRPOTrainer, Arguments, config, output_dir)


def rloo(config: GRPOConfig, output_dir: Path) -> None:
    """Train on samples of the live model, each against the mean of its prompt's others; write the
    model."""
    from trl import RLOOConfig as Arguments
    from trl import RLOOTrainer

    _fit_online(RLOOTrainer, Arguments, config, output_dir)


def _fit_online(trainer_class: type, arguments: type, config: GRPOConfig, output_dir: Path) -> None:
    score = load_reward_fn(config.reward_fn, "reward_fn")

    def reward(prompts, completions, **_):
        return score(prompts, completions)

    with open(config.train_data, encoding="utf-8") as file:
        prompts = [{"prompt": json.loads(line)["prompt"]} for line in file]
    options = _shared(config, output_dir) | {
        # TRL counts responses.
        "per_device_train_batch_size": config.train_batch_size * config.num_samples,
        "num_generations": config.num_samples,
        "max_completion_length": config.max_new_tokens,
        "temperature": 1.0,
    }
    args = arguments(**options)
    _fit(trainer_class, config, output_dir, prompts, args=args, reward_funcs=reward)


def _shared(config: PeerConfig, output_dir: Path) -> dict:
    return {
        "output_dir": str(output_dir),
        "num_train_epochs": config.num_train_epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": config.beta,
        "seed": config.seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _fit(trainer_class: type, config: PeerConfig, output_dir: Path, rows: list[dict], **options):
    from datasets import Dataset

    tokenizer = load_tokenizer(config.model_name_or_path)
    trainer = trainer_class(
        model=load_model(config.model_name_or_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    trainer.save_model(str(output_dir))
    tokenizer.save_pretrained(output_dir)
