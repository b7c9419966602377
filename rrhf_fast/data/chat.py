"""Messages as the chat template renders them: where an answer begins, and what stands behind it.

A template may put more in front of an answer than its generation prompt holds (an empty think
block, a channel's header, a space), may trim an answer, and may change it. So nothing is guessed:
prompt and answer are rendered together, and the answer is looked up in the result.
"""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from rrhf_fast.data.rows import BadRow, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer that no template has a reason to change, to see what goes around one.
_PROBE = "rrhf-probe-answer"
_OTHER = "rrhf-other-text"
_OTHER_TEMPLATE = " (if the tokenizer has another one for tools, name it: "
_OTHER_TEMPLATE += "--chat_template_kwargs '{chat_template: tool_use}')"
_BY_HAND = "to train on it as it is, render the messages yourself and give the prompt as a string"
# Arguments of `apply_chat_template` that are decided here.
_OURS = (
    "conversation",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
)


@dataclass(frozen=True)
class Opening:
    """The text that a model answers, and the text that the template puts behind an answer."""

    text: str
    behind: str


@dataclass(frozen=True)
class Conversation:
    """A prompt with an answer: `text[:start]` is the prompt, and `text` ends with `behind`."""

    text: str
    start: int
    behind: str

    def without_last_space(self) -> "Conversation":
        """The same without white space at the end of `behind`."""
        behind = self.behind.rstrip()
        text = self.text[: len(self.text) - len(self.behind) + len(behind)]
        return Conversation(text, self.start, behind)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with arguments.

    Args:
        kwargs: for the template, and `chat_template` to choose another one, by its name among the
            tokenizer's or as its text. A row's own `chat_template_kwargs` come on top.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kwargs: dict[str, Any] = field(default_factory=dict)

    def open(self, row: Row) -> Opening:
        """What the row's messages render to. Where the last message is the assistant's, the answer
        continues it. Raises `BadRow` where the template rejects the messages or drops something."""
        if row.prompt[-1].get("tool_calls"):
            problem = "prompt: its last message calls tools, so a tool's result has to follow"
            raise BadRow("ends with a tool call", row.where, problem)
        answered = self._answered(row, _PROBE)
        if answered.count(_PROBE) != 1:
            raise _changed(row, f"renders {_PROBE!r} as {_tail(answered)}")
        self._check_dropped(row, answered)
        before, _, behind = answered.partition(_PROBE)
        if row.prompt[-1]["role"] == "assistant":
            earlier = [self._render(row, row.prompt[:-1], add_generation_prompt=b) for b in (0, 1)]
            if not before.startswith(tuple(earlier)):
                raise _changed(row, f"renders other messages behind it, {_tail(answered)}")
            return Opening(before, behind)
        text = self._render(row, row.prompt, add_generation_prompt=True)
        more = before.startswith(text) and before != text
        if more and text == self._render(row, row.prompt):
            # A template without a generation prompt: all that it puts in front of an answer, but
            # for spaces, which tokenizers join with the word behind them.
            text = before.rstrip(" ")
        return Opening(text, behind)

    def answer(self, row: Row, opening: Opening, answer: str, name: str) -> Conversation:
        """The row's messages with this answer, which `name` is called in errors. What the template
        puts in front of the answer belongs to the prompt, but for spaces.

        Raises:
            BadRow: the template changes more than white space at the answer's ends, or the model
                would be asked for it behind another text than it is rendered behind.
        """
        if not answer.strip():
            raise BadRow("empty response", row.where, f"{name}: nothing but the end token")
        text = self._answered(row, answer)
        ways = (answer, answer.rstrip(), answer.lstrip(), answer.strip())
        kept = next((way for way in ways if text.endswith(way + opening.behind)), None)
        if kept is None:
            raise _changed(row, f"renders {name} as {_tail(text)}")
        before = text[: len(text) - len(kept) - len(opening.behind)]
        # An answer may begin in the generation prompt: both hold the start of a thought.
        if not text.startswith(opening.text):
            problem = f"the chat template's generation prompt ends with {_tail(opening.text)}, but "
            problem += (
                f"it renders this answer behind {_tail(before)} ({self._remedy(row, answer)})"
            )
            raise BadRow("not behind the generation prompt", row.where, f"{name}: {problem}")
        start = max(len(opening.text), len(before.rstrip(" ")))
        if not text[start : len(text) - len(opening.behind)].strip():
            raise _changed(row, f"leaves nothing of {name} behind {_tail(opening.text)}")
        return Conversation(text, start, opening.behind)

    def _remedy(self, row: Row, answer: str) -> str:
        """Arguments under which generation prompt and conversation agree, if the usual ones do."""
        for name, value in product(("enable_thinking", "thinking"), (False, True)):
            other = replace(
                row, chat_template_kwargs=(row.chat_template_kwargs or {}) | {name: value}
            )
            try:
                opening = self._render(other, row.prompt, add_generation_prompt=True)
                agree = self._answered(other, answer).startswith(opening)
            except BadRow:  # a value that the template does not take
                continue
            if agree:
                return f"--chat_template_kwargs '{{{name}: {str(value).lower()}}}' makes them agree"
        return f"{_BY_HAND}; the model's own samples need no such agreement"

    def _answered(self, row: Row, answer: str) -> str:
        return self._render(row, with_answer(row.prompt, answer))

    def _render(self, row: Row, messages: list[dict], **options) -> str:
        try:
            refuse_reserved(row.chat_template_kwargs or {})
        except ValueError as error:
            raise BadRow("wrong chat_template_kwargs", row.where, str(error)) from error
        kwargs = self.kwargs | (row.chat_template_kwargs or {})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, **{"tools": row.tools} | kwargs | options
            )
        except Exception as error:  # templates raise what they like, say on two user turns
            what = "these messages" if messages is row.prompt else "an answer behind these messages"
            problem = f"prompt: the chat template rejects {what} ({error})"
            raise BadRow("rejected by the chat template", row.where, problem) from error

    def _check_dropped(self, row: Row, answered: str) -> None:
        """Refuse what a template takes and ignores."""

        def is_ignored(other: Row) -> bool:
            """Whether a row with something else there renders to the same."""
            try:
                return self._answered(other, _PROBE) == answered
            except BadRow:
                return False

        for i, message in enumerate(row.prompt):
            content, role = message.get("content"), message["role"]
            # What an assistant said earlier may lose its thoughts.
            is_there = isinstance(content, str) and content.strip() in answered
            looks_lost = content and role != "assistant" and not is_there
            if looks_lost and is_ignored(_replaced(row, i, content=_OTHER)):
                problem = (
                    f"prompt: the chat template drops the {role} message, prompt[{i}] (say it "
                )
                problem += "in a user's message)"
                raise BadRow(f"{role} message dropped", row.where, problem)
            if message.get("tool_calls") and is_ignored(_replaced(row, i, tool_calls=None)):
                problem = f"prompt: the chat template ignores the tool calls of prompt[{i}]"
                raise BadRow("tool calls ignored", row.where, problem + _OTHER_TEMPLATE)
        if row.tools and is_ignored(replace(row, tools=None)):
            problem = "tools: the chat template ignores them"
            raise BadRow("tools ignored", row.where, problem + _OTHER_TEMPLATE)


def _replaced(row: Row, i: int, **entries: Any) -> Row:
    """The row with other entries in message i; None takes one away."""
    message = {key: value for key, value in (row.prompt[i] | entries).items() if value is not None}
    return replace(row, prompt=[*row.prompt[:i], message, *row.prompt[i + 1 :]])


def with_answer(messages: list[dict], answer: str) -> list[dict]:
    """The messages, with an assistant's answer, or the last one continued by it if that is the
    assistant's."""
    *earlier, last = messages
    if last["role"] == "assistant":
        return [*earlier, last | {"content": (last.get("content") or "") + answer}]
    return [*messages, {"role": "assistant", "content": answer}]


def refuse_reserved(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of the chat template that the engine sets itself."""
    for name in kwargs:
        if name in _OURS:
            raise ValueError(f"chat_template_kwargs: {name} cannot be set, the engine does")


def _changed(row: Row, how: str) -> BadRow:
    problem = f"responses: the chat template changes the answer, {how} ({_BY_HAND})"
    return BadRow("changed by the chat template", row.where, problem)


def _tail(text: str) -> str:
    return repr(text if len(text) <= 40 else "..." + text[-37:])
