"""Options of `python -m rrhf_fast.evaluate`."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from rrhf_fast.data.options import RowsConfig
from rrhf_fast.score.config import ScorerConfig
from rrhf_fast.stages.options import check_temperature


@dataclass
class EvaluationOptions(ScorerConfig):
    """Fresh samples and their measures"""

    num_samples: Annotated[int, Ge(1), Le(10**4)] = 4
    """Fresh samples per held-out prompt; more narrow the intervals and show more of best-of-n."""
    max_new_tokens: Annotated[int, Ge(1)] = 128
    """Tokens per fresh sample at most, its end token included."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits of the model that samples."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    num_bootstrap: Annotated[int, Ge(1), Le(10**6)] = 2000
    """Bootstrap draws of the prompts behind each 95 % interval."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the samples and the intervals."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        super().validate()
        check_temperature(self.temperature)
        if self.policy_as_reward:
            raise ValueError(
                "policy_as_reward: a model's own p cannot say how good its samples are"
            )


@dataclass
class EvaluateConfig(RowsConfig, EvaluationOptions):
    """Model, rows and output"""

    model_name_or_path: str | None = None
    """Model to evaluate: a folder, or a name on the Hugging Face hub."""
    baseline: str | None = None
    """Model to compare with on the same prompts, or the scored.jsonl of an evaluation of it."""
    data: str | list[str] | None = None
    """Held-out rows with a prompt: files (.jsonl, .json, .parquet, .csv, also .gz or .zst),
    patterns, folders, or datasets of the Hugging Face hub as NAME, NAME:SPLIT or
    NAME:CONFIG:SPLIT."""
    ranking_data: str | list[str] | None = None
    """Held-out rows with responses and scores, to measure how often the model's mean log-prob ranks
    two responses as their scores do."""
    output_dir: str | None = None
    """Folder for samples, scores, evaluation.json, evaluation.png and report.html. An evaluation
    that was interrupted resumes."""
    overwrite: bool = False
    """Drop the evaluation that output_dir holds."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        super().validate()
        self.reading()
        for name in ("model_name_or_path", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
