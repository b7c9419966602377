"""Options of `python -m rrhf_fast.evaluate`."""

from dataclasses import dataclass

from rrhf_fast.data.options import RowsConfig
from rrhf_fast.score.config import ScorerConfig
from rrhf_fast.stages.options import expect


@dataclass
class EvaluationOptions(ScorerConfig):
    """How fresh samples are drawn and scored."""

    num_samples: int = 4
    """Fresh samples of each held-out prompt."""
    max_new_tokens: int = 128
    """Tokens of a fresh sample, its end token included."""
    temperature: float = 1.0
    """Divides the logits."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    num_bootstrap: int = 2000
    """Draws behind each 95 % interval; prompts are what is drawn."""
    seed: int = 0
    """Of samples and intervals."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for what cannot work."""
        super().validate()
        if self.policy_as_reward:
            raise ValueError(
                "policy_as_reward: a model's own p cannot say how good its samples are"
            )
        for name in ("num_samples", "max_new_tokens", "num_bootstrap"):
            expect(self, name, lambda value: value >= 1, "at least 1")
        expect(self, "temperature", lambda value: value > 0, "more than 0")
        expect(self, "top_p", lambda value: 0 < value <= 1, "more than 0, at most 1")
        expect(self, "seed", lambda value: value >= 0, "0 or more")


@dataclass
class EvaluateConfig(RowsConfig, EvaluationOptions):
    """Options of `python -m rrhf_fast.evaluate`."""

    data: str | list[str] | None = None
    """Held-out rows with a prompt: files, patterns, folders or Hugging Face datasets, as in the
    trainer's train_data."""
    output_dir: str | None = None
    """Where samples, scores, evaluation.json, evaluation.png and report.html go. The same command
    goes on where it was."""
    overwrite: bool = False
    """Give up the evaluation that output_dir holds."""
    baseline: str | None = None
    """A model to compare with on the same prompts, or the scored.jsonl of its own evaluation."""
    ranking_data: str | list[str] | None = None
    """Held-out rows with scores: how often does the model's p rank two responses as they do?"""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for what cannot work."""
        super().validate()
        self.reading()
        for name in ("model_name_or_path", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
