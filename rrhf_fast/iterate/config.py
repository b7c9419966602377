"""Options of `python -m rrhf_fast.iterate`."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from rrhf_fast import demo
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.evaluate.config import EvaluationOptions
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.stages.options import expect
from rrhf_fast.train.config import TrainConfig


def _paper_policies() -> list[Policy]:
    """The paper's DP: diverse beams of the model, and the data set's own responses."""
    return [
        Policy(method="diverse_beam", temperature=0.8),
        Policy(method="provided", use_responses="provided"),
    ]


@dataclass
class IterateConfig(RowsConfig, EvaluationOptions):
    """Options of `python -m rrhf_fast.iterate`; without model and data it runs the demo."""

    output_dir: str | None = None
    """Where every round's files and the report go; default runs/<date>-<time>. If it is named, the
    same command goes on where it was."""
    rounds: int = 2
    """How often to sample, score, train and evaluate (the paper's IP-n). More may be asked for
    later."""
    steps_per_round: int | None = None
    """The paper's OP-k: a round is this many optimizer steps over fresh prompts, at a constant
    rate, and the optimizer's state is carried on."""

    data: str | list[str] | None = None
    """Rows to sample for: files, patterns, folders or Hugging Face datasets, as in the trainer's
    train_data."""
    eval_data: str | list[str] | None = None
    """Held-out rows, whose prompts are sampled for at each evaluation."""
    ranking_data: str | list[str] | None = None
    """Held-out rows with scores: how often does the model's p rank two responses as they do?"""
    on_bad_rows: Literal["error", "skip"] = "error"
    """Stop at the first bad row, or leave out bad responses and rows. Rows with fewer than 2 scored
    responses are always left out of training."""
    policies: list[Policy] = field(default_factory=_paper_policies)
    """Where responses come from; policies without a model use that of the round."""
    max_prompt_length: int | None = None
    """Tokens; a longer prompt keeps its tail when it is sampled for."""
    stop_strings: list[str] = field(default_factory=list)
    """Cut each new response at the first of these."""
    finished_only: bool = False
    """Train on no response that max_new_tokens cut off."""
    kl_coef: float = 0.0
    """Takes kl_coef * log(model / reference) from the scores that are trained on, to guard against
    reward hacking; 0.01 in the paper."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Options of the trainer; its model, data and output_dir are set by the rounds."""

    def __post_init__(self):
        # A file or a command line gives plain dicts.
        self.policies = [
            policy if isinstance(policy, Policy) else Policy(**policy) for policy in self.policies
        ]
        if isinstance(self.train, dict):
            self.train = TrainConfig(**self.train)

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for what cannot work."""
        super().validate()
        self.reading()
        for name in ("model_name_or_path", "data", "eval_data"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
        for name in ("rounds", "steps_per_round"):
            expect(self, name, lambda value: value is None or value >= 1, "at least 1")
        expect(self, "kl_coef", lambda value: value >= 0, "0 or more")
        SampleConfig(
            data="data", output="output", model_name_or_path="model", policies=self.policies
        ).validate()
        defaults = TrainConfig()
        for name, instead in TRAIN_OPTIONS_ELSEWHERE.items():
            if getattr(self.train, name) != getattr(defaults, name):
                raise ValueError(f"train.{name}: is not used here ({instead})")
        if self.steps_per_round is not None and self.train.optim == "adamw_8bit":
            problem = "the moments of adamw_8bit cannot be carried on from round to round"
            raise ValueError(f"steps_per_round, train.optim: {problem}")
        try:
            self.train.validate()
            for number in (1, 2):
                self.train_config(number, "model", Path(f"round-{number}")).validate()
        except ValueError as error:
            raise ValueError(f"train.{error}") from error

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
            if number > 1:
                before = folder.parent / f"round-{number - 1}" / "model" / f"checkpoint-{steps}"
                options |= {"warmup_steps": 0.0, "init_optimizer_from": str(before)}
        return replace(self.train, **options)


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
