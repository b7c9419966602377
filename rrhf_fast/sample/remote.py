"""An OpenAI-compatible endpoint as a source of responses.

All responses to a prompt come from one request, so that the endpoint encodes the prompt once. What
is missing (the endpoint gave fewer, or some without text) is asked for again.
"""

import re
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from rrhf_fast.data.load import RowReport
from rrhf_fast.data.rows import Draft, cut_at
from rrhf_fast.export.merge import base_of
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.model.pretrained import ADAPTER_CONFIG
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.sample.local import as_response, seed_of, tokenise_prompts
from rrhf_fast.stages.answer import Answer, EndedThinking, NoCompletion, Refused
from rrhf_fast.stages.endpoint import Endpoint, ask_all
from rrhf_fast.stages.journal import Journal
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.serve import Servers


def check_endpoint(number: int, config: SampleConfig) -> None:
    """Raise ValueError for an address, a key or a tokenizer of a policy that cannot work."""
    policy = config.policies[number]
    if not config.is_served(policy):
        _endpoint_of(number, config, policy.base_url)
    if policy.send_tokens:
        _tokenizer_of(number, config)


def _endpoint_of(number: int, config: SampleConfig, base_url: str | None) -> Endpoint:
    cures = {name: (f"policies[{number}].{name}", "null") for name in ("temperature", "top_p")}
    cures |= {"top_k": (f"policies[{number}].top_k", "0")}
    cures |= {"seed": ("send_seed", "false"), "stop": ("stop_strings", "[]")}
    cures |= dict.fromkeys(_OF_TOKENS, (f"policies[{number}].send_tokens", "false"))
    if config.token_limit_parameter != "auto":
        cures[config.token_limit_parameter] = ("token_limit_parameter", "auto")
    key = config.policies[number].api_key_env
    return Endpoint(base_url, key, config, cures, f"policies[{number}].")


def _tokenizer_of(number: int, config: SampleConfig) -> PreTrainedTokenizerBase:
    policy = config.policies[number]
    names = {
        f"policies[{number}].tokenizer": policy.tokenizer,
        f"policies[{number}].model": policy.model,
        "model_name_or_path": config.model_name_or_path,
    }
    option, name = next((option, name) for option, name in names.items() if name)
    of_adapters = config.is_served(policy) and _base_of(name) is not None
    code = {"trust_remote_code": config.trust_remote_code, "of_adapters": of_adapters}
    return load_tokenizer(name, option=option, **code)


def _base_of(model: str) -> str | None:
    """The base model of a folder of LoRA adapters; None for a model."""
    folder = Path(model)
    is_model = (folder / CONFIG_NAME).exists() or not (folder / ADAPTER_CONFIG).exists()
    return None if is_model else base_of(folder)


# Sent along with tokens; as of vLLM, whose other defaults come from the model's folder.
_OF_TOKENS = {
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_token_ids": True,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
}

# Prompts with a single response where several were asked for, until an endpoint that has never
# given several is taken for one that cannot.
_SINGLE = 3


def ask_endpoint(
    journal: Journal,
    number: int,
    policy: Policy,
    drafts: Sequence[Draft],
    config: SampleConfig,
    servers: Servers,
) -> None:
    """Journal, for each row that the journal lacks, the list of its responses or failures; rows
    whose prompt has no tokens to send have none. Raises ValueError if every request was refused."""
    source = _Source(number, policy, drafts, config)
    work = {f"{number}/{row}": partial(source.responses, row) for row in source.rows}
    if not all(map(journal.has, work)):
        source.connect(servers)

    def check() -> None:
        results = [result for key in work for result in journal.done[key]]
        if all("error" in result for result in results):
            journal.forget(work)
            problem = f"every request was refused: {results[0]['error']}"
            raise ValueError(f"policies[{number}]: {problem}")

    ask_all(work, journal, config.max_concurrency, policy.recorded_source, "prompt")
    journal.ranks.first(check)


class _Source:
    """Asks for the responses to one row at a time; threads may share it."""

    def __init__(self, number: int, policy: Policy, drafts: Sequence[Draft], config: SampleConfig):
        self.number, self.policy, self.drafts, self.config = number, policy, drafts, config
        self.model = policy.model or config.model_name_or_path
        self.is_beam_search = bool(policy.extra_body.get("use_beam_search"))
        self.rows: Sequence[int] = range(len(drafts))
        self.prompts, self.ends = None, []  # tokens by row, those that end a response
        if policy.send_tokens:
            self.tokenizer, report = _tokenizer_of(number, config), RowReport()
            options = (self.tokenizer, drafts, config, report, None)
            self.prompts, self.ends = tokenise_prompts(*options)
            self.rows = sorted(self.prompts)
            for line in report.lines(f"policies[{number}]"):
                say(line)
        # Whether to ask for several at once, whether that has worked, and how often it gave one.
        self._takes_n, self._has_given_n, self._num_single = True, False, 0
        self._lock = threading.Lock()

    def connect(self, servers: Servers) -> None:
        """Start the server if it is ours."""
        base_url = self.policy.base_url
        if self.config.is_served(self.policy):
            base_url, self.model = servers.serve(self.model, _base_of(self.model))
        self.endpoint = _endpoint_of(self.number, self.config, base_url)

    def responses(self, row: int) -> list[dict]:
        """`policy.count` responses or failures; the first one holds the usage of all."""
        count, good, usage, received = self.policy.count, [], Counter(), 0
        refusal: Refused | None = None
        # What has no text may have one at the next try if others had.
        while len(good) < count and received < (2 * count if good else count):
            if self.is_beam_search and received:
                break  # it would find the same beams
            try:
                answers = self._ask(row, min(count - len(good), 2 * count - received), received)
            except Refused as error:
                refusal = error
                usage.update(error.usage)
                break
            for answer in answers:
                usage.update(answer.usage)
                if isinstance(answer, Refused):
                    refusal = answer
                elif len(good) < count:
                    good.append(self._response(answer))
            received += len(answers)
        error = f"{refusal or f'{len(good)} of {count} beams'}{self._cure(refusal, row)}"
        results = good + [{"error": error} for _ in range(count - len(good))]
        results[0]["usage"] = dict(usage)
        return results

    def _ask(self, row: int, count: int, position: int) -> list[Answer | Refused]:
        """Ask for so many responses; an endpoint that does not know n gives one at a time."""
        seed = None
        if self.config.send_seed:
            seed = seed_of(self.config.seed, self.number, row, position) % 2**31
        options = self._request(row) | {"seed": seed}
        if self.is_beam_search:
            width = self.policy.num_beams or count
            return self.endpoint.ask_many(self.model, n=width, **options | {"temperature": 0.0})
        if count == 1 or not self._takes_n:
            return self.endpoint.ask_many(self.model, **options)
        try:
            answers = self.endpoint.ask_many(self.model, n=count, **options)
        except NoCompletion:
            raise
        except Refused as refusal:
            if self._has_given_n:
                raise  # so it is not about n
            try:
                answers = self.endpoint.ask_many(self.model, **options)
            except Refused:
                raise refusal from None  # nor here
            self._ask_singly()
        else:
            with self._lock:
                self._has_given_n |= len(answers) > 1
                self._num_single += len(answers) == 1
            if not self._has_given_n and self._num_single >= _SINGLE:
                self._ask_singly()
        return answers

    def _ask_singly(self) -> None:
        with self._lock:
            if self._takes_n:
                problem = "gives one response per request, so each one is asked for separately"
                say(f"policies[{self.number}]: {self.endpoint.name} {problem}")
            self._takes_n = False

    def _response(self, answer: Answer) -> dict:
        stop_strings = self.config.stop_strings
        if self.prompts is not None and answer.token_ids is not None:
            with self._lock:  # decoding sets up the tokenizer
                response = as_response(answer.token_ids, self.tokenizer, self.ends, stop_strings)
            cut_off = response["finish_reason"] == "length" == answer.finish_reason
            return response | {"finish_reason": "length" if cut_off else "stop"}
        text = cut_at(stop_strings, answer.text)
        cut_off = answer.finish_reason == "length" and text == answer.text
        response = {"text": text, "finish_reason": "length" if cut_off else "stop"}
        return response | ({"as_generated": True} if self.prompts is not None else {})

    def _cure(self, refusal: Refused | None, row: int) -> str:
        """The option to change, if there is one for this refusal."""
        option = f"policies[{self.number}]"
        if isinstance(refusal, EndedThinking):
            return f" (raise the token limit, {option}.max_new_tokens)"
        is_text = isinstance(self.drafts[row].prompt, str)
        as_message = is_text and self.policy.chat and self.prompts is None
        if as_message and re.search("chat.?template", str(refusal), re.IGNORECASE):
            return f" (a base model completes texts: set {option}.chat to false)"
        return ""

    def _request(self, row: int) -> dict:
        """The arguments of `Endpoint.ask_many` for this row, other than n and seed."""
        policy, draft, config = self.policy, self.drafts[row], self.config
        # Fields that OpenAI lacks but local servers support.
        extra = ({"top_k": policy.top_k} if policy.top_k else {}) | policy.extra_body
        prompt, tools = draft.prompt, None
        chat = policy.chat or isinstance(prompt, list)
        if self.prompts is not None:
            prompt, chat = self.prompts[row].tolist(), False
            extra = _OF_TOKENS | {"top_k": policy.top_k, "stop_token_ids": self.ends} | extra
        elif chat:
            tools = draft.tools or None  # some endpoints refuse an empty list
            own = extra.pop("chat_template_kwargs", None)
            kwargs = config.chat_template_kwargs | (own or {}) | (draft.chat_template_kwargs or {})
            kwargs.pop("chat_template", None)  # names a template of the local tokenizer
            # An empty dict in the policy suppresses them, for endpoints that refuse them.
            if kwargs and own != {}:
                extra["chat_template_kwargs"] = kwargs
            if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
                # The answer continues the last message.
                extra = {"continue_final_message": True, "add_generation_prompt": False} | extra
        return {
            "prompt": prompt,
            "chat": chat,
            "tools": tools,
            "max_tokens": policy.max_new_tokens,
            "temperature": policy.temperature,
            "top_p": policy.top_p,
            "stop": config.stop_strings or None,
            "extra_body": extra or None,
        }
