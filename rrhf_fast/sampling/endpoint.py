"""OpenAI-compatible endpoints: ask, try again, count; and many requests at once into a journal."""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from rrhf_fast.data.journal import Journal
from rrhf_fast.sampling.config import EndpointConfig


class EndpointDown(RuntimeError):
    """No answer after all retries, or one that no retry can mend (a wrong key or model). What was
    done before is in the journal."""


class Refused(ValueError):
    """The endpoint rejects this request, and would again: too long, say, or filtered."""


@dataclass(frozen=True)
class Answer:
    """A text, and what it took to get it."""

    text: str
    finish_reason: str | None
    usage: dict[str, int]  # prompt_tokens, completion_tokens, requests


class Endpoint:
    """One server, asked through the openai client, by as many threads as like."""

    def __init__(self, base_url: str | None, api_key_env: str, config: EndpointConfig):
        """Raises ValueError when the openai package or the key of a named server is missing."""
        try:
            import openai
        except ImportError as error:
            problem = "the openai package is not installed; pip install rrhf-fast[openai]"
            raise ValueError(f"openai: {problem}") from error
        key = os.environ.get(api_key_env)
        if key is None and base_url is None:
            raise ValueError(f"api_key_env: the environment variable {api_key_env} is not set")
        self._openai, self._max_retries = openai, config.max_retries
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",
            timeout=config.timeout,
            # The client waits and tries again for time-outs, lost connections, 408, 409, 429, 5xx.
            max_retries=config.max_retries,
        )
        self.name = base_url or "OpenAI"

    def ask(self, model: str, prompt: str | list[dict], *, chat: bool = True, **options) -> Answer:
        """The answer to messages, or to a string (as one user message; with `chat` false by
        /completions).

        Raises EndpointDown and Refused.
        """
        if isinstance(prompt, list) or chat:
            messages = prompt
            if isinstance(prompt, str):
                messages = [{"role": "user", "content": prompt}]
            create = self._client.chat.completions.with_raw_response.create
            options["messages"] = messages
        else:
            create = self._client.completions.with_raw_response.create
            options["prompt"] = prompt
        openai, requests = self._openai, 0
        for attempt in range(self._max_retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, 8.0))
            try:
                raw = create(model=model, **options)
                requests += 1 + raw.retries_taken
                return _read(raw.parse(), requests)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                raise Refused(_first_line(error)) from error
            except openai.APIStatusError as error:
                if error.status_code == 413:
                    raise Refused(_first_line(error)) from error
                raise EndpointDown(f"{self.name}: {_first_line(error)}") from error
            except openai.APIConnectionError as error:  # time-outs too
                cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
                raise EndpointDown(f"{self.name}: {_first_line(error)}{cause}") from error
            except (ValueError, AttributeError, TypeError, IndexError) as error:
                problem = f"an answer that is no completion ({_first_line(error)})"
        raise EndpointDown(f"{self.name}: {problem}, {self._max_retries + 1} times")


def _read(completion: Any, requests: int) -> Answer:
    choice = completion.choices[0]
    text = choice.message.content if hasattr(choice, "message") else choice.text
    if not isinstance(text, str):
        raise ValueError("no text")
    usage = {"requests": requests}
    for name in ("prompt_tokens", "completion_tokens"):
        usage[name] = getattr(completion.usage, name, None) or 0
    return Answer(text, choice.finish_reason, usage)


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
