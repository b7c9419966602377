"""Chat messages as datasets store them -> messages as chat templates expect them."""

import json
import re

from rrhf_fast.data.checks import ANY_INTEGER, BadRow, Cell, check_json, check_text, from_json, show

# Role names in ShareGPT files.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# Parts of an answer that cannot be trained; they are refused rather than silently lost.
UNTRAINED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thought")
UNTRAINED += ("tool_plan", "refusal")
# Role names of other formats, which templates would write out as they are.
_OTHER_ROLES = ("human", "prompter", "gpt", "model", "bot", "chatbot", "ai")


def check_messages(messages: object, name: str, where: str) -> list[dict]:
    """Convert messages, in any of their stored forms, to messages with a role and content.

    {"from", "value"} becomes {"role", "content"}, content in text parts becomes one string, and
    keys that are None (Parquet fills them in) are dropped. Content may be missing if an assistant
    calls tools, and may be of any type in a tool's message.

    Raises:
        BadRow: names the bad message and what was expected.
    """
    if not isinstance(messages, list) or not messages:
        actual = "an empty list" if messages == [] else f"found {show(messages)}"
        raise BadRow("wrong type", where, f"{name}: {actual}, expected messages")
    return [check_message(message, f"{name}[{i}]", where) for i, message in enumerate(messages)]


def check_message(message: object, name: str, where: str) -> dict:
    """Convert one message as in `check_messages`."""
    if not isinstance(message, dict):
        raise _not_a_message(message, name, where)
    if "from" in message and "value" in message and message.get("role") is None:
        message = _from_sharegpt(message, name, where)
    message = {k: value for k, value in message.items() if value is not None or k == "content"}
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if calls == []:
        del message["tool_calls"]
    if isinstance(content, list) and (role != "tool" or _is_parts(content)):
        content = message["content"] = _joined(content, f"{name}.content", where)
    calls_tools = role == "assistant" and isinstance(calls, list) and calls
    needs_no_text = role == "tool" or (calls_tools and content is None)
    if not isinstance(role, str) or not (isinstance(content, str) or needs_no_text):
        raise _not_a_message(message, name, where)
    if role != role.lower() or role in _OTHER_ROLES:
        problem = f"{name}.role: expected user, assistant, system or tool, found {show(role)}"
        raise BadRow("wrong role", where, problem)
    for key, value in message.items():
        check_json(key, name, where)
        check_json(value, f"{name}.{key}", where)
    return message


def plain_content(message: dict) -> str:
    """Return a message's content as text: a tool's result as JSON, missing content as ""."""
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content) if content else ""


def transcript(prompt: str | list[dict]) -> str:
    """Return a prompt as a text for readers and judges: messages after their roles, with the tools
    that they call; a lone message of the user as it is."""
    if isinstance(prompt, str):
        return prompt
    if [message["role"] for message in prompt] == ["user"]:
        return plain_content(prompt[0])
    parts = []
    for message in prompt:
        calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
        text = "\n".join(filter(None, [plain_content(message), calls]))
        parts.append(f"{message['role']}: {text}")
    return "\n\n".join(parts)


def answer_text(answer: object, name: str, where: str) -> object:
    """Return a text answer unchanged, or the content of an assistant message, alone or in a list.
    Raises BadRow if the message holds more than content."""
    if isinstance(answer, list):
        if len(answer) != 1 or not isinstance(answer[0], dict):
            problem = f"{name}: expected a string or one message, found {show(answer)}"
            raise BadRow("wrong type", where, problem)
        answer = answer[0]
    if not isinstance(answer, dict):
        return answer
    message = check_message(answer, name, where)
    if message["role"] != "assistant":
        raise BadRow("wrong type", where, f"{name}: the last message must be the assistant's")
    for key in UNTRAINED:
        if message.get(key):
            problem = f"{name}: holds {key}, but only the content of an answer is trained"
            raise BadRow("untrained content", where, problem)
    return message["content"]


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """Convert a string prompt to a user message; return messages unchanged."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def with_system(prompt: str | list[dict], system: object, where: str) -> str | list[dict]:
    """Put a system message in front of the prompt, unless `system` is None or blank."""
    if system is None or system == []:
        return prompt
    system = check_text(system, "system", where)
    if not system.strip():
        return prompt
    messages = as_messages(prompt)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        problem = "system: differs from the system message at the start of the prompt"
        raise BadRow("two system messages", where, problem)
    return messages


def check_tools(tools: object, where: str) -> list[dict] | None:
    """Return tools, given as a list or its JSON, as a list of objects; None if there are none."""
    if isinstance(tools, str):
        tools = from_json(tools, "tools", where)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong type", where, f"tools: expected a list of objects, found {show(tools)}")
    check_json(tools, "tools", where)
    return tools


def check_kwargs(kwargs: object, where: str) -> dict | None:
    """Return arguments of the chat template as a dict, from a dict or its JSON; None if there are
    none."""
    name = "chat_template_kwargs"
    if isinstance(kwargs, str):
        kwargs = from_json(kwargs, name, where)
    if kwargs is None or kwargs == {}:
        return None
    if not isinstance(kwargs, dict):
        raise BadRow("wrong type", where, f"{name}: expected an object, found {show(kwargs)}")
    check_json(kwargs, name, where)
    return kwargs


_OBJECTS = re.compile(r'\s*(\[\s*)?\{\s*"')


def from_cell(value: object) -> object:
    """Parse messages written as JSON in a CSV cell or in any other text; return other values
    unchanged."""
    if not isinstance(value, str) or not _OBJECTS.match(value):
        return value
    try:
        parsed = ANY_INTEGER.decode(value)
    except (ValueError, RecursionError):
        return value
    items = parsed if isinstance(parsed, list) else [parsed]
    if isinstance(value, Cell) and isinstance(parsed, list):  # messages, though perhaps wrong ones
        return parsed if all(map(_is_like_message, items)) else value
    return parsed if all(map(_is_message, items)) else value


def _is_message(item: object) -> bool:
    keys = item.keys() if isinstance(item, dict) else ()
    return {"role", "content"} <= set(keys) or {"from", "value"} <= set(keys)


def _is_like_message(item: object) -> bool:
    """Whether this is a message, or one that lacks something."""
    return isinstance(item, dict) and ("role" in item or "from" in item or set(item) == {"content"})


def _from_sharegpt(message: dict, name: str, where: str) -> dict:
    sender = message["from"]
    role = ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        problem = f"{name}.from: expected human, gpt, system or tool, found {show(sender)}"
        raise BadRow("wrong type", where, problem)
    others = {
        key: item
        for key, item in message.items()
        if key not in ("from", "value", "role") and item is not None
    }
    return {"role": role, "content": message["value"]} | others


def _is_parts(content: list) -> bool:
    return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def _joined(parts: list, name: str, where: str) -> str:
    """Join text parts into one string. Raises BadRow for a part of another type."""
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            expected = 'expected {"type": "text", "text": str}'
            raise BadRow("wrong type", where, f"{name}[{i}]: {expected}, found {show(part)}")
        if kind != "text":
            problem = f"{name}[{i}]: parts of type {show(kind)[4:]} are not supported, only text"
            raise BadRow("unsupported content", where, problem)
        texts.append(check_text(part.get("text"), f"{name}[{i}].text", where))
    return "".join(texts)


def _not_a_message(message: object, name: str, where: str) -> BadRow:
    expected = 'expected {"role": str, "content": str}'
    return BadRow("wrong type", where, f"{name}: {expected}, found {show(message)}")
