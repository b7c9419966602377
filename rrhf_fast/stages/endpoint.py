"""OpenAI-compatible endpoints: ask, retry, count; and journal many concurrent requests."""

import os
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from tqdm import tqdm

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.answer import Answer, NoCompletion, Refused, read_answers
from rrhf_fast.stages.journal import Journal
from rrhf_fast.stages.secrets import hide, hide_in_logs, keep_secret, repeats_secret

# How endpoints report that they do not support a parameter at all.
_UNSUPPORTED = re.compile(
    "unsupported|not support|only the default|unknown|unrecognized|unexpected|not permitted|"
    "not allowed|extra_forbidden|deprecated|cannot both",
    re.IGNORECASE,
)

# One answer at a time: parsed JSON may take 30 times its size. Threads gain nothing there anyway.
_READING = threading.Lock()


@dataclass
class EndpointConfig:
    """Requests to OpenAI-compatible endpoints (pip install openai)"""

    timeout: Annotated[float, Gt(0), Le(86400)] = 600.0
    """Seconds in which one try has to end: connection, request and the whole answer, which may be
    that of many responses."""
    max_retries: Annotated[int, Ge(0), Le(1000)] = 5
    """Further tries, with growing pauses, after a time-out, a refusal for load (429), a server
    error or an answer that cannot be read."""
    max_concurrency: Annotated[int, Ge(1), Le(1000)] = 32
    """Requests under way at the same time, of all processes together (but at least one in each),
    each for all responses to a prompt. A large GPU takes more; endpoints that limit the load may
    need fewer."""
    token_limit_parameter: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    """Name of the token limit in chat requests. auto: max_tokens, and max_completion_tokens once
    the endpoint refuses that."""
    send_seed: bool = False
    """Send a seed with each request: answers then repeat, as far as the endpoint's arithmetic does,
    but vLLM samples more slowly. Some endpoints refuse it."""


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
        where: str = "",
    ):
        """
        Args:
            cures: for each request parameter that some endpoints do not support, the option to
                change and its new value.
            where: what precedes the names of options in errors, such as "policies[0].".

        Raises:
            ValueError: the openai package is missing; the key is missing or holds characters that
                no key has; the address is none, or cannot be reached as the environment says
                (proxies, certificates). Says so without the key.
        """
        try:
            import openai

            from rrhf_fast.stages.transport import LOGGERS, BoundedClient
        except ImportError as error:
            problem = "the openai package is not installed; pip install openai"
            raise ValueError(f"openai: {problem}") from error
        key = _key(base_url, api_key_env, where)
        self._openai, self._max_retries = openai, config.max_retries
        self._cures = cures or {}
        option, address, login, self.name = f"{where}base_url", base_url, {}, "OpenAI"
        if address is None:
            option, address = "OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL") or None
        if address is not None:
            address, login = split_login(address, option)
            self.name = one_line(address, 100)
        keep_secret(key)
        hide_in_logs(*LOGGERS)
        try:
            self._client = openai.OpenAI(
                base_url=address,
                api_key=key or "none",
                default_headers=login,
                timeout=config.timeout,
                http_client=BoundedClient(config.timeout),
            )
        except Exception as error:  # proxies and certificates of the environment
            reason = _shown(re.sub(r"//\S*@", "//", str(error)))
            problem = f"{self.name} cannot be asked ({reason})"
            raise ValueError(f"{option}: {problem}") from None
        self._find_limit = config.token_limit_parameter == "auto"
        self._limit = "max_tokens" if self._find_limit else config.token_limit_parameter

    def ask(
        self,
        model: str,
        prompt: str | list[dict],
        *,
        max_tokens: int,
        chat: bool = True,
        **options,
    ) -> Answer:
        """Ask for one answer; see `ask_many`.

        Raises:
            Refused: no text for this request.
        """
        first = self.ask_many(model, prompt, max_tokens=max_tokens, chat=chat, **options)[0]
        if isinstance(first, Refused):
            raise first
        return first

    def ask_many(
        self,
        model: str,
        prompt: str | list[dict] | list[int],
        *,
        max_tokens: int,
        chat: bool = True,
        **options,
    ) -> list[Answer | Refused]:
        """Ask for answers to messages, or to a string (sent as one user message, or to /completions
        if `chat` is false) or its tokens (sent to /completions).

        Args:
            max_tokens: of an answer; sent under the name that the endpoint supports.
            options: further parameters, such as n; None is not sent.

        Returns:
            The answer of each choice, or the reason why it has no text; more or fewer than n where
            the endpoint wills it. The first one holds the usage of all.

        Raises:
            Refused: the endpoint refuses the request.
            EndpointDown: no answer.
            ValueError: the endpoint does not support a parameter; says which option to change.
        """
        options = {name: value for name, value in options.items() if value is not None}
        options["model"] = model
        is_text = isinstance(prompt, str)
        chat = chat if is_text else isinstance(prompt[0], dict)
        if chat:
            as_message = [{"role": "user", "content": prompt}]
            options["messages"] = as_message if is_text else prompt
        else:
            options["prompt"] = prompt
        requests = 0
        while True:
            response = self._post(chat, max_tokens, options, self._max_retries - requests)
            requests += 1 + response.retries_taken
            answer = response.http_response
            if reason := answer.extensions.get("not_taken"):
                raise Refused(reason, {"requests": requests})
            result = self._result(answer.content, chat, requests)
            if isinstance(result, list):
                return result
            may_differ = isinstance(result, NoCompletion | EndpointDown)
            if not may_differ or requests > self._max_retries:
                raise result
            time.sleep(min(0.5 * 2 ** min(requests, 4), 8.0))

    def _result(self, body: bytes, chat: bool, requests: int) -> list[Answer | Refused] | Exception:
        """The answers in the body of a response with status 200, or why there are none. The
        exception is returned, for one raised here would carry what the endpoint sent."""
        try:
            with _READING:
                answers = read_answers(body, chat, requests)
        except Refused as error:
            usage = error.usage | {"requests": requests}
            return type(error)(_shown(error), usage)
        except ValueError as error:
            times = f", {requests} times" if requests > 1 else ""
            what = f"an answer that is not a completion ({_shown(error)}){times}"
            return EndpointDown(f"{self.name}: {what}")
        return [_without_secrets(answer) for answer in answers]

    def _post(self, chat: bool, max_tokens: int, options: dict, max_retries: int) -> Any:
        """Send a request; raises as `ask` does for any status other than 200."""
        openai = self._openai
        # It waits and retries after time-outs, lost connections, 408, 409, 429 and 5xx.
        client = self._client.with_options(max_retries=max(max_retries, 0))
        try:
            return self._send(client, chat, max_tokens, options)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            problem = self._refusal(error)
        except openai.APIStatusError as error:
            kind = Refused if error.status_code == 413 else EndpointDown
            name = "" if kind is Refused else f"{self.name}: "
            problem = kind(f"{name}{_reason(error)}")
        except openai.OpenAIError as error:  # no connection, or a time-out
            cause = f" ({_shown(error.__cause__)})" if error.__cause__ else ""
            problem = EndpointDown(f"{self.name}: {_shown(error)}{cause}")
        raise problem  # out here, without the error that holds what the endpoint sent

    def _send(self, client: Any, chat: bool, max_tokens: int, options: dict) -> Any:
        """Send a request with its token limit under the name that the endpoint supports."""
        if not chat:  # /completions has only one name for it
            create = client.completions.with_raw_response.create
            return create(max_tokens=max_tokens, **options)
        create = client.chat.completions.with_raw_response.create
        name = self._limit
        try:
            return create(**{name: max_tokens}, **options)
        except self._openai.BadRequestError as error:
            newer = "max_completion_tokens"
            body = error.response.text[:2000]
            named = "max_tokens" in body or newer in body
            if not (self._find_limit and named) or name == newer:
                raise
            response = create(**{newer: max_tokens}, **options)
            self._limit = newer  # it worked: use it from now on
            return response

    def _refusal(self, error: Any) -> ValueError:
        """Turn a response with status 400 or 422 into an exception."""
        reason, body = _reason(error), error.response.text[:2000]
        for parameter, (option, cure) in self._cures.items():
            # In quotes, and not as a key of our own request echoed by the server.
            named = re.search(rf"['\"`]{parameter}\\?['\"`](?!\s*:)", body)
            if named and _UNSUPPORTED.search(body):
                problem = f"the endpoint does not support this {parameter}: {reason}"
                return ValueError(f"{option}: {problem} (set it to {cure})")
        return Refused(reason)


def _without_secrets(answer: Answer | Refused) -> Answer | Refused:
    if isinstance(answer, Refused):
        return type(answer)(_shown(answer), answer.usage)
    if repeats_secret(answer.text):
        # Not replaced in the text: nobody would notice that in the rows.
        return Refused("the answer repeats an API key", answer.usage)
    return answer


def _key(base_url: str | None, variable: str, where: str) -> str:
    """The key in an environment variable, "" if there is none and the server may need none."""
    key = os.environ.get(variable, "").strip()
    if not key and base_url is None:
        raise ValueError(f"{where}api_key_env: the environment variable {variable} is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:
        problem = f"{variable} does not fit into an HTTP header"
        expected = "expected printable ASCII without spaces"
        raise ValueError(f"{where}api_key_env: {problem} ({expected})")
    return key


def split_login(address: str, option: str) -> tuple[str, dict[str, str]]:
    """Split the user name and password off an address: into the header that sends them.

    Raises:
        ValueError: not the address of an endpoint; begins with the option's name.
    """
    from rrhf_fast.stages.transport import httpx

    try:
        url = httpx.URL(address)
        known = url.scheme in ("http", "https") and url.host.encode("idna")
    except (httpx.InvalidURL, UnicodeError):
        known = False
    host = url.raw_host if known else b""
    if (
        not re.fullmatch(rb"[\w.-]+|[\da-fA-F:.]+", host)
        or not (url.port is None or 1 <= url.port <= 65535)
        or url.query
        or url.fragment
    ):
        expected = "expected an address such as http://localhost:8000/v1, without ? and #"
        found = re.sub(r".*@|[?#].*", "", address, flags=re.DOTALL)  # may hold passwords
        raise ValueError(f"{option}: {expected}, found {found!r:.80}")
    if not url.userinfo:
        return str(url), {}
    token = b64encode(f"{url.username}:{url.password}".encode()).decode()
    keep_secret(url.password or url.username)
    keep_secret(token)
    return str(url.copy_with(userinfo=b"")), {"Authorization": f"Basic {token}"}


def _reason(error: Any) -> str:
    """What an error response says, for a message."""
    code, body = f"Error code: {error.status_code}", error.response.text
    if str(error).startswith(f"{code} - "):
        return _shown(error)
    return _shown(f"{code} - {body}") if body else code  # not in OpenAI's format


def _shown(text: object) -> str:
    """Words of an endpoint for a message: hidden keys first, then shortened."""
    return hide(one_line(text, None))[:300]


def ask_all(
    work: Mapping[str, Callable[[], Any]],
    journal: Journal,
    max_concurrency: int,
    title: str,
    unit: str = "response",
) -> None:
    """Run those functions of `work` whose keys the journal lacks in threads; journal each result.
    Ranks share them, and so the requests under way; the first one has all results at the end.

    After an exception no further function starts; those under way are finished and journalled, then
    the exception is raised.
    """

    def run(key: str) -> None:
        journal.write(key, work[key]())

    ranks, missing = journal.ranks, journal.mine(work)
    bar = {"total": len(missing), "unit": unit, "disable": ranks.bar}
    with (
        tqdm(**bar, desc=title) as progress,
        ThreadPoolExecutor(max(1, max_concurrency // ranks.size)) as pool,
    ):
        try:
            for future in as_completed([pool.submit(run, key) for key in missing]):
                future.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    journal.share()
