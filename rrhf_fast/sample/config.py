"""Options of `python -m rrhf_fast.sample`: which rows, which models, which decoding policies."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from rrhf_fast.data.chat import refuse_reserved
from rrhf_fast.data.options import RowsConfig
from rrhf_fast.stages.endpoint import EndpointConfig
from rrhf_fast.stages.hub import DatasetHubConfig
from rrhf_fast.stages.options import (
    as_config,
    check,
    check_magnitudes,
    check_temperature,
    check_within,
)
from rrhf_fast.stages.serve import ServeConfig


@dataclass
class Policy:
    """One way to get responses; a run may have several."""

    method: Literal["greedy", "beam", "diverse_beam", "sample", "provided", "openai"] = "sample"
    """provided takes the responses that the row holds, openai asks an OpenAI-compatible endpoint;
    the others decode here."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What decodes here. vllm (pip install vllm) is made for many prompts and knows no diverse
    beams; its samples repeat only with send_seed."""
    engine_kwargs: dict = field(default_factory=dict)
    """Arguments of vLLM's class LLM, such as {tensor_parallel_size: 8, max_model_len: 4096}."""
    model: str | None = None
    """Folder or hub name of a model, or the endpoint's name for one. Default:
    --model_name_or_path."""
    source: str | None = None
    """Name to record in the `sources` of rows. Default: the method, or openai:MODEL. Provided
    responses keep theirs."""

    num_responses: Annotated[int, Ge(1), Le(10**4)] | None = None
    """Responses per prompt. Default: 1 for greedy and openai, else 4; provided takes all."""
    max_new_tokens: Annotated[int, Ge(1)] = 128
    """Tokens per response at most, its end token included. A model behind an endpoint that thinks
    needs more: its thoughts count."""
    temperature: Annotated[float, Ge(0)] | None = 1.0
    """Divides the logits; greedy and beam ignore it. 0 is for openai alone, and so is null, which
    sends none, for models that take only their default."""
    top_p: Annotated[float, Gt(0), Le(1)] | None = 1.0
    """Sample from the likeliest tokens that hold this share of the probability. null, for openai
    alone, sends none."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample from the k likeliest tokens; 0 for all."""
    num_beams: Annotated[int, Ge(1), Le(10**4)] | None = None
    """Beams per prompt. Default: num_responses."""
    num_beam_groups: Annotated[int, Ge(1)] | None = None
    """Groups that diverse beams are dealt into evenly. Default: one per beam."""
    diversity_penalty: Annotated[float, Ge(0)] = 1.0
    """Subtracted from the log-prob of a token for each beam of an earlier group that chose it."""
    use_responses: Literal["all", "provided", "sampled"] = "all"
    """Which responses of the row `provided` takes. provided: those whose source begins with
    provided, chosen or rejected; in rows without sources the last two. sampled: the others."""

    base_url: str | None = None
    """Address of the endpoint, such as http://localhost:8000/v1. Default: that of the server which
    --serve_command starts, else that of OpenAI."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key. Local servers need none."""
    chat: bool = True
    """Send a string prompt as one message of the user; false sends it as it is to /completions,
    which base models need. Messages that end with one of the assistant ask to continue it: vLLM
    does, OpenAI refuses."""
    send_tokens: bool = False
    """Send prompts to /completions as the tokens that training sees, rendered here, and take the
    responses as they were generated, as from a local model; vLLM can. Start it with
    --generation-config vllm, or the model's own settings decide what is not sent."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer for send_tokens. Default: that of the model."""
    extra_body: dict = field(default_factory=dict)
    """Further fields of each request that only some servers know, such as {reasoning_effort: low},
    or {use_beam_search: true} of vLLM, for num_beams beams. {chat_template_kwargs: {}} where an
    endpoint refuses those of options and rows."""

    @property
    def count(self) -> int:
        """Responses per prompt."""
        return self.num_responses or (1 if self.method in ("greedy", "openai") else 4)

    @property
    def recorded_source(self) -> str:
        """The entry in `sources` of a new response of this policy."""
        if self.source is not None:
            return self.source
        if self.method == "openai":
            return f"openai:{self.model}" if self.model else "openai"
        return f"{self.method}:{Path(self.model).name}" if self.model else self.method

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        check(self)
        check_magnitudes(self)
        remote = self.method == "openai"
        for name in ("temperature", "top_p"):
            if getattr(self, name) is None and not remote:
                raise ValueError(f"{name}: expected a number (null is for method openai)")
        if self.temperature == 0 and not remote:
            raise ValueError("temperature: expected more than 0 (or method greedy), found 0")
        if not remote:
            check_temperature(self.temperature)
        if not isinstance(self.extra_body.get("chat_template_kwargs", {}), dict):
            raise ValueError("extra_body: chat_template_kwargs: expected names and values")
        if self.backend == "vllm" and self.method in ("diverse_beam", "openai", "provided"):
            problem = f"vllm decodes with greedy, beam or sample, found method {self.method}"
            raise ValueError(f"backend: {problem}")
        if self.engine_kwargs and self.backend != "vllm":
            raise ValueError("engine_kwargs: is for backend vllm")
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
class SampleConfig(RowsConfig, EndpointConfig, ServeConfig, DatasetHubConfig):
    """Rows, models and decoding"""

    data: str | list[str] | None = None
    """Rows with a prompt, and responses if they have some: files (.jsonl, .json, .parquet, .csv,
    also .gz or .zst), patterns, folders, or datasets of the Hugging Face hub as NAME, NAME:SPLIT or
    NAME:CONFIG:SPLIT."""
    output: str | None = None
    """File of rows to write. OUTPUT.journal beside it keeps unfinished work."""
    overwrite: bool = False
    """Replace an output that exists already, and drop unfinished work."""
    model_name_or_path: str | None = None
    """Model of every policy that names none: a folder, or a name on the Hugging Face hub."""
    policies: list[Policy] = field(default_factory=lambda: [Policy()])
    """Where responses come from, in the order in which a row will hold them, such as
    '[{method: greedy}, {method: sample, top_p: 0.9}]'. Default: four samples at temperature 1."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}, or {chat_template: NAME} to
    choose one of several. Those of a row take precedence."""
    max_prompt_length: Annotated[int, Ge(1)] | None = None
    """Tokens; a longer prompt keeps its tail. Default: prompts are never cut."""
    stop_strings: list[str] = field(default_factory=list)
    """Cut each new response before the first of these. Default: never."""
    keep_all: bool = False
    """Keep responses that are empty, or equal to an earlier one of their row."""
    finished_only: bool = False
    """Leave out responses that max_new_tokens cut off; training on them teaches to end there."""

    batch_size: Annotated[int, Ge(1)] = 16
    """Prompts that are decoded at once; lower it if memory runs out. If prompt and response fill
    the context window, the longest prompt of a batch decides how much room its responses have."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the models. auto: bfloat16 on a GPU that has it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Only for models whose author you trust."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the run, from which each batch derives its own, and with send_seed each request."""

    def __post_init__(self):
        # Files and command lines give plain dicts.
        self.policies = as_config(Policy, self.policies, "policies")

    def is_served(self, policy: Policy) -> bool:
        """Whether a policy asks the server that serve_command starts."""
        is_here = policy.method == "openai" and policy.base_url is None
        return is_here and self.serve_command is not None

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for values that cannot work, also together."""
        check(self)
        self.check_serving()
        self.reading()
        if "" in self.stop_strings:
            raise ValueError("stop_strings: an empty text would cut every response to nothing")
        for name in ("data", "output", "policies"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
        self.repository()
        refuse_reserved(self.chat_template_kwargs)
        for i, policy in enumerate(self.policies):
            check_within(f"policies[{i}]", Policy.validate, policy)
            if policy.method != "provided" and not (policy.model or self.model_name_or_path):
                problem = "missing (or name one by model_name_or_path)"
                raise ValueError(f"policies[{i}].model: {problem}")
