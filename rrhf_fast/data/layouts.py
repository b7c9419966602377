"""Records in the layouts of published datasets -> one canonical record.

A layout is recognised by its fields. `LAYOUTS` lists them all, each with an example record;
docs/data.md shows the same table. `--columns` maps everything else.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean

from rrhf_fast.data.checks import BadRow, Cell, check_list, check_text, listed, show
from rrhf_fast.data.messages import check_messages, from_cell

# Fields that any layout may have in addition to its own.
COMMON = ("system", "tools", "chat_template_kwargs", "as_generated", "finish_reasons")
# Fields that hold one item per response.
OF_RESPONSES = ("responses", "sources", "as_generated", "finish_reasons")
# Names for the response and its score in rows of one response, which `--group_by` joins.
RESPONSE_NAMES = ("response", "completion", "answer", "output")
SCORE_NAMES = ("score", "rating", "reward", "helpfulness")
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


@dataclass
class Canonical:
    """A record in terms of the own format, its values not checked yet."""

    prompt: object = None  # text, messages or None
    prompt_name: str = "prompt"
    responses: object = None  # a list of texts or messages, or None
    scores: object = None  # a list of numbers, or None
    sources: object = None
    used: set[str] = field(default_factory=set)  # fields that this was made from
    names: list[str] | None = None  # per response, for errors; default responses[i]
    score_names: list[str] | None = None  # per score, likewise; default scores[i]
    common: dict = field(default_factory=dict)  # the fields in COMMON


@dataclass(frozen=True)
class Layout:
    """One layout, and how to convert a record in it."""

    title: str
    tells: tuple[tuple[str, ...], ...]  # a record with all fields of any of these has this layout
    convert: Callable[[dict, str], Canonical]  # (record, where); raises BadRow
    example: dict
    note: str  # where prompt and scores come from


def canonical(record: dict, where: str, mapped: dict | None = None) -> Canonical:
    """Convert a record to the terms of the own format.

    Args:
        record: of any layout.
        where: for messages.
        mapped: what `--columns` found, by name; it takes precedence over the layout.

    Raises:
        BadRow: a field of the layout is malformed.
    """
    if mapped:
        if "responses" in mapped or "chosen" in mapped:
            # Lists that describe other responses do not apply to these.
            record = {name: value for name, value in record.items() if name not in OF_RESPONSES}
        record = record | mapped
    layout = layout_of(record)
    canon = _own(record, where) if layout is None else layout.convert(record, where)
    if mapped:
        _prefer(canon, mapped, where)
    canon.common = {name: _filled(record, name) for name in COMMON}
    canon.used.update(COMMON)
    return canon


def _prefer(canon: Canonical, mapped: dict, where: str) -> None:
    """Let what `--columns` found take precedence over the layout."""
    known = {"prompt", "responses", "scores", "sources", *COMMON}
    if idle := sorted(mapped.keys() - known - canon.used):
        problem = f"columns: {listed(idle)}: of no use in a record of this layout (response and "
        problem += "score need --group_by, a pair needs score_chosen and score_rejected)"
        raise BadRow("columns without use", where, problem)
    for name in {"responses", "scores", "sources"} & mapped.keys():
        setattr(canon, name, mapped[name])
    # A conversation in the pair is the whole prompt; a string beside it repeats one message.
    if "prompt" in mapped and canon.prompt_name not in ("chosen", "rejected"):
        canon.prompt, canon.prompt_name = from_cell(mapped["prompt"]), "prompt"
    if "responses" in mapped:
        canon.names = None
    if "scores" in mapped:
        canon.score_names = None
    canon.used.update(mapped)


def layout_of(record: dict) -> Layout | None:
    """Recognise the layout by the record's fields; None if none fits. Fields that are None count
    only if no layout fits without them, because Parquet fills missing fields in."""
    if record.get("responses") is not None:
        return LAYOUTS[0]  # this field is enough, and this layout is the most frequent
    for names in ({name for name, value in record.items() if value is not None}, set(record)):
        for layout in LAYOUTS:
            if any(names.issuperset(tells) for tells in layout.tells):
                return layout
    return None


def what_serves(record: dict) -> str:
    """End an error about a missing field: which fields there are, and what to do."""
    hint = "name yours with --columns, or see the table of layouts in docs/data.md"
    if record.get("responses") is not None and record.get("scores") is None:
        hint = f"score them with python -m rrhf_fast.score, {hint}"
    elif any(name in record for name in RESPONSE_NAMES):
        hint = f"for one response per row say --group_by prompt, else {hint}"
    return f"; found the fields {listed(list(record))}: {hint}" if record else "; found no fields"


def _filled(record: dict, name: str) -> object:
    """Get an optional field; an empty CSV cell counts as missing."""
    value = record.get(name)
    return None if isinstance(value, Cell) and not value.strip() else value


def _prompt_of(record: dict, names: Iterable[str]) -> tuple[object, str]:
    """Return the first of these fields that is present, and its name."""
    name = next((name for name in names if record.get(name) is not None), "prompt")
    prompt = from_cell(record.get(name))
    return [prompt] if isinstance(prompt, dict) else prompt, name


def _own(record: dict, where: str) -> Canonical:
    prompt, name = _prompt_of(record, ("prompt", "query"))
    return Canonical(
        prompt,
        name,
        responses=record.get("responses"),
        scores=record.get("scores"),
        sources=_filled(record, "sources"),
        used={name, "responses", "scores", "sources"}
        | ({"query"} if record.get("query") == record.get(name) else set()),
    )


def _pair(record: dict, where: str) -> Canonical:
    prompt, name = _prompt_of(record, ("prompt", "query", "question", "input"))
    return _pair_behind(record, where, prompt, name, {"prompt", name})


def _pair_behind(record: dict, where: str, prompt: object, name: str, used: set[str]) -> Canonical:
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
            scores, score_names = list(map(_number, found)), list(fields)
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


def _sharegpt(record: dict, where: str) -> Canonical:
    name = "conversations"
    prompt = check_messages(from_cell(record[name]), name, where)
    return _pair_behind(record, where, prompt, name, {name})


def _alpaca(record: dict, where: str) -> Canonical:
    prompt = check_text(record["instruction"], "instruction", where)
    if record.get("input") not in (None, ""):
        prompt += "\n" + check_text(record["input"], "input", where)
    used = {"instruction", "input"}
    if record.get("history"):
        used.add("history")
        prompt = [*_turns(record["history"], where), {"role": "user", "content": prompt}]
    sides = [record.get("chosen"), record.get("rejected")]
    if None not in sides or (
        record.get("output") is None and {"chosen", "rejected"} <= set(record)
    ):
        return _pair_behind(record, where, prompt, "instruction", used)
    canon = Canonical(prompt, "instruction", used=used | {"output"})
    output = record.get("output")
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
    """Turn [[question, answer], ...] into messages."""
    messages = []
    for i, turn in enumerate(check_list(history, "history", where)):
        name = f"history[{i}]"
        if len(texts := check_list(turn, name, where)) != 2:
            problem = f"{name}: expected [question, answer], found {show(turn)}"
            raise BadRow("wrong type", where, problem)
        for role, text in zip(("user", "assistant"), texts, strict=True):
            messages.append({"role": role, "content": check_text(text, name, where)})
    return messages


def _items(record: dict, name: str, where: str) -> list[dict]:
    items = check_list(record[name], name, where)
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            problem = f"{name}[{i}]: expected an object, found {show(item)}"
            raise BadRow("wrong type", where, problem)
    return items


def _models(items: list[dict]) -> list[str] | None:
    models = [item.get("model") for item in items]
    return models if all(isinstance(model, str) for model in models) else None


def _ultrafeedback(record: dict, where: str) -> Canonical:
    prompt, name = _prompt_of(record, ("instruction", "prompt"))
    used = {name, "completions"}
    if name == "instruction" and isinstance(prompt, str) and record.get("input"):
        prompt += "\n" + check_text(record["input"], "input", where)
        used.add("input")
    items = _items(record, "completions", where)
    kinds = {
        "overall_score": [item.get("overall_score") for item in items],
        "fine-grained_score": [item.get("fine-grained_score") for item in items],
        "annotations": [_mean_rating(item.get("annotations")) for item in items],
    }
    # One kind of score per row: the first that all completions have, else the first that any has.
    order = sorted(kinds, key=lambda kind: kinds[kind].count(None) > 0)
    kind = next((kind for kind in order if any(v is not None for v in kinds[kind])), order[0])
    return Canonical(
        prompt,
        name,
        [item.get("response") for item in items],
        list(map(_number, kinds[kind])),
        _models(items),
        used,
        [f"completions[{i}].response" for i in range(len(items))],
        [f"completions[{i}].{kind}" for i in range(len(items))],
    )


def _mean_rating(annotations: object) -> float | None:
    """Average the ratings of the aspects, which are strings; ignores those that are no numbers."""
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, dict) else ():
        try:
            ratings.append(float(aspect["Rating"]))
        except (TypeError, ValueError, KeyError, OverflowError):
            continue
    return mean(ratings) if ratings else None


def _nectar(record: dict, where: str) -> Canonical:
    prompt, name = _prompt_of(record, ("prompt", "question"))
    items = _items(record, "answers", where)
    ranks = [_number(item.get("rank")) for item in items]
    return Canonical(
        prompt,
        name,
        [item.get("answer") for item in items],
        [-r if isinstance(r, int | float) and not isinstance(r, bool) else r for r in ranks],
        _models(items),
        {name, "answers"},
        [f"answers[{i}].answer" for i in range(len(items))],
        [f"answers[{i}].rank" for i in range(len(items))],
    )


def _number(value: object) -> object:
    """Read a number that is given as text; anything else is left to be refused by name."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _choice(record: dict, name: str, where: str) -> int:
    """Return a field that must be 0 or 1."""
    value = record[name]
    number = {"0": 0, "1": 1}.get(value.strip()) if isinstance(value, Cell) else value
    if number not in (0, 1):
        raise BadRow("wrong type", where, f"{name}: expected 0 or 1, found {show(value)}")
    return int(number)


def _safe_rlhf(record: dict, where: str) -> Canonical:
    prompt, name = _prompt_of(record, ("prompt",))
    names = ["response_0", "response_1"]
    better = _choice(record, "better_response_id", where)
    return Canonical(
        prompt,
        name,
        [record[name] for name in names],
        [1.0 - better, float(better)],
        used={"prompt", "better_response_id", *names},
        names=names,
    )


def _shp(record: dict, where: str) -> Canonical:
    names, score_names = ["human_ref_A", "human_ref_B"], ["score_A", "score_B"]
    scores = [_number(record.get(name)) for name in score_names]
    used = {"history", *names, *score_names, "labels"}
    if record.get("labels") not in (None, ""):
        first = float(_choice(record, "labels", where))  # 1: A is preferred
        numbers = all(isinstance(v, int | float) for v in scores)
        # Where votes and label disagree, the label states the preference.
        if not numbers or scores[0] == scores[1] or (scores[0] > scores[1]) != (first == 1.0):
            scores, score_names = [first, 1.0 - first], ["labels", "labels"]
    return Canonical(
        record["history"],
        "history",
        [record[name] for name in names],
        scores,
        used=used,
        names=names,
        score_names=score_names,
    )


LAYOUTS = (
    Layout(
        "own format",
        (("responses",),),
        _own,
        {"prompt": "Why?", "responses": ["So it is.", "No idea."], "scores": [2, 1]},
        "`query` is an alias of `prompt`, as in the released RRHF data",
    ),
    Layout(
        "UltraFeedback",
        (("instruction", "completions"), ("prompt", "completions")),
        _ultrafeedback,
        {
            "instruction": "Why?",
            "completions": [
                {"model": "a", "response": "So it is.", "overall_score": 8.0},
                {"model": "b", "response": "No idea.", "overall_score": 3.5},
            ],
        },
        "scores: `overall_score`, else `fine-grained_score`, else the mean of the annotations' "
        "`Rating`; sources: `model`",
    ),
    Layout(
        "PKU-SafeRLHF",
        (("prompt", "response_0", "response_1", "better_response_id"),),
        _safe_rlhf,
        {
            "prompt": "Why?",
            "response_0": "No idea.",
            "response_1": "So it is.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        "the response that `better_response_id` names scores 1, the other 0",
    ),
    Layout(
        "Nectar",
        (("prompt", "answers"), ("question", "answers")),
        _nectar,
        {
            "prompt": "Why?",
            "answers": [
                {"answer": "So it is.", "rank": 1, "model": "a"},
                {"answer": "No idea.", "rank": 2, "model": "b"},
            ],
        },
        "score: minus the `rank`; sources: `model`",
    ),
    Layout(
        "SHP",
        (("history", "human_ref_A", "human_ref_B"),),
        _shp,
        {
            "history": "Why?",
            "human_ref_A": "So it is.",
            "human_ref_B": "No idea.",
            "labels": 1,
            "score_A": 12,
            "score_B": 3,
        },
        "prompt: `history`; scores: `score_A` and `score_B`, or `labels` where these disagree",
    ),
    Layout(
        "ShareGPT pairs",
        (("conversations", "chosen", "rejected"),),
        _sharegpt,
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "So it is."},
            "rejected": {"from": "gpt", "value": "No idea."},
        },
        "prompt: `conversations`; roles human, gpt, system and tool; scores as in pairs",
    ),
    Layout(
        "pairs",
        (("prompt", "chosen", "rejected"), ("query", "chosen", "rejected")),
        _pair,
        {
            "prompt": "Why?",
            "chosen": "So it is.",
            "rejected": "No idea.",
            "score_chosen": 8,
            "score_rejected": 3,
        },
        "texts or messages, which may repeat the prompt; scores: `score_chosen`, `chosen_score` or "
        "`chosen-rating` (`rating`, `reward`) and the other's, else 1 and 0",
    ),
    Layout(
        "Alpaca pairs",
        (("instruction", "chosen", "rejected"), ("instruction", "output")),
        _alpaca,
        {"instruction": "Explain.", "input": "Why?", "output": ["So it is.", "No idea."]},
        "prompt: `instruction`, a line end and `input`, behind `history`; `output` is [better, "
        "worse], or `chosen` and `rejected`",
    ),
    Layout(
        "Orca DPO pairs",
        (("question", "chosen", "rejected"), ("input", "chosen", "rejected")),
        _pair,
        {
            "system": "Be brief.",
            "question": "Why?",
            "chosen": "So it is.",
            "rejected": "No idea.",
        },
        "prompt: `question` (or `input`), behind `system`",
    ),
    Layout(
        "transcripts (HH)",
        (("chosen", "rejected"),),
        _pair,
        {
            "chosen": f"{HUMAN} Why?{ASSISTANT} So it is.",
            "rejected": f"{HUMAN} Why?{ASSISTANT} No idea.",
        },
        "prompt: what both begin with, up to the last `Assistant:`, or messages before the last; "
        "other texts need a prompt",
    ),
)
