"""Pairs of a chosen and a rejected answer, as texts, transcripts or messages."""

import re

from rrhf_fast.data.canonical import Canonical, number, prompt_of, what_serves
from rrhf_fast.data.checks import BadRow, check_text
from rrhf_fast.data.messages import check_messages, from_cell

# A pair's scores: score_chosen, chosen_score, chosen-rating, ...
PAIR_SCORES = tuple(
    tuple(form.format(name=name, side=side) for side in ("chosen", "rejected"))
    for name in ("score", "rating", "reward")
    for form in ("{name}_{side}", "{side}_{name}", "{side}-{name}")
)
# Where an unknown layout may keep a question, for the error about a missing prompt.
QUESTIONS = ("messages", "conversation", "conversations", "dialog", "dialogue", "history")
QUESTIONS += ("context", "instruction", "question", "query", "input", "input_text", "text", "post")
QUESTIONS += ("article",)
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def pair(record: dict, where: str) -> Canonical:
    """Convert a pair whose prompt, if it has one, is in a field of its own. Raises BadRow."""
    prompt, name = prompt_of(record, ("prompt", "query", "question", "input"))
    return pair_behind(record, where, prompt, name, {"prompt", name})


def pair_behind(record: dict, where: str, prompt: object, name: str, used: set[str]) -> Canonical:
    """Convert `chosen` and `rejected`, each a text, a message, or messages that may begin with the
    prompt. Without a prompt, transcripts' common turns are the prompt."""
    sides = ("chosen", "rejected")
    answers = [from_cell(record[side]) for side in sides]
    answers = [[answer] if isinstance(answer, dict) else answer for answer in answers]
    if all(isinstance(answer, str) for answer in answers):
        texts = list(map(check_text, answers, sides, [where] * 2))
        transcripts = all(text.lstrip().startswith(HUMAN.strip()) for text in texts)
        if prompt is None or (isinstance(prompt, str) and transcripts):
            used = used if prompt is None else used - {name, "prompt"}
            prompt, *answers = _split_texts(*texts)
            if prompt is None:
                raise _no_prompt(record, where)
        elif isinstance(prompt, str) and prompt and all(_repeats(text, prompt) for text in texts):
            answers = [text.removeprefix(prompt) for text in texts]
        if isinstance(prompt, str) and re.search(f"^{ASSISTANT.strip()}", prompt, re.MULTILINE):
            _check_turns(answers, where)
    histories = []  # that messages bring, where the prompt is none
    for i, side in enumerate(sides):
        if isinstance(answers[i], list):
            *history, answers[i] = check_messages(answers[i], side, where)
            if answers[i]["role"] != "assistant":
                problem = f"{side}: the last message must be the assistant's"
                raise BadRow("wrong type", where, problem)
            if not history:
                continue
            if not isinstance(prompt, list):
                lead = [m for m in history if m["role"] == "system"]
                rest = history[len(lead) :]
                if isinstance(prompt, str) and (not rest or rest[0]["role"] == "assistant"):
                    # What the user said first is in the prompt alone.
                    history = [*lead, {"role": "user", "content": prompt}, *rest]
                elif isinstance(prompt, str) and not any(
                    m["role"] == "user" and prompt.strip() in str(m["content"]) for m in rest
                ):
                    used = used - {name, "prompt"}  # no message repeats it
                histories.append(history)
            elif history != check_messages(prompt, name, where):
                problem = f"{side}: its first messages differ from the prompt"
                raise BadRow("unequal prompts", where, problem)
    if histories:
        if histories[0] != histories[-1]:
            problem = "rejected: its first messages differ from those of chosen"
            raise BadRow("unequal prompts", where, problem)
        prompt, name = histories[0], "chosen"
    scores, score_names = [1.0, 0.0], None
    for fields in PAIR_SCORES:
        found = [record.get(field) for field in fields]
        if all(field in record for field in fields) and any(v not in (None, "") for v in found):
            scores, score_names = list(map(number, found)), list(fields)
            used = used | set(fields)
            break
    return Canonical(
        prompt, name, answers, scores, list(sides), used | set(sides), list(sides), score_names
    )


def _split_texts(chosen: str, rejected: str) -> tuple[str | None, str, str]:
    """Split two transcripts into (prompt, answer, answer) after the last line of their common
    beginning that starts with "Assistant:"; the prompt is None if there is none."""
    shared = chosen[: _shared_length(chosen, rejected)]
    marks = [mark.end() for mark in re.finditer(f"^{ASSISTANT.strip()}", shared, re.MULTILINE)]
    at = marks[-1] if marks else 0
    return chosen[:at] or None, chosen[at:], rejected[at:]


def _repeats(answer: str, prompt: str) -> bool:
    """Whether an answer begins with the prompt, and goes on. A single word may be there by chance,
    as in an answer to "Hi"."""
    is_word = prompt.isascii() and prompt.strip().isalnum()
    return answer.startswith(prompt) and not is_word and bool(answer[len(prompt) :].strip())


def _check_turns(answers: list[str], where: str) -> None:
    """Refuse answers in a transcript that hold later turns of the human, which would be learned."""
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        if re.search(f"^{HUMAN.strip()}", answer, re.MULTILINE):
            problem = f"{side}: expected an answer, found further turns behind it"
            problem += f" ({HUMAN.strip()!r}); the two transcripts part before their last turn"
            raise BadRow("further turns", where, problem)


def _no_prompt(record: dict, where: str) -> BadRow:
    problem = f"prompt: missing, and the texts share no {ASSISTANT.strip()!r} to end it"
    other = next((name for name in QUESTIONS if record.get(name)), None)
    if other is not None:
        problem = f"prompt: missing, and {other} may be it (--columns '{{prompt: {other}}}')"
    return BadRow("missing field", where, problem + what_serves(record))


def _shared_length(a: str, b: str) -> int:
    """Count the characters that both texts begin with, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
