"""OpenAI-compatible endpoints: ask, try again, count; and many requests at once into a journal."""

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

# How endpoints say that they do not take a parameter, whatever is asked.
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
    """No answer after all retries, or one that no retry can mend (a wrong key or model). What was
    done before is in the journal."""


class Endpoint:
    """One server, asked through the openai client, by as many threads as like."""

    def __init__(
        self,
        base_url: str | None,
        api_key_env: str,
        config: EndpointConfig,
        cures: Mapping[str, tuple[str, str]] | None = None,
    ):
        """
        Args:
            cures: for each parameter of a request that some endpoints do not take, the option to
                change, and what to set it to.

        Raises:
            ValueError: the openai package or the key is missing, or no header can hold the key.
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
            raise ValueError(f"api_key_env: {api_key_env} holds what no HTTP header can")
        self._openai, self._max_retries = openai, config.max_retries
        self._cures = cures or {}
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._key or "none",
            timeout=config.timeout,
            # The client waits and tries again for time-outs, lost connections, 408, 409, 429, 5xx.
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
        """The answer to messages, or to a string (as one user message; with `chat` false by
        /completions).

        Args:
            max_tokens: of the answer; sent by the name that the endpoint takes.
            options: further parameters; those that are None are not sent.

        Raises:
            Refused: there is no text for this request.
            EndpointDown: no answer came.
            ValueError: the endpoint takes a parameter for no request, and `cures` says what to do.
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
                what = f"an answer that is no completion ({self._reason(error)})"
                problem = EndpointDown(f"{self.name}: {what}, {self._max_retries + 1} times")
        raise problem

    def _post(self, chat: bool, max_tokens: int, options: dict) -> Any:
        """The response to a request; for any other status than 200 it raises as `ask` does."""
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
        """The response to a request with the limit under the name that the endpoint takes."""
        if not chat:  # there it has one name
            create = self._client.completions.with_raw_response.create
            return create(max_tokens=max_tokens, **options)
        create = self._client.chat.completions.with_raw_response.create
        name = self._limit
        try:
            return create(**{name: max_tokens}, **options)
        except self._openai.BadRequestError as error:
            newer = "max_completion_tokens"
            named = "max_tokens" in _said(error) or newer in _said(error)
            if not (self._find_limit and named) or name == newer:
                raise
            response = create(**{newer: max_tokens}, **options)
            self._limit = newer  # for the rest of the run, as it made the difference
            return response

    def _refusal(self, error: Any) -> ValueError:
        """What a response of status 400 or 422 comes to."""
        reason, said = self._reason(error), _said(error)
        for parameter, (option, cure) in self._cures.items():
            # In quotes, and no key of a request that the server repeats.
            named = re.search(rf"['\"`]{parameter}\\?['\"`](?!\s*:)", said)
            if named and _UNSUPPORTED.search(said):
                problem = f"the endpoint does not take this {parameter}: {reason}"
                return ValueError(f"{option}: {problem} (set it to {cure})")
        return Refused(reason)

    def _reason(self, error: BaseException) -> str:
        text = one_line(error)
        if re.fullmatch(r"Error code: \d+", text) and getattr(error, "body", None):
            text += f" - {_said(error)[:300]}"  # a body that is not in OpenAI's form
        return self._hide_key(text)

    def _hide_key(self, text: str) -> str:
        # A shorter one is a local server's, and no secret.
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


def _said(error: Any) -> str:
    """What the body of an error response says, in one line."""
    return json.dumps(error.body)[:2000]


def ask_all(
    work: Mapping[str, Callable[[], Any]],
    journal: Journal,
    max_concurrency: int,
    progress: tqdm,
) -> None:
    """Run the functions of `work` in threads and journal each result under its key.

    At the first exception nothing new begins, what is under way is finished and journalled, and the
    exception is raised.
    """

    def run(key: str) -> None:
        journal.write(key, work[key]())

    with ThreadPoolExecutor(max_concurrency) as pool:
        try:
            for future in as_completed([pool.submit(run, key) for key in work]):
                future.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
