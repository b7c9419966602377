"""OpenAI-compatible endpoints: ask, retry, count; and journal many concurrent requests."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from tqdm import tqdm

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.answer import Answer, NoCompletion, Refused, read_answer
from rrhf_fast.stages.journal import Journal

# How endpoints report that they do not support a parameter at all.
_UNSUPPORTED = re.compile(
    "unsupported|not support|only the default|unknown|unrecognized|unexpected|not permitted|"
    "not allowed|extra_forbidden|deprecated|cannot both",
    re.IGNORECASE,
)


@dataclass
class EndpointConfig:
    """Requests to OpenAI-compatible endpoints (pip install rrhf-fast[openai])"""

    timeout: Annotated[float, Gt(0)] = 120.0
    """Seconds to wait for an answer."""
    max_retries: Annotated[int, Ge(0)] = 5
    """Further tries, with growing pauses, after a time-out, a refusal for load (429), a server
    error or an answer that cannot be read."""
    max_concurrency: Annotated[int, Ge(1)] = 8
    """Requests under way at the same time."""
    token_limit_parameter: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    """Name of the token limit in chat requests. auto: max_tokens, and max_completion_tokens once
    the endpoint refuses that."""
    send_seed: bool = True
    """Send a seed with each request; false for endpoints that refuse one."""


class EndpointDown(RuntimeError):
    """No answer after all retries, or an error that no retry fixes (a wrong key or model). Earlier
    results are in the journal."""


class Endpoint:
    """One server, asked through the openai client; threads may share it."""

    def __init__(
        self,
        base_url: str | None,
        api_key_env: str,
        config: EndpointConfig,
        cures: Mapping[str, tuple[str, str]] | None = None,
    ):
        """
        Args:
            cures: for each request parameter that some endpoints do not support, the option to
                change and its new value.

        Raises:
            ValueError: the openai package or the key is missing, or the key is not printable ASCII.
        """
        try:
            import openai
        except ImportError as error:
            problem = "the openai package is not installed; pip install rrhf-fast[openai]"
            raise ValueError(f"openai: {problem}") from error
        self._key = os.environ.get(api_key_env, "").strip()
        if not self._key and base_url is None:
            raise ValueError(f"api_key_env: the environment variable {api_key_env} is not set")
        if not (self._key.isascii() and self._key.isprintable()):
            problem = f"{api_key_env} does not fit into an HTTP header (expected printable ASCII)"
            raise ValueError(f"api_key_env: {problem}")
        self._openai, self._max_retries = openai, config.max_retries
        self._cures = cures or {}
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._key or "none",
            timeout=config.timeout,
            # The client waits and retries after time-outs, lost connections, 408, 409, 429, 5xx.
            max_retries=config.max_retries,
        )
        self._find_limit = config.token_limit_parameter == "auto"
        self._limit = "max_tokens" if self._find_limit else config.token_limit_parameter
        self.name = base_url or "OpenAI"

    def ask(
        self,
        model: str,
        prompt: str | list[dict],
        *,
        max_tokens: int,
        chat: bool = True,
        **options,
    ) -> Answer:
        """Ask for the answer to messages, or to a string (sent as one user message, or to
        /completions if `chat` is false).

        Args:
            max_tokens: of the answer; sent under the name that the endpoint supports.
            options: further parameters; None is not sent.

        Raises:
            Refused: no text for this request.
            EndpointDown: no answer.
            ValueError: the endpoint does not support a parameter; says which option to change.
        """
        options = {name: value for name, value in options.items() if value is not None}
        options["model"] = model
        chat = chat or isinstance(prompt, list)
        if chat:
            as_message = [{"role": "user", "content": prompt}]
            options["messages"] = as_message if isinstance(prompt, str) else prompt
        else:
            options["prompt"] = prompt
        requests = 0
        for attempt in range(self._max_retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, 8.0))
            response = self._post(chat, max_tokens, options)
            requests += 1 + response.retries_taken
            try:
                return read_answer(response.http_response.content, chat, requests)
            except Refused:
                raise
            except NoCompletion as error:
                problem = Refused(self._hide_key(str(error)), {"requests": requests})
            except (ValueError, RecursionError) as error:
                what = f"an answer that is not a completion ({self._reason(error)})"
                problem = EndpointDown(f"{self.name}: {what}, {self._max_retries + 1} times")
        raise problem

    def _post(self, chat: bool, max_tokens: int, options: dict) -> Any:
        """Send a request; raises as `ask` does for any status other than 200."""
        openai = self._openai
        try:
            return self._send(chat, max_tokens, options)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise self._refusal(error) from error
        except openai.APIStatusError as error:
            if error.status_code == 413:
                raise Refused(self._reason(error)) from error
            raise EndpointDown(f"{self.name}: {self._reason(error)}") from error
        except openai.APIConnectionError as error:  # time-outs too
            cause = f" ({self._reason(error.__cause__)})" if error.__cause__ else ""
            raise EndpointDown(f"{self.name}: {self._reason(error)}{cause}") from error

    def _send(self, chat: bool, max_tokens: int, options: dict) -> Any:
        """Send a request with its token limit under the name that the endpoint supports."""
        if not chat:  # /completions has only one name for it
            create = self._client.completions.with_raw_response.create
            return create(max_tokens=max_tokens, **options)
        create = self._client.chat.completions.with_raw_response.create
        name = self._limit
        try:
            return create(**{name: max_tokens}, **options)
        except self._openai.BadRequestError as error:
            newer = "max_completion_tokens"
            named = "max_tokens" in _error_body(error) or newer in _error_body(error)
            if not (self._find_limit and named) or name == newer:
                raise
            response = create(**{newer: max_tokens}, **options)
            self._limit = newer  # it worked: use it from now on
            return response

    def _refusal(self, error: Any) -> ValueError:
        """Turn a response with status 400 or 422 into an exception."""
        reason, body = self._reason(error), _error_body(error)
        for parameter, (option, cure) in self._cures.items():
            # In quotes, and not as a key of our own request echoed by the server.
            named = re.search(rf"['\"`]{parameter}\\?['\"`](?!\s*:)", body)
            if named and _UNSUPPORTED.search(body):
                problem = f"the endpoint does not support this {parameter}: {reason}"
                return ValueError(f"{option}: {problem} (set it to {cure})")
        return Refused(reason)

    def _reason(self, error: BaseException) -> str:
        text = one_line(error)
        if re.fullmatch(r"Error code: \d+", text) and getattr(error, "body", None):
            text += f" - {_error_body(error)[:300]}"  # the body is not in OpenAI's format
        return self._hide_key(text)

    def _hide_key(self, text: str) -> str:
        # Shorter keys belong to local servers and are not secret.
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


def _error_body(error: Any) -> str:
    """The body of an error response, as one line."""
    return json.dumps(error.body)[:2000]


def ask_all(
    work: Mapping[str, Callable[[], Any]], journal: Journal, max_concurrency: int, title: str
) -> None:
    """Run those functions of `work` whose keys the journal lacks in threads; journal each result.

    After an exception no further function starts; those under way are finished and journalled, then
    the exception is raised.
    """

    def run(key: str) -> None:
        journal.write(key, work[key]())

    missing = [key for key in work if key not in journal.done]
    bar = {"total": len(work), "initial": len(work) - len(missing), "unit": "response"}
    with (
        tqdm(**bar, desc=title, disable=None) as progress,
        ThreadPoolExecutor(max_concurrency) as pool,
    ):
        try:
            for future in as_completed([pool.submit(run, key) for key in missing]):
                future.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
