"""The answer of an OpenAI-compatible endpoint: its text, or the reason why there is none.

An answer may lack what the protocol promises: its text (refused, filtered, a tool called instead,
the token limit reached while the model thought), its message, all choices. So answers are read as
plain JSON, and nothing but text is taken for text.
"""

import json
from dataclasses import dataclass
from typing import Any

from rrhf_fast.data.checks import one_line

# Endings, other than a token limit, of an answer that is not whole.
_BROKEN_OFF = {
    "content_filter": "a content filter ended the answer",
    "abort": "the server gave the answer up",
    "error": "the server failed during the answer",
}


class Refused(ValueError):
    """The endpoint has no text for this request, and would have none again: it is too long, say, or
    filtered. usage: what it took to learn this, as in `Answer`."""

    def __init__(self, reason: str, usage: dict[str, int] | None = None):
        super().__init__(reason)
        self.usage = usage or {}


class EndedThinking(Refused):
    """The token limit was reached before the answer began."""


class NoCompletion(ValueError):
    """JSON of another shape than a completion's, which another try may mend."""


@dataclass(frozen=True)
class Answer:
    """A text, and what it took to get it."""

    text: str
    finish_reason: str | None
    usage: dict[str, int]  # prompt_tokens, completion_tokens, requests


def read_answer(body: bytes, chat: bool, requests: int) -> Answer:
    """The answer in the body of a response of status 200, which it took `requests` to get.

    Args:
        chat: whether it is one of /chat/completions, else of /completions.

    Raises:
        Refused: a completion without a whole text.
        NoCompletion: JSON that is no completion.
        ValueError, RecursionError: not JSON.
    """
    record = json.loads(body)
    choice = _first_choice(record)
    message = choice.get("message") if chat else choice
    if not isinstance(message, dict):
        raise NoCompletion("an answer without a message")
    usage = _usage(record) | {"requests": requests}
    text = _text(message.get("content" if chat else "text"))
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else None
    if refusal := _refusal(message):
        raise Refused(f"the model refused: {one_line(refusal)}", usage)
    if reason in _BROKEN_OFF:
        raise Refused(f"{_BROKEN_OFF[reason]} (finish_reason {reason})", usage)
    if not text and (message.get("tool_calls") or message.get("function_call")):
        raise Refused("answered by a tool call", usage)
    if not text and _thought(message, record):
        if reason == "length":
            raise EndedThinking("ended while thinking", usage)
        raise Refused("thought, but gave no answer", usage)
    if text is None:
        raise Refused(f"an answer without text (finish_reason {reason})", usage)
    if text != _encodable(text):
        raise Refused("an answer that is no Unicode text", usage)
    return Answer(text, reason, usage)


def _first_choice(record: Any) -> dict:
    if not isinstance(record, dict):
        raise NoCompletion("an answer that is no JSON object")
    if error := record.get("error"):
        message = error.get("message") if isinstance(error, dict) else error
        raise NoCompletion(f"an error for an answer: {one_line(message or error)}")
    choices = record.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NoCompletion("an answer without choices")
    return choices[0]


def _text(content: Any) -> str | None:
    """The text of a content, which may be a list of parts; None where it holds none."""
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else _field(part, "text") for part in content]
        texts = [text for text in texts if isinstance(text, str)]
        return "".join(texts) if texts else None
    return content if isinstance(content, str) else None


def _field(part: Any, kind: str) -> Any:
    """What a part of a content holds, if it is of this kind."""
    own_kind = isinstance(part, dict) and part.get("type", kind) in (kind, f"output_{kind}")
    return part.get(kind) if own_kind else None


def _refusal(message: dict) -> str | None:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    found = [message.get("refusal"), *(_field(part, "refusal") for part in parts)]
    return next((refusal for refusal in found if isinstance(refusal, str) and refusal), None)


def _thought(message: dict, record: dict) -> bool:
    """Whether the model reasoned. Some endpoints tell it by the tokens that they count alone."""
    content, usage = message.get("content"), record.get("usage")
    parts = content if isinstance(content, list) else []
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    return bool(
        any(message.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details"))
        or any(_field(part, kind) for part in parts for kind in ("thinking", "reasoning"))
        or (isinstance(details, dict) and details.get("reasoning_tokens"))
    )


def _usage(record: dict) -> dict[str, int]:
    found = record.get("usage")
    counts = {}
    for name in ("prompt_tokens", "completion_tokens"):
        count = found.get(name) if isinstance(found, dict) else None
        counts[name] = count if type(count) is int and 0 <= count < 2**53 else 0
    return counts


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
