"""Options of `python -m rrhf_fast.sample`: which rows, which models, which decoding policies."""

from dataclasses import dataclass, field
from typing import Literal

from rrhf_fast.data.chat import check_kwargs
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.stages.endpoint import EndpointConfig
from rrhf_fast.stages.options import check_types, expect


@dataclass
class Policy:
    """One way to get responses; a run may have several."""

    method: Literal["greedy", "beam", "diverse_beam", "sample", "provided", "openai"] = "sample"
    """Provided: those that the row holds. Openai: an OpenAI-compatible endpoint. The others decode
    with transformers."""
    model: str | None = None
    """A folder or hub name, or the endpoint's name of a model; default model_name_or_path."""
    source: str | None = None
    """What `sources` records; default the method, or "openai:model". Provided responses keep the
    sources that they have."""

    num_responses: int | None = None
    """Responses a prompt: default 1 for greedy and openai, else 4; provided keeps all."""
    max_new_tokens: int = 128
    """Tokens of a response, its end token included; of an endpoint's model that thinks, its
    thoughts too."""
    temperature: float | None = 1.0
    """Divides the logits; greedy and beam do not use it. Openai: null sends none, for models that
    refuse all but their default."""
    top_p: float | None = 1.0
    """Sample from the likeliest tokens that hold this share of the probability. Openai: null sends
    none."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 for all."""
    num_beams: int | None = None
    """Beams of a prompt; default num_responses."""
    num_beam_groups: int | None = None
    """Groups that diverse beams are dealt into; default a group for each beam."""
    diversity_penalty: float = 1.0
    """Taken from a token's log-prob for each beam of an earlier group that chose it."""
    use_responses: Literal["all", "provided", "sampled"] = "all"
    """Which of the row's responses `provided` keeps; see the trainer's use_responses."""

    base_url: str | None = None
    """The endpoint's address, for example http://localhost:8000/v1; default OpenAI's."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; local servers need none."""
    chat: bool = True
    """Send a string prompt as one user message; false sends it as it is to /completions. Messages
    that end with the assistant's are to be continued, which vLLM does and OpenAI's API refuses."""
    extra_body: dict = field(default_factory=dict)
    """Further fields of each request, for what only some servers know, such as {reasoning_effort:
    low}; {chat_template_kwargs: {}} where an endpoint refuses those of the options and rows."""

    @property
    def count(self) -> int:
        """Responses a prompt."""
        return self.num_responses or (1 if self.method in ("greedy", "openai") else 4)

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        check_types(self)
        for name in ("num_responses", "max_new_tokens", "num_beams", "num_beam_groups"):
            expect(self, name, lambda value: value is None or value >= 1, "at least 1")
        remote = self.method == "openai"
        for name in ("temperature", "top_p"):
            if getattr(self, name) is None and not remote:
                raise ValueError(f"{name}: expected a number (null is for method openai)")
        if self.temperature is not None and not (remote and self.temperature == 0):
            expect(self, "temperature", lambda value: value > 0, "more than 0 (or method greedy)")
        expect(self, "top_p", lambda value: value is None or 0 < value <= 1, "above 0, at most 1")
        for name in ("top_k", "diversity_penalty"):
            expect(self, name, lambda value: value >= 0, "0 or more")
        if not isinstance(self.extra_body.get("chat_template_kwargs", {}), dict):
            raise ValueError("extra_body: chat_template_kwargs: expected names and values")
        if self.method == "greedy" and self.count > 1:
            raise ValueError(f"num_responses: greedy gives 1, found {self.count}")
        if (self.num_beams or self.count) < self.count:
            problem = f"{self.num_beams} beams give no {self.count} responses"
            raise ValueError(f"num_beams: {problem}")
        if (self.num_beams or self.count) % (self.num_beam_groups or 1):
            beams = self.num_beams or self.count
            problem = f"{beams} beams cannot be dealt evenly into {self.num_beam_groups} groups"
            raise ValueError(f"num_beam_groups: {problem}")


@dataclass
class SampleConfig(RowsConfig, EndpointConfig):
    """Options of `python -m rrhf_fast.sample`."""

    data: str | list[str] | None = None
    """Rows with a prompt, and responses if they have some: files, patterns, folders or Hugging Face
    datasets, as in the trainer's train_data."""
    output: str | None = None
    """The file of rows to write; OUTPUT.journal keeps unfinished work."""
    overwrite: bool = False
    """Replace an output that is there already, and give up unfinished work."""
    model_name_or_path: str | None = None
    """The model of every policy that names none."""
    policies: list[Policy] = field(default_factory=lambda: [Policy()])
    """Where responses come from, in the order in which a row will hold them."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}, or {chat_template: name} to
    choose one of several. A row's own come on top."""
    max_prompt_length: int | None = None
    """Tokens; a longer prompt keeps its tail. Default: never cut a prompt."""
    stop_strings: list[str] = field(default_factory=list)
    """Cut each new response at the first of these."""
    keep_all: bool = False
    """Keep responses that are empty, or equal to an earlier one of their row."""
    finished_only: bool = False
    """Leave out responses that max_new_tokens cut off: the trainer would end them there."""

    batch_size: int = 16
    """Prompts that are decoded at once. Where prompt and response fill the model's window, the
    longest prompt leaves room for all of its batch."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the models: auto is bfloat16 on a GPU that has it, else float32."""
    trust_remote_code: bool = False
    """Run code that ships with a model. Off unless you trust its author."""
    seed: int = 0
    """Each batch, and each request, draws its own seed from this one."""

    def __post_init__(self):
        # A file or a command line gives plain dicts.
        self.policies = [
            policy if isinstance(policy, Policy) else Policy(**policy) for policy in self.policies
        ]

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for what cannot work."""
        check_types(self)
        self.reading()
        for name in ("data", "output", "policies"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
        self.validate_endpoint()
        for name in ("batch_size", "max_prompt_length"):
            expect(self, name, lambda value: value is None or value >= 1, "at least 1")
        check_kwargs(self.chat_template_kwargs)
        expect(self, "seed", lambda value: value >= 0, "0 or more")
        for i, policy in enumerate(self.policies):
            try:
                policy.validate()
                if policy.method != "provided" and not (policy.model or self.model_name_or_path):
                    raise ValueError("model: missing (or name one by model_name_or_path)")
            except ValueError as error:
                raise ValueError(f"policies[{i}].{error}") from error
