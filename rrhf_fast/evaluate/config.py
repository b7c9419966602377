"""Options of `python -m rrhf_fast.evaluate`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from rrhf_fast.data.options import RowsConfig
from rrhf_fast.sample.config import Policy
from rrhf_fast.score.config import ScorerConfig
from rrhf_fast.stages.options import check_temperature
from rrhf_fast.stages.serve import ServeConfig


@dataclass
class EvaluationOptions(ScorerConfig, ServeConfig):
    """Fresh samples and their measures"""

    num_samples: Annotated[int, Ge(1), Le(10**4)] = 4
    """Fresh samples per held-out prompt; more narrow the intervals and show more of best-of-n."""
    max_new_tokens: Annotated[int, Ge(1)] = 128
    """Tokens per fresh sample at most, its end token included."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits of the model that samples."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    max_prompt_length: Annotated[int, Ge(1)] | None = None
    """Tokens; a longer prompt keeps its tail when it is sampled for. Default: never cut."""
    stop_strings: list[str] = field(default_factory=list)
    """Cut each new response before the first of these. Default: never."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What draws these samples here. vllm (pip install vllm) is made for many prompts. With
    serve_command, the server that it starts draws them."""
    engine_kwargs: dict = field(default_factory=dict)
    """Arguments of vLLM's class LLM, such as {tensor_parallel_size: 8, max_model_len: 4096}."""
    num_bootstrap: Annotated[int, Ge(1), Le(10**6)] = 2000
    """Bootstrap draws of the prompts behind each 95 % interval."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the samples and the intervals."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        super().validate()
        check_temperature(self.temperature)
        if "" in self.stop_strings:
            raise ValueError("stop_strings: an empty text would cut every response to nothing")
        self.check_serving()
        self.sampling("model").validate()
        if self.policy_as_reward:
            raise ValueError(
                "policy_as_reward: a model's own p cannot say how good its samples are"
            )

    def sampling(self, model: str, source: str | None = None) -> Policy:
        """How the samples of a model are drawn."""
        return Policy(
            method="sample" if self.serve_command is None else "openai",
            model=model,
            source=source,
            num_responses=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            send_tokens=self.serve_command is not None,
            backend=self.backend,
            engine_kwargs=self.engine_kwargs,
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
