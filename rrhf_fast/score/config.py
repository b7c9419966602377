"""Options of `python -m rrhf_fast.score`: what a response is worth."""

from dataclasses import dataclass, field
from typing import Literal

from rrhf_fast.data.chat import check_kwargs
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.stages.endpoint import EndpointConfig
from rrhf_fast.stages.options import check_types, expect


@dataclass
class ScorerConfig(EndpointConfig):
    """Where scores come from: exactly one of the first four options."""

    reward_model_name_or_path: str | None = None
    """A reward model of transformers: AutoModelForSequenceClassification with one label."""
    reward_fn: str | None = None
    """package.module:function, called as function(prompts, responses) -> scores."""
    judge_model: str | None = None
    """A model behind an OpenAI-compatible endpoint, asked for relevance, correctness, coherence and
    safety from 1 to 5; a score is their sum, 4 to 20."""
    policy_as_reward: bool = False
    """Score by p, the length-normalised log-prob of model_name_or_path."""

    reward_input: Literal["auto", "chat", "text", "pair"] = "auto"
    """How the reward model reads: chat template; prompt and response as one text; or as a pair.
    Auto: chat for messages if there is a template, else pair if the tokenizer has a separator, else
    text."""
    reward_max_length: int = 2048
    """Tokens that the reward model reads; lowered to its window. Longer texts lose their head."""
    base_url: str | None = None
    """The judge's address, for example http://localhost:8000/v1; default OpenAI's."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the judge's key; local servers need none."""
    judge_max_new_tokens: int = 256
    """Tokens of a judgement; raise it for a judge that thinks, whose thoughts count too."""
    judge_temperature: float | None = 0.0
    """Of a judge's first try; what is malformed is asked for again at 1. Null sends none, for
    models that refuse all but their default."""
    judge_extra_body: dict = field(default_factory=dict)
    """Further fields of each request to the judge, such as {reasoning_effort: low} or
    {chat_template_kwargs: {enable_thinking: false}}."""

    model_name_or_path: str | None = None
    """The policy."""
    reference_model_name_or_path: str | None = None
    """The model that the policy's responses should stay likely under."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}, or {chat_template: name} to
    choose one of several. A row's own come on top."""
    packing: Literal["forest", "none"] = "forest"
    """How log-probs are computed; see the trainer's packing."""
    max_tokens_per_pack: int = 8192
    """Tokens of one forward."""

    batch_size: int = 16
    """Responses that the reward model reads, or prompts whose log-probs are computed, at once."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the models: auto is bfloat16 on a GPU that has it, else float32."""
    trust_remote_code: bool = False
    """Run code that ships with a model. Off unless you trust its author."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for what cannot work."""
        check_types(self)
        kinds = ("reward_model_name_or_path", "reward_fn", "judge_model", "policy_as_reward")
        named = [name for name in kinds if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(
                f"{', '.join(kinds)}: expected exactly one, found {' and '.join(named) or 'none'}"
            )
        self.validate_endpoint()
        for name in (
            "batch_size",
            "max_tokens_per_pack",
            "reward_max_length",
            "judge_max_new_tokens",
        ):
            expect(self, name, lambda value: value >= 1, "at least 1")
        check_kwargs(self.chat_template_kwargs)
        expect(self, "judge_temperature", lambda value: value is None or value >= 0, "0 or more")
        if self.policy_as_reward and self.model_name_or_path is None:
            raise ValueError("model_name_or_path: missing (the policy whose log-probs are needed)")


@dataclass
class ScoreConfig(RowsConfig, ScorerConfig):
    """Options of `python -m rrhf_fast.score`."""

    data: str | list[str] | None = None
    """Rows with a prompt and responses: files, patterns, folders or Hugging Face datasets, as in
    the trainer's train_data. Scores that they have are replaced."""
    output: str | None = None
    """The file of rows to write; OUTPUT.journal keeps unfinished work."""
    overwrite: bool = False
    """Replace an output that is there already, and give up unfinished work."""
    kl_coef: float = 0.0
    """Takes kl_coef * log(policy(response) / reference(response)) from each score; 0.01 in the
    paper's online runs."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for what cannot work."""
        super().validate()
        self.reading()
        for name in ("data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
        expect(self, "kl_coef", lambda value: value >= 0, "0 or more")
        for name in ("model_name_or_path", "reference_model_name_or_path"):
            if self.kl_coef and getattr(self, name) is None:
                raise ValueError(f"{name}: missing (kl_coef compares policy and reference)")
