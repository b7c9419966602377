"""A record of any layout -> the canonical record.

A layout is recognised by the names of its fields. `LAYOUTS` lists all layouts, each with an example
record; docs/data.md shows the same table. `--columns` maps everything else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from rrhf_fast.data.canonical import COMMON, Canonical, number, prompt_of
from rrhf_fast.data.checks import BadRow, Cell, check_list, check_text, listed, show
from rrhf_fast.data.messages import from_cell
from rrhf_fast.data.pairs import ASSISTANT, HUMAN, alpaca, pair, sharegpt

# Fields with one item per response.
PER_RESPONSE = ("responses", "sources", "as_generated", "finish_reasons")


@dataclass(frozen=True)
class Layout:
    """A layout, and the function that converts its records."""

    title: str
    signatures: tuple[tuple[str, ...], ...]  # all fields of any of these identify the layout
    convert: Callable[[dict, str], Canonical]  # (record, where); raises BadRow
    example: dict
    note: str  # where the prompt and the scores are


def canonical(record: dict, where: str, mapped: dict | None = None) -> Canonical:
    """Convert a record to canonical form.

    Args:
        record: of any layout.
        where: the place of the record, for messages.
        mapped: values by field from `--columns`; they take precedence over the layout.

    Raises:
        BadRow: a field of the layout is malformed.
    """
    if mapped:
        if "responses" in mapped or "chosen" in mapped:
            # Lists in the record describe other responses.
            record = {name: value for name, value in record.items() if name not in PER_RESPONSE}
        record = record | mapped
    layout = layout_of(record)
    canon = _own(record, where) if layout is None else layout.convert(record, where)
    if mapped:
        _apply_columns(canon, mapped, where)
    canon.common = {name: _filled(record, name) for name in COMMON}
    canon.used.update(COMMON)
    return canon


def _apply_columns(canon: Canonical, mapped: dict, where: str) -> None:
    """Let the values from `--columns` take precedence over the layout."""
    known = {"prompt", "responses", "scores", "sources", *COMMON}
    if unused := sorted(mapped.keys() - known - canon.used):
        problem = f"columns: {listed(unused)}: unused in a record of this layout (response and "
        problem += "score need --group_by, a pair needs both score_chosen and score_rejected)"
        raise BadRow("unused columns", where, problem)
    for name in {"responses", "scores", "sources"} & mapped.keys():
        setattr(canon, name, mapped[name])
    # A conversation in the pair is the whole prompt; a separate string repeats one message.
    if "prompt" in mapped and canon.prompt_name not in ("chosen", "rejected"):
        canon.prompt, canon.prompt_name = from_cell(mapped["prompt"]), "prompt"
    if "responses" in mapped:
        canon.names = None
    if "scores" in mapped:
        canon.score_names = None
    canon.used.update(mapped)


def layout_of(record: dict) -> Layout | None:
    """Recognise the layout by the record's fields; None if none fits. Fields that are None count
    only if no layout fits without them, because Parquet fills in missing fields."""
    if record.get("responses") is not None:
        return LAYOUTS[0]  # the most frequent layout; this field decides
    for names in ({name for name, value in record.items() if value is not None}, set(record)):
        for layout in LAYOUTS:
            if any(names.issuperset(signature) for signature in layout.signatures):
                return layout
    return None


def _filled(record: dict, name: str) -> object:
    """Return an optional field; an empty CSV cell counts as missing."""
    value = record.get(name)
    return None if isinstance(value, Cell) and not value.strip() else value


def _own(record: dict, where: str) -> Canonical:
    prompt, name = prompt_of(record, ("prompt", "query"))
    used = {name, "responses", "scores", "sources"}
    if record.get("query") == record.get(name):
        used.add("query")
    responses, scores = record.get("responses"), record.get("scores")
    return Canonical(prompt, name, responses, scores, _filled(record, "sources"), used)


def _items(record: dict, name: str, text: str, layout: str, where: str) -> list[dict]:
    """The list of objects in a field, with a response under `text` in one at least. A field of this
    name may be anyone's, so errors say what it was read as."""
    items = check_list(record[name], name, where)
    wrong = [item for item in items if not isinstance(item, dict)]
    if wrong or (items and not any(text in item for item in items)):
        item = wrong[0] if wrong else items[0]
        found = show(item) if wrong else f"the fields {listed(list(item))}"
        problem = f"{name}[{items.index(item)}]: expected an object with {text}, as {layout} has it"
        problem += f", found {found}; name yours with --columns"
        raise BadRow("wrong type", where, problem)
    return items


def _models(items: list[dict]) -> list[str] | None:
    models = [item.get("model") for item in items]
    return models if all(isinstance(model, str) for model in models) else None


def _ultrafeedback(record: dict, where: str) -> Canonical:
    prompt, name = prompt_of(record, ("instruction", "prompt"))
    used = {name, "completions"}
    if name == "instruction" and isinstance(prompt, str) and record.get("input"):
        prompt += "\n" + check_text(record["input"], "input", where)
        used.add("input")
    items = _items(record, "completions", "response", "UltraFeedback", where)
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
        responses=[item.get("response") for item in items],
        scores=list(map(number, kinds[kind])),
        sources=_models(items),
        used=used,
        names=[f"completions[{i}].response" for i in range(len(items))],
        score_names=[f"completions[{i}].{kind}" for i in range(len(items))],
    )


def _mean_rating(annotations: object) -> float | None:
    """Return the mean rating of the aspects, ignoring ratings that are not numbers."""
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, dict) else ():
        try:
            ratings.append(float(aspect["Rating"]))
        except (TypeError, ValueError, KeyError, OverflowError):
            continue
    return mean(ratings) if ratings else None


def _nectar(record: dict, where: str) -> Canonical:
    prompt, name = prompt_of(record, ("prompt", "question"))
    items = _items(record, "answers", "answer", "Nectar", where)
    ranks = [number(item.get("rank")) for item in items]
    return Canonical(
        prompt,
        name,
        responses=[item.get("answer") for item in items],
        scores=[-r if isinstance(r, int | float) and not isinstance(r, bool) else r for r in ranks],
        sources=_models(items),
        used={name, "answers"},
        names=[f"answers[{i}].answer" for i in range(len(items))],
        score_names=[f"answers[{i}].rank" for i in range(len(items))],
    )


def _choice(record: dict, name: str, where: str) -> int:
    """Return a field that must be 0 or 1."""
    value = record[name]
    number = {"0": 0, "1": 1}.get(value.strip()) if isinstance(value, Cell) else value
    if number not in (0, 1):
        raise BadRow("wrong type", where, f"{name}: expected 0 or 1, found {show(value)}")
    return int(number)


def _safe_rlhf(record: dict, where: str) -> Canonical:
    prompt, name = prompt_of(record, ("prompt",))
    names = ["response_0", "response_1"]
    better = _choice(record, "better_response_id", where)
    responses, scores = [record[name] for name in names], [1.0 - better, float(better)]
    used = {"prompt", "better_response_id", *names}
    return Canonical(prompt, name, responses, scores, used=used, names=names)


def _shp(record: dict, where: str) -> Canonical:
    names, score_names = ["human_ref_A", "human_ref_B"], ["score_A", "score_B"]
    scores = [number(record.get(name)) for name in score_names]
    used = {"history", *names, *score_names, "labels"}
    if record.get("labels") not in (None, ""):
        first = float(_choice(record, "labels", where))  # 1: A is preferred
        numbers = all(isinstance(v, int | float) for v in scores)
        # If votes and label disagree, the label states the preference.
        if not numbers or scores[0] == scores[1] or (scores[0] > scores[1]) != (first == 1.0):
            scores, score_names = [first, 1.0 - first], ["labels", "labels"]
    prompt, responses = prompt_of(record, ("history",))[0], [record[name] for name in names]
    return Canonical(prompt, "history", responses, scores, None, used, names, score_names)


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
        sharegpt,
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
        pair,
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
        alpaca,
        {"instruction": "Explain.", "input": "Why?", "output": ["So it is.", "No idea."]},
        "prompt: `instruction`, a line end and `input`, after `history`; `output` is [better, "
        "worse], or `chosen` and `rejected`",
    ),
    Layout(
        "Orca DPO pairs",
        (("question", "chosen", "rejected"), ("input", "chosen", "rejected")),
        pair,
        {
            "system": "Be brief.",
            "question": "Why?",
            "chosen": "So it is.",
            "rejected": "No idea.",
        },
        "prompt: `question` (or `input`), after `system`",
    ),
    Layout(
        "transcripts (HH)",
        (("chosen", "rejected"),),
        pair,
        {
            "chosen": f"{HUMAN} Why?{ASSISTANT} So it is.",
            "rejected": f"{HUMAN} Why?{ASSISTANT} No idea.",
        },
        "prompt: the common start up to the last `Assistant:`, or the messages before the last; "
        "other texts need a prompt",
    ),
)
