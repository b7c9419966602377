"""Layouts of pairs: a chosen and a rejected answer, as texts, transcripts or messages."""

import re

from rrhf_fast.data.canonical import Canonical, fields_hint, number, prompt_of
from rrhf_fast.data.checks import BadRow, Cell, check_list, check_text, show
from rrhf_fast.data.messages import as_messages, check_messages, from_cell

SIDES = ("chosen", "rejected")
# Fields of a pair's scores: score_chosen, chosen_score, chosen-rating, ...
PAIR_SCORES = tuple(
    tuple(form.format(name=name, side=side) for side in SIDES)
    for name in ("score", "rating", "reward")
    for form in ("{name}_{side}", "{side}_{name}", "{side}-{name}")
)
# Fields in which an unknown layout may keep the prompt, for the error about a missing one.
QUESTIONS = ("messages", "conversation", "conversations", "dialog", "dialogue", "history")
QUESTIONS += ("context", "instruction", "question", "query", "input", "input_text", "text", "post")
QUESTIONS += ("article",)
ANSWERING = ("assistant", "gpt")  # roles
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def pair(record: dict, where: str) -> Canonical:
    """Convert a pair whose prompt, if it has one, is in a separate field. Raises BadRow."""
    prompt, name = prompt_of(record, ("prompt", "query", "question", "input"))
    return _pair_with(record, where, prompt, name, {"prompt", name})


def sharegpt(record: dict, where: str) -> Canonical:
    """Convert a pair with its prompt in `conversations`. Raises BadRow."""
    name = "conversations"
    prompt = check_messages(from_cell(record[name]), name, where)
    return _pair_with(record, where, prompt, name, {name})


def alpaca(record: dict, where: str) -> Canonical:
    """Convert `instruction`, `input` and `history` with a pair, or with `output`: one response or
    [better, worse]. Raises BadRow."""
    prompt, _ = prompt_of(record, ("instruction",))
    has_input = record.get("input") not in (None, "")
    if has_input or not isinstance(prompt, list):  # messages have no further input
        prompt = check_text(prompt, "instruction", where)
    if has_input:
        prompt += "\n" + check_text(record["input"], "input", where)
    used = {"instruction", "input"}
    if record.get("history"):
        used.add("history")
        prompt = [*_turns(record["history"], where), *as_messages(prompt)]
    output = record.get("output")
    has_pair = None not in [record.get(side) for side in SIDES]
    if has_pair or (output is None and set(SIDES) <= set(record)):
        return _pair_with(record, where, prompt, "instruction", used)
    canon = Canonical(prompt, "instruction", used=used | {"output"})
    if isinstance(output, Cell) and output.startswith("["):
        output = check_list(output, "output", where)
    if isinstance(output, list):
        if len(output) != 2:
            problem = f"output: expected [better, worse], found {len(output)} responses"
            raise BadRow("wrong type", where, problem)
        canon.responses, canon.scores = output, [1.0, 0.0]
        canon.names = ["output[0]", "output[1]"]
    elif output is not None:
        canon.responses, canon.names = [output], ["output"]
    return canon


def _turns(history: object, where: str) -> list[dict]:
    """Convert [[question, answer], ...] to messages."""
    messages = []
    for i, turn in enumerate(check_list(history, "history", where)):
        name = f"history[{i}]"
        if len(texts := check_list(turn, name, where)) != 2:
            problem = f"{name}: expected [question, answer], found {show(turn)}"
            raise BadRow("wrong type", where, problem)
        for role, text in zip(("user", "assistant"), texts, strict=True):
            messages.append({"role": role, "content": check_text(text, name, where)})
    return messages


def _pair_with(record: dict, where: str, prompt: object, name: str, used: set[str]) -> Canonical:
    """Convert `chosen` and `rejected`, which may repeat the prompt. `name` is the field of the
    prompt; without a prompt, the turns that both sides begin with are the prompt."""
    answers = [from_cell(record[side]) for side in SIDES]
    answers = [[answer] if isinstance(answer, dict) else answer for answer in answers]
    if all(isinstance(answer, str) for answer in answers):
        texts = list(map(check_text, answers, SIDES, [where] * 2))
        is_transcript = all(text.lstrip().startswith(HUMAN.strip()) for text in texts)
        if isinstance(prompt, str) and is_transcript:
            used = used - {name, "prompt"}  # the transcripts hold the prompt
            prompt = None
        prompt, answers = _split_texts(texts, prompt, record, where)
    histories = []  # of messages, unless the prompt is messages itself
    for i, side in enumerate(SIDES):
        if not isinstance(answers[i], list):
            continue
        *history, answers[i] = check_messages(answers[i], side, where)
        if answers[i]["role"] != "assistant":
            raise BadRow("wrong type", where, f"{side}: the last message must be the assistant's")
        if history and isinstance(prompt, list):
            if history != check_messages(prompt, name, where):
                problem = f"{side}: its first messages differ from the prompt"
                raise BadRow("unequal prompts", where, problem)
        elif history:
            history, holds_prompt = _with_prompt(history, prompt)
            used = used if holds_prompt else used - {name, "prompt"}
            histories.append(history)
    if histories:
        if histories[0] != histories[-1]:
            problem = "rejected: its first messages differ from those of chosen"
            raise BadRow("unequal prompts", where, problem)
        prompt, name = histories[0], "chosen"
    scores, score_names = _pair_scores(record)
    used = used | {*SIDES, *(score_names or ())}
    return Canonical(prompt, name, answers, scores, list(SIDES), used, list(SIDES), score_names)


def _pair_scores(record: dict) -> tuple[list, list[str] | None]:
    """Return the scores of a pair and their fields; 1 and 0, and None, if it has no scores."""
    for fields in PAIR_SCORES:
        values = [record.get(field) for field in fields]
        if all(field in record for field in fields) and any(v not in (None, "") for v in values):
            return list(map(number, values)), list(fields)
    return [1.0, 0.0], None


def _with_prompt(history: list[dict], prompt: object) -> tuple[list[dict], bool]:
    """Put a string prompt in front of messages that lack the user's first one. Returns the
    messages, and whether they now hold the prompt."""
    if not isinstance(prompt, str):
        return history, True
    system = [message for message in history if message["role"] == "system"]
    rest = history[len(system) :]
    if not rest or rest[0]["role"] == "assistant":
        return [*system, *as_messages(prompt), *rest], True
    asked = [str(message["content"]) for message in rest if message["role"] == "user"]
    return history, any(prompt.strip() in text for text in asked)


def _split_texts(
    texts: list[str], prompt: object, record: dict, where: str
) -> tuple[object, list[str]]:
    """Separate the two answers from the prompt, which is taken from the transcripts if it is None,
    and removed from texts that repeat it. Returns prompt and answers."""
    answers = texts
    if prompt is None:
        prompt, *answers = _split_transcripts(*texts)
        if prompt is None:
            raise _no_prompt(record, where)
    elif isinstance(prompt, str) and prompt and all(_repeats(text, prompt) for text in texts):
        answers = [text.removeprefix(prompt) for text in texts]
    if isinstance(prompt, str) and re.search(f"^{ASSISTANT.strip()}", prompt, re.MULTILINE):
        _check_turns(answers, where)
    return prompt, answers


def _split_transcripts(chosen: str, rejected: str) -> tuple[str | None, str, str]:
    """Split two transcripts into (prompt, answer, answer) after the last "Assistant:" of their
    common beginning that follows an empty line or, if there is none, that begins a line; the prompt
    is None if there is no such line."""
    shared = chosen[: _shared_length(chosen, rejected)]
    marks = [mark.end() for mark in re.finditer(ASSISTANT, shared)]
    if not marks:
        marks = [mark.end() for mark in re.finditer(f"^{ASSISTANT.strip()}", shared, re.MULTILINE)]
    at = marks[-1] if marks else 0
    return chosen[:at] or None, chosen[at:], rejected[at:]


def as_turns(canon: Canonical) -> None:
    """Make messages of a pair's transcript, and take the space that follows its "Assistant:" from
    the answers; other records stay as they are."""
    if not isinstance(canon.prompt, str) or not canon.prompt.startswith(HUMAN):
        return
    _, *parts = re.split(f"({HUMAN}|{ASSISTANT})", canon.prompt)
    roles = ["user" if mark == HUMAN else "assistant" for mark in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    if texts.pop() or roles.pop() != "assistant" or not all(texts):
        return
    canon.prompt = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    if isinstance(canon.responses, list):
        canon.responses = [a.strip() if isinstance(a, str) else a for a in canon.responses]


def _repeats(answer: str, prompt: str) -> bool:
    """Return whether an answer begins with the prompt and continues. A prompt of a single word does
    not count, because an answer may begin with it by chance, as to "Hi"."""
    is_word = prompt.isascii() and prompt.strip().isalnum()
    return answer.startswith(prompt) and not is_word and bool(answer[len(prompt) :].strip())


def _check_turns(answers: list[str], where: str) -> None:
    """Refuse answers that contain later turns of the human, which the model would learn."""
    for side, answer in zip(SIDES, answers, strict=True):
        if re.search(f"^{HUMAN.strip()}", answer, re.MULTILINE):
            problem = f"{side}: expected an answer, found further turns after it"
            problem += f" ({HUMAN.strip()!r}); the transcripts differ before the last turn"
            raise BadRow("further turns", where, problem)


def _no_prompt(record: dict, where: str) -> BadRow:
    problem = f"prompt: missing, and the texts have no {ASSISTANT.strip()!r} in common to end it"
    other = next((name for name in QUESTIONS if record.get(name)), None)
    if other is not None:
        turns = from_cell(record[other])
        last = turns[-1] if isinstance(turns, list) else None
        is_answered = isinstance(last, dict) and last.get("role", last.get("from")) in ANSWERING
        path = f"{other}[:-1]" if is_answered else other
        problem = f"prompt: missing, and {path} may be it (--columns '{{prompt: {path}}}')"
    return BadRow("missing field", where, problem + fields_hint(record))


def _shared_length(a: str, b: str) -> int:
    """Return the length of the common beginning of two texts, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
