"""Messages as the chat template renders them: where an answer begins, and what follows it.

A template may put more in front of an answer than its generation prompt (an empty think block, a
channel's header, a space), may trim an answer, and may change it. So nothing is guessed: prompt and
answer are rendered together, and the answer is located in the result.
"""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from rrhf_fast.data.checks import one_line
from rrhf_fast.data.rows import BadRow, Row
from rrhf_fast.stages.bounded import Limits, TooMuch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer that no template should change, to find what is rendered around one.
_PROBE = "rrhf-probe-answer"
_OTHER = "rrhf-other-text"
_OTHER_TEMPLATE = " (if the tokenizer has another one for tools, name it: "
_OTHER_TEMPLATE += "--chat_template_kwargs '{chat_template: tool_use}')"
_BY_HAND = "to train on it unchanged, render the messages yourself and give the prompt as a string"
# A conversation of a million tokens takes a second and some megabytes. A block of `RENDERING.many`
# around many renders sets the timer once for all of them.
RENDERING = Limits(seconds=5, size=2**31)
# Arguments of `apply_chat_template` that the engine sets.
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
    """The text that a model answers."""

    text: str
    suffix: str  # the text that the template renders after an answer


@dataclass(frozen=True)
class Conversation:
    """A prompt with an answer: `text[:start]` is the prompt."""

    text: str
    start: int
    suffix: str  # the end of `text`, rendered after the answer

    def without_last_space(self) -> "Conversation":
        """Return the conversation without white space at its end."""
        suffix = self.suffix.rstrip()
        text = self.text[: len(self.text) - len(self.suffix) + len(suffix)]
        return Conversation(text, self.start, suffix)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with arguments.

    Args:
        kwargs: arguments of the template, and `chat_template` to choose another one, by its name
            among the tokenizer's or by its text. A row's `chat_template_kwargs` override them.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kwargs: dict[str, Any] = field(default_factory=dict)

    def open(self, row: Row) -> Opening:
        """Render the row's messages up to an answer, which continues the last message if it is the
        assistant's. Raises `BadRow` if the template rejects the messages or drops a part."""
        if row.prompt[-1].get("tool_calls"):
            problem = "prompt: its last message calls tools, so a tool's result must follow"
            raise BadRow("ends with a tool call", row.where, problem)
        answered = self._answered(row, _PROBE)
        if answered.count(_PROBE) != 1:
            raise _changed(row, f"renders {_PROBE!r} as {_tail(answered)}")
        self._check_dropped(row, answered)
        before, _, suffix = answered.partition(_PROBE)
        if row.prompt[-1]["role"] == "assistant":
            earlier = [self._render(row, row.prompt[:-1], add_generation_prompt=b) for b in (0, 1)]
            if not before.startswith(tuple(earlier)):
                raise _changed(row, f"renders other messages after it, {_tail(answered)}")
            return Opening(before, suffix)
        text = self._render(row, row.prompt, add_generation_prompt=True)
        is_longer = before.startswith(text) and before != text
        if is_longer and text == self._render(row, row.prompt):
            # A template without a generation prompt: take all that it puts in front of an answer,
            # except spaces, which tokenizers join with the next word.
            text = before.rstrip(" ")
        return Opening(text, suffix)

    def answer(self, row: Row, opening: Opening, answer: str, name: str) -> Conversation:
        """Render the row's messages with this answer, called `name` in errors. Text that the
        template puts in front of the answer, except spaces, belongs to the prompt.

        Raises:
            BadRow: the template changes more than white space at the answer's ends, or renders it
                after a text other than the generation prompt.
        """
        if not answer.strip():
            raise BadRow("empty response", row.where, f"{name}: nothing but the end token")
        text = self._answered(row, answer)
        forms = (answer, answer.rstrip(), answer.lstrip(), answer.strip())
        kept = next((form for form in forms if text.endswith(form + opening.suffix)), None)
        if kept is None:
            raise _changed(row, f"renders {name} as {_tail(text)}")
        before = text[: len(text) - len(kept) - len(opening.suffix)]
        # An answer may begin within the generation prompt: both may contain the start of a thought.
        if not text.startswith(opening.text):
            problem = f"the chat template's generation prompt ends with {_tail(opening.text)}, but "
            problem += f"it renders this answer after {_tail(before)} ({self._remedy(row, answer)})"
            raise BadRow("not after the generation prompt", row.where, f"{name}: {problem}")
        start = max(len(opening.text), len(before.rstrip(" ")))
        if not text[start : len(text) - len(opening.suffix)].strip():
            raise _changed(row, f"leaves nothing of {name} after {_tail(opening.text)}")
        return Conversation(text, start, opening.suffix)

    def _remedy(self, row: Row, answer: str) -> str:
        """Suggest arguments with which generation prompt and conversation agree."""
        for name, value in product(("enable_thinking", "thinking"), (False, True)):
            other = replace(
                row, chat_template_kwargs=(row.chat_template_kwargs or {}) | {name: value}
            )
            try:
                opening = self._render(other, row.prompt, add_generation_prompt=True)
                agree = self._answered(other, answer).startswith(opening)
            except BadRow:  # the template refuses this value
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
            return render(self.tokenizer, messages, **{"tools": row.tools} | kwargs | options)
        except TooMuch as error:  # would be so for every row
            problem = f"the chat template of {self.tokenizer.name_or_path} {error}"
            raise ValueError(f"{row.where}: prompt: {problem}") from error
        except Exception as error:  # templates raise any type, for example on two user turns
            what = "these messages" if messages is row.prompt else "an answer after these messages"
            problem = f"prompt: the chat template rejects {what} ({one_line(error)})"
            raise BadRow("rejected by the chat template", row.where, problem) from error

    def _check_dropped(self, row: Row, answered: str) -> None:
        """Refuse messages, tool calls and tools that the template ignores."""

        def is_ignored(other: Row) -> bool:
            """Return whether a row with another value there renders to the same text."""
            try:
                return self._answered(other, _PROBE) == answered
            except BadRow:
                return False

        for i, message in enumerate(row.prompt):
            content, role = message.get("content"), message["role"]
            # Earlier assistant messages may lose their thoughts.
            is_shown = isinstance(content, str) and content.strip() in answered
            looks_lost = content and role != "assistant" and not is_shown
            if looks_lost and is_ignored(_replaced(row, i, content=_OTHER)):
                problem = f"prompt: the chat template drops the {role} message, prompt[{i}]"
                problem += " (put its content into a user message)"
                raise BadRow(f"{role} message dropped", row.where, problem)
            if message.get("tool_calls") and is_ignored(_replaced(row, i, tool_calls=None)):
                problem = f"prompt: the chat template ignores the tool calls of prompt[{i}]"
                raise BadRow("tool calls ignored", row.where, problem + _OTHER_TEMPLATE)
        if row.tools and is_ignored(replace(row, tools=None)):
            problem = "tools: the chat template ignores them"
            raise BadRow("tools ignored", row.where, problem + _OTHER_TEMPLATE)


def render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], **options: Any) -> str:
    """Render messages by the tokenizer's chat template. It comes with the model, and runs in
    transformers' sandbox, which keeps it from files and modules, but not from running for ever.

    Raises:
        TooMuch: it takes more time or memory than any conversation needs.
        Exception: of any type; the template rejects the messages.
    """
    with RENDERING:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _replaced(row: Row, i: int, **entries: Any) -> Row:
    """Return the row with other entries in message i; None removes an entry."""
    message = {key: value for key, value in (row.prompt[i] | entries).items() if value is not None}
    return replace(row, prompt=[*row.prompt[:i], message, *row.prompt[i + 1 :]])


def with_answer(messages: list[dict], answer: str) -> list[dict]:
    """Return the messages with an answer: as a new assistant message, or as the continuation of the
    last one if that is the assistant's."""
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
    problem = f"responses: the chat template changes the answer and {how} ({_BY_HAND})"
    return BadRow("changed by the chat template", row.where, problem)


def _tail(text: str) -> str:
    return repr(text if len(text) <= 40 else "..." + text[-37:])
