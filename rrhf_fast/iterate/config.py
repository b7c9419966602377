"""Options of `python -m rrhf_fast.iterate`."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from rrhf_fast import demo
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.evaluate.config import EvaluationOptions
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.stages.options import as_config, check_within
from rrhf_fast.train.config import TrainConfig


def _paper_policies() -> list[Policy]:
    """The paper's DP: diverse beams of the model, and the dataset's own responses."""
    return [
        Policy(method="diverse_beam", temperature=0.8),
        Policy(method="provided", use_responses="provided"),
    ]


@dataclass
class IterateConfig(RowsConfig, EvaluationOptions):
    """Model, rows, rounds and output"""

    model_name_or_path: str | None = None
    """Model that the first round starts from: a folder, or a name on the Hugging Face hub. Without
    it and data, the embedded demo runs."""
    data: str | list[str] | None = None
    """Rows to sample for: files (.jsonl, .json, .parquet, .csv, also .gz or .zst), patterns,
    folders, or datasets of the Hugging Face hub as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT."""
    eval_data: str | list[str] | None = None
    """Held-out rows, named as for data, whose prompts are sampled for at each evaluation."""
    ranking_data: str | list[str] | None = None
    """Held-out rows with responses and scores, to measure how often the model's mean log-prob ranks
    two responses as their scores do."""
    output_dir: str | None = None
    """Folder for the files of all rounds and the report; a run that was interrupted resumes from
    it. Default: runs/DATE-TIME."""
    rounds: Annotated[int, Ge(1)] = 2
    """Rounds of sampling, scoring, training and evaluating (IP-n in the paper). A finished run can
    be given more."""
    steps_per_round: Annotated[int, Ge(1), Le(10**9)] | None = None
    """Make a round this many optimizer steps over fresh prompts (OP-k in the paper), at a constant
    learning rate; the optimizer's state is carried on, except that of LoRA, whose adapters are
    merged and drawn anew. Default: a round passes over all rows."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """error: stop at the first bad row. skip: leave out bad responses and rows. Training always
    leaves out rows with fewer than two scored responses."""
    policies: list[Policy] = field(default_factory=_paper_policies)
    """Where responses come from, such as '[{method: sample, num_responses: 4}]'; without a model,
    from that of the round. Default: four diverse beams at temperature 0.8, and the responses that
    the rows provide."""
    finished_only: bool = False
    """Leave responses that max_new_tokens cut off out of training."""
    kl_coef: Annotated[float, Ge(0)] = 0.0
    """Subtract kl_coef * log(model / reference) from the scores that are trained on, against reward
    hacking. The paper's online runs use 0.01."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Options of the trainer; the rounds set its model, data and output_dir."""

    def __post_init__(self):
        # Files and command lines give plain dicts.
        self.policies = as_config(Policy, self.policies, "policies")
        self.train = as_config(TrainConfig, self.train, "train")

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        super().validate()
        self.reading()
        for name in ("model_name_or_path", "data", "eval_data"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
        samples = SampleConfig(
            data="data",
            output="output",
            model_name_or_path="model",
            policies=self.policies,
            serve_command=self.serve_command,
        )
        samples.validate()
        for i, policy in enumerate(self.policies):
            if policy.method == "openai" and policy.model is None and not samples.is_served(policy):
                problem = (
                    "missing: no server knows the model of a round unless it is started for it"
                )
                how = "name a model of the server, or leave base_url out and set --serve_command"
                raise ValueError(f"policies[{i}].model: {problem} ({how})")
        defaults = TrainConfig()
        for name, instead in TRAIN_OPTIONS_ELSEWHERE.items():
            if getattr(self.train, name) != getattr(defaults, name):
                raise ValueError(f"train.{name}: is not used here ({instead})")
        if self.steps_per_round is not None and self.train.optim == "adamw_8bit":
            problem = "the moments of adamw_8bit cannot be carried on from round to round"
            raise ValueError(f"steps_per_round, train.optim: {problem}")
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if self.steps_per_round is not None and getattr(self.train, name):
                problem = "a round goes on from the last step of the one before"
                raise ValueError(f"steps_per_round, train.{name}: {problem}")
        rounds = [self.train_config(i, "model", Path(f"round-{i}")) for i in (1, 2, self.rounds)]
        for train in (self.train, *rounds):
            check_within("train", TrainConfig.validate, train)

    def train_config(self, number: int, model: str, folder: Path) -> TrainConfig:
        """The trainer's options in a round, which works in `folder` and starts from `model`."""
        options = {
            "model_name_or_path": model,
            "train_data": str(folder / "scored.jsonl"),
            "output_dir": str(folder / "model"),
            # What an attempt left that came to no checkpoint is of no use.
            "overwrite_output_dir": True,
            "on_bad_rows": "skip",
            "trust_remote_code": self.trust_remote_code,
            "chat_template_kwargs": self.chat_template_kwargs,
            "seed": self.train.seed + number,
        }
        if self.steps_per_round is not None:
            steps = self.steps_per_round
            options |= {"max_steps": steps, "save_steps": steps, "save_total_limit": 1}
            # A schedule that decays would end with every round.
            options |= {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}
            if number > 1 and self.train.use_peft:  # each round draws adapters of its own
                options |= {"warmup_steps": 0.0}
            elif number > 1:
                before = folder.parent / f"round-{number - 1}" / "model" / f"checkpoint-{steps}"
                options |= {"warmup_steps": 0.0, "init_optimizer_from": str(before)}
        return replace(self.train, **options)


_PUSHING = (
    "push a round's model by: hf upload NAME OUTPUT_DIR/round-N/model . "
    "--include='model*.safetensors*' --include='*config.json' --include='token*' "
    "--include=chat_template.jinja --exclude='*/*'; with LoRA, from round-N/merged"
)
# The trainer's options that the rounds decide, and what to say instead.
TRAIN_OPTIONS_ELSEWHERE = {
    "model_name_or_path": "say --model_name_or_path",
    "train_data": "say --data",
    "output_dir": "say --output_dir",
    "chat_template_kwargs": "say --chat_template_kwargs",
    "show_tokens": "run python -m rrhf_fast.train --show_tokens 3",
    "columns": "say --columns",
    "group_by": "say --group_by",
    "apply_chat_template": "say --apply_chat_template",
    "push_to_hub": _PUSHING,
    "hub_model_id": _PUSHING,
    "hub_private_repo": _PUSHING,
    "dry_run": "run python -m rrhf_fast.train --dry_run true",
}

# Options of the default run, wherever the caller leaves them at their default.
DEMO = {
    "model_name_or_path": str(demo.MODEL_DIR),
    "data": str(demo.TRAIN_FILE),
    "eval_data": str(demo.EVAL_FILE),
    "ranking_data": str(demo.EVAL_FILE),
    "reward_fn": demo.SETTINGS["eval_reward_fn"],
    "max_new_tokens": 96,
    "policies": [
        Policy(method="diverse_beam", temperature=0.8, max_new_tokens=96),
        Policy(method="sample", num_responses=2, max_new_tokens=96),
        Policy(method="provided", use_responses="provided"),
    ],
    "train": TrainConfig(learning_rate=1e-3, train_batch_size=16, num_train_epochs=2.0),
}


def with_demo(config: IterateConfig) -> IterateConfig:
    """The demo's settings for every option that is at its default, the trainer's too."""
    untouched = {name: value for name, value in DEMO.items() if name not in _changes(config)}
    train = replace(DEMO["train"], **_changes(config.train))
    return replace(config, **untouched | {"train": train})


def _changes(config: IterateConfig | TrainConfig) -> dict:
    """The options that are not at their default."""
    defaults, names = type(config)(), [f.name for f in fields(config)]
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(defaults, name)}
