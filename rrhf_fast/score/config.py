"""Options of `python -m rrhf_fast.score`: what a response is worth."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from rrhf_fast.data.chat import refuse_reserved
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.stages.endpoint import EndpointConfig
from rrhf_fast.stages.hub import DatasetHubConfig
from rrhf_fast.stages.options import check, check_magnitudes


@dataclass
class RewardConfig:
    """Where scores come from: exactly one of the first four"""

    reward_model_name_or_path: str | None = None
    """Reward model: one that transformers' AutoModelForSequenceClassification loads with one
    label; a folder, or a name on the Hugging Face hub."""
    reward_fn: str | None = None
    """Function PACKAGE.MODULE:FUNCTION, called as function(prompts, responses) -> scores."""
    judge_model: str | None = None
    """Model behind an OpenAI-compatible endpoint, asked to rate relevance, correctness, coherence
    and safety from 1 to 5. A score is the sum, 4 to 20."""
    policy_as_reward: bool = False
    """Score by the mean log-prob of the response under model_name_or_path."""

    reward_input: Literal["auto", "chat", "text", "pair"] = "auto"
    """How the reward model reads prompt and response: by its chat template, as one text, or as a
    pair. auto: chat for messages if there is a template, else pair if the tokenizer has a
    separator, else text."""
    reward_max_length: Annotated[int, Ge(1)] = 2048
    """Tokens that the reward model reads; lowered to its context window. Longer texts lose their
    head."""


@dataclass
class JudgeConfig:
    """The judge"""

    base_url: str | None = None
    """Address of the judge, such as http://localhost:8000/v1. Default: that of OpenAI."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the judge's key. Local servers need none."""
    judge_max_new_tokens: Annotated[int, Ge(1)] = 256
    """Tokens per judgement at most. Raise it for a judge that thinks: its thoughts count."""
    judge_temperature: Annotated[float, Ge(0)] | None = 0.0
    """Temperature of the first try; a malformed judgement is asked for again at 1. null sends none,
    for models that take only their default."""
    judge_extra_body: dict = field(default_factory=dict)
    """Further fields of each request, such as {reasoning_effort: low} or
    {chat_template_kwargs: {enable_thinking: false}}."""


@dataclass
class LogProbsConfig:
    """Models whose log-probs are needed"""

    model_name_or_path: str | None = None
    """Policy: the model that the responses come from, for kl_coef and policy_as_reward."""
    reference_model_name_or_path: str | None = None
    """Model under which the policy's responses should stay likely."""
    packing: Literal["forest", "none"] = "forest"
    """forest encodes each prompt once for all its responses. none pads one row per response, which
    is slower and works for every causal model."""
    max_tokens_per_pack: Annotated[int, Ge(1)] = 8192
    """Tokens per forward pass; lower it if memory runs out."""


@dataclass
class ModelsConfig:
    """Every model that runs here"""

    chat_template_kwargs: dict = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}, or {chat_template: NAME} to
    choose one of several. Those of a row take precedence."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Responses that the reward model reads, or prompts whose log-probs are computed, at once;
    lower it if memory runs out."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the models. auto: bfloat16 on a GPU that has it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Only for models whose author you trust."""


@dataclass
class ScorerConfig(RewardConfig, LogProbsConfig, ModelsConfig, JudgeConfig, EndpointConfig):
    """How responses are scored: options that score, evaluate and iterate share."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        check(self)
        check_magnitudes(self)
        kinds = ("reward_model_name_or_path", "reward_fn", "judge_model", "policy_as_reward")
        named = [name for name in kinds if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(
                f"{', '.join(kinds)}: expected exactly one, found {' and '.join(named) or 'none'}"
            )
        refuse_reserved(self.chat_template_kwargs)
        if self.policy_as_reward and self.model_name_or_path is None:
            raise ValueError("model_name_or_path: missing (the policy whose log-probs are needed)")


@dataclass
class ScoreConfig(RowsConfig, ScorerConfig, DatasetHubConfig):
    """Rows"""

    data: str | list[str] | None = None
    """Rows with a prompt and responses: files (.jsonl, .json, .parquet, .csv, also .gz or .zst),
    patterns, folders, or datasets of the Hugging Face hub as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.
    Scores that they have are replaced."""
    output: str | None = None
    """File of rows to write. OUTPUT.journal beside it keeps unfinished work."""
    overwrite: bool = False
    """Replace an output that exists already, and drop unfinished work."""
    kl_coef: Annotated[float, Ge(0)] = 0.0
    """Subtract kl_coef * log(policy(response) / reference(response)) from each score, so that
    training does not drift far from the reference model. The paper's online runs use 0.01."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        super().validate()
        self.reading()
        for name in ("data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
        self.repository()
        for name in ("model_name_or_path", "reference_model_name_or_path"):
            if self.kl_coef and getattr(self, name) is None:
                raise ValueError(f"{name}: missing (kl_coef compares policy and reference)")
