"""Answers of OpenAI-compatible endpoints: the text, or the reason why there is none.

An answer may lack parts that the protocol promises: its text (refused, filtered, replaced by a tool
call, cut off while the model was thinking), its message or all choices. So it is read as plain JSON
and every field is checked.
"""

import json
from dataclasses import dataclass
from typing import Any

from rrhf_fast.data.checks import one_line

# Endings, other than a token limit, of an answer that is not whole.
_BROKEN_OFF = {
    "content_filter": "a content filter ended the answer",
    "abort": "the server aborted the answer",
    "error": "the server failed during the answer",
}


class Refused(ValueError):
    """The endpoint gives no text for this request, and a retry would not help: it is too long or
    filtered, for example. Its message holds words of the endpoint in full. usage: what the request
    cost, as in `Answer`."""

    def __init__(self, reason: str, usage: dict[str, int] | None = None):
        super().__init__(reason)
        self.usage = usage or {}


class EndedThinking(Refused):
    """The token limit was reached before the answer began."""


class NoCompletion(Refused):
    """JSON that is not a completion; here a retry may help."""


@dataclass(frozen=True)
class Answer:
    """A text and what it cost."""

    text: str
    finish_reason: str | None
    usage: dict[str, int]  # prompt_tokens, completion_tokens, requests
    token_ids: list[int] | None = None  # of the text and its end, from servers that give them


def read_answers(body: bytes, chat: bool, requests: int) -> list[Answer | Refused]:
    """Read every choice in the body of a response with status 200: its answer, or the reason why
    it has no complete text. The first one holds the usage of all.

    Args:
        chat: the response is from /chat/completions, else from /completions.
        requests: requests sent to get it.

    Raises:
        NoCompletion: JSON that is not a completion.
        ValueError: not JSON.
    """
    try:
        record = json.loads(body, parse_int=_integer, parse_constant=lambda _: None)
        choices = _choices(record)
        usage = _usage(record) | {"requests": requests}
        answers = []
        for choice in choices:
            try:
                answers.append(_answer(choice, record, chat, {} if answers else usage))
            except Refused as refusal:
                answers.append(refusal)
    except RecursionError:
        raise NoCompletion("an answer nested too deeply") from None
    if all(isinstance(answer, NoCompletion) for answer in answers):
        raise answers[0]
    return answers


def _integer(digits: str) -> int | None:
    """A count; None for a number of so many digits that int() may refuse it."""
    return int(digits) if len(digits) < 20 else None


def _answer(choice: Any, record: dict, chat: bool, usage: dict[str, int]) -> Answer:
    """The answer of one choice of a completion."""
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message") if chat else choice
    if not isinstance(message, dict):
        raise NoCompletion("an answer without a message", usage)
    text = _text(message.get("content" if chat else "text"))
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else None
    if refusal := _refusal(message):
        raise Refused(f"the model refused: {one_line(refusal, None)}", usage)
    if reason in _BROKEN_OFF:
        raise Refused(f"{_BROKEN_OFF[reason]} (finish_reason {reason})", usage)
    if not text and (message.get("tool_calls") or message.get("function_call")):
        raise Refused("answered with a tool call", usage)
    if not text and _thought(message, record):
        if reason == "length":
            raise EndedThinking("ended while thinking", usage)
        raise Refused("thought, but gave no answer", usage)
    if text is None:
        raise Refused(f"an answer without text (finish_reason {reason})", usage)
    if text != _encodable(text):
        raise Refused("an answer that is not valid Unicode", usage)
    return Answer(text, reason, usage, _token_ids(choice.get("token_ids")))


def _token_ids(value: Any) -> list[int] | None:
    is_list = isinstance(value, list) and all(type(i) is int and 0 <= i < 2**31 for i in value)
    return value if is_list else None


def _choices(record: Any) -> list:
    if not isinstance(record, dict):
        raise NoCompletion("an answer that is not a JSON object")
    if error := record.get("error"):
        message = error.get("message") if isinstance(error, dict) else error
        raise NoCompletion(f"an error instead of an answer: {one_line(message or error, None)}")
    choices = record.get("choices")
    if not isinstance(choices, list) or not any(isinstance(choice, dict) for choice in choices):
        raise NoCompletion("an answer without choices")
    return choices


def _text(content: Any) -> str | None:
    """The text of a message's content, which may be a list of parts; None if there is none."""
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else _field(part, "text") for part in content]
        texts = [text for text in texts if isinstance(text, str)]
        return "".join(texts) if texts else None
    return content if isinstance(content, str) else None


def _field(part: Any, kind: str) -> Any:
    """The value of a content part, if it is of this kind."""
    own_kind = isinstance(part, dict) and part.get("type", kind) in (kind, f"output_{kind}")
    return part.get(kind) if own_kind else None


def _refusal(message: dict) -> str | None:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    refusals = [message.get("refusal"), *(_field(part, "refusal") for part in parts)]
    return next((text for text in refusals if isinstance(text, str) and text), None)


def _thought(message: dict, record: dict) -> bool:
    """Whether the model reasoned. Some endpoints show it only in their token counts."""
    content, usage = message.get("content"), record.get("usage")
    parts = content if isinstance(content, list) else []
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    return bool(
        any(message.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details"))
        or any(_field(part, kind) for part in parts for kind in ("thinking", "reasoning"))
        or (isinstance(details, dict) and details.get("reasoning_tokens"))
    )


def _usage(record: dict) -> dict[str, int]:
    usage, counts = record.get("usage"), {}
    for name in ("prompt_tokens", "completion_tokens"):
        count = usage.get(name) if isinstance(usage, dict) else None
        counts[name] = count if type(count) is int and 0 <= count < 2**53 else 0
    return counts


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
