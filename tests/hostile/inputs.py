"""Hostile rows, files and options, each drawn from one seed.

A `Case` holds rows in one of the documented layouts. Some are damaged, in their values, in their
JSON or in their bytes; the others are intact, and what must become of them is known.
"""

import copy
import json
import re
import zlib
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from random import Random

LONG = "7" * 10_000  # more digits than Python converts
# Jinja's `tojson` and `upper` meet whatever a message holds.
TEMPLATE = "{{ tools or '' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
TEMPLATE += (
    "{{ m.tool_calls or '' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
COLUMNS = "{prompt: q, responses: 'answers[].t', scores: 'answers[].s'}"


@dataclass
class Item:
    """A record, and what an intact one says."""

    record: object
    group: int  # items of one group form one row
    prompt: object
    responses: list[str]
    scores: list[float]
    intact: bool = True
    text: bytes | None = None  # damaged JSON, instead of the record


@dataclass
class Case:
    """One input of the fuzzer."""

    seed: int
    command: str  # sample, score, train, step (train for a step), evaluate, iterate, export
    layout: str = "text"
    kind: str = "jsonl"  # or array, csv, tsv, parquet
    damage: list[str] = field(default_factory=list)  # of the whole file
    options: dict[str, str] = field(default_factory=dict)
    absurd: str | None = None  # an option whose value makes no sense
    skip: bool = False
    items: list[Item] = field(default_factory=list)
    ascii: bool = True  # whether JSON escapes letters

    @property
    def is_broken(self) -> bool:
        """Whether the damage of one row may swallow others."""
        torn = any(item.text is not None for item in self.items)
        return bool(self.damage_of_file) or (torn and self.kind != "jsonl")

    @property
    def damage_of_file(self) -> list[str]:
        return [name for name in self.damage if name in ("utf-16", "torn", "flipped", "empty")]


def worth(prompts: list, responses: list[str]) -> list[float]:
    """A reward that depends on nothing but the text; damaged texts may have none."""
    return [float("nan") if "\x00" in text else value_of(text) for text in responses]


def value_of(text: str) -> float:
    return zlib.crc32(text.encode()) % 1000 / 8


def draw(seed: int) -> Case:
    """The case of this seed."""
    rng = Random(seed)
    command = rng.choices(
        ("sample", "score", "train", "step", "evaluate", "iterate", "export"),
        (46, 39.5, 12, 0.2, 0.2, 0.05, 2),
    )[0]
    case = Case(seed, command, skip=rng.random() < 0.65, ascii=rng.random() < 0.5)
    if command == "export":
        return case
    case.layout = rng.choice(list(LAYOUTS))
    flat = case.layout in ("text", "pairs", "safe", "shp", "orca", "grouped", "messages")
    kinds = ("jsonl", "array", "parquet", *(("csv", "tsv") if flat else ()))
    case.kind = rng.choices(kinds, (60, 12, 8, 12, 3)[: len(kinds)])[0]
    make = LAYOUTS[case.layout]
    for number in range(rng.randint(1, 6)):
        case.items += make(rng, number)
    is_query = case.layout == "text" and rng.random() < 0.3
    for number, item in enumerate(case.items):
        item.record["uid"] = number
        if is_query:
            item.record["query"] = item.record.pop("prompt")
        if rng.random() < 0.3:
            _spoil(rng, case, item)
    if case.kind in ("csv", "tsv", "parquet") and rng.random() < 0.2:
        _add_columns(rng, case)
    if rng.random() < 0.25:
        case.damage.append(rng.choice(DAMAGES))
    if rng.random() < 0.15:
        case.damage.append(rng.choice((".gz", ".gz", ".zst", "folder", "pattern")))
    _draw_options(rng, case)
    return case


# --- Rows


def _text(rng: Random, *numbers: int) -> str:
    words = (
        "sky",
        "blue",
        "why",
        "naïve",
        "日本",
        "e\u0301",
        "🙂",
        "a-b",
        "100%",
        "so.",
        "\u2028",
        "'",
    )
    label = ".".join(map(str, numbers))
    return " ".join(["t" + label, *rng.choices(words, k=rng.randint(1, 6)), "end"])


def _answers(rng: Random, number: int, count: int | None = None) -> tuple[list[str], list[float]]:
    count = count or rng.randint(2, 4)
    texts = [_text(rng, number, i) for i in range(count)]
    return texts, rng.sample([x / 4 for x in range(-20, 40)], count)


def _plain(rng: Random, number: int) -> list[Item]:
    (responses, scores), prompt = _answers(rng, number), _text(rng, number)
    record = {"prompt": prompt, "responses": responses, "scores": scores}
    record |= {"sources": [f"s{i}" for i in range(len(scores))]} if rng.random() < 0.5 else {}
    record |= {"finish_reasons": ["stop"] * len(scores)} if rng.random() < 0.2 else {}
    return [Item(record, number, prompt, responses, scores)]


def _messages(rng: Random, number: int) -> list[Item]:
    (item,) = _plain(rng, number)
    record = item.record
    item.prompt = [{"role": "user", "content": record["prompt"]}]
    record["prompt"] = copy.deepcopy(item.prompt)
    if rng.random() < 0.3:
        record["system"] = "Be brief."
        item.prompt = [{"role": "system", "content": "Be brief."}, *item.prompt]
    if rng.random() < 0.2:
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
        record["tools"] = [tool]
    if rng.random() < 0.2:
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1.5}}}
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        told = {"role": "tool", "content": {"found": [1, None, "x"]}}
        record["prompt"] += [asked, told]
        item.prompt = None  # what becomes of it is checked by what is written
    if rng.random() < 0.2:
        record["chat_template_kwargs"] = {"enable_thinking": False}
    return [item]


def _pairs(rng: Random, number: int) -> list[Item]:
    (a, b), prompt = _answers(rng, number, 2)[0], _text(rng, number)
    scores = rng.choice(([1.0, 0.0], [3.5, -2.0]))
    record = {"prompt": prompt, "chosen": a, "rejected": b}
    record |= {"score_chosen": 3.5, "score_rejected": -2.0} if scores[0] == 3.5 else {}
    return [Item(record, number, prompt, [a, b], scores)]


def _safe(rng: Random, number: int) -> list[Item]:
    (a, b), prompt, best = _answers(rng, number, 2)[0], _text(rng, number), rng.randint(0, 1)
    record = {"prompt": prompt, "response_0": a, "response_1": b, "better_response_id": best}
    return [Item(record, number, prompt, [a, b], [1.0 - best, float(best)])]


def _shp(rng: Random, number: int) -> list[Item]:
    (a, b), prompt = _answers(rng, number, 2)[0], _text(rng, number)
    record = {"history": prompt, "human_ref_A": a, "human_ref_B": b, "score_A": 5, "score_B": 2}
    return [Item(record, number, prompt, [a, b], [5.0, 2.0])]


def _orca(rng: Random, number: int) -> list[Item]:
    (a, b), prompt = _answers(rng, number, 2)[0], _text(rng, number)
    return [Item({"question": prompt, "chosen": a, "rejected": b}, number, prompt, [a, b], [1, 0])]


def _alpaca(rng: Random, number: int) -> list[Item]:
    (a, b), task = _answers(rng, number, 2)[0], _text(rng, number)
    record = {"instruction": task, "input": "this", "output": [a, b]}
    return [Item(record, number, f"{task}\nthis", [a, b], [1, 0])]


def _transcripts(rng: Random, number: int) -> list[Item]:
    (a, b), task = _answers(rng, number, 2)[0], _text(rng, number)
    prompt = f"\n\nHuman: {task}\n\nAssistant:"
    record = {"chosen": f"{prompt} {a}", "rejected": f"{prompt} {b}"}
    return [Item(record, number, prompt, [f" {a}", f" {b}"], [1, 0])]


def _feedback(rng: Random, number: int) -> list[Item]:
    (texts, scores), prompt = _answers(rng, number), _text(rng, number)
    parts = zip(texts, scores, strict=True)
    items = [{"model": "m", "response": text, "overall_score": score} for text, score in parts]
    return [Item({"instruction": prompt, "completions": items}, number, prompt, texts, scores)]


def _nectar(rng: Random, number: int) -> list[Item]:
    texts, prompt = _answers(rng, number)[0], _text(rng, number)
    items = [{"answer": text, "rank": i + 1, "model": "m"} for i, text in enumerate(texts)]
    scores = [-1.0 - i for i in range(len(texts))]
    return [Item({"prompt": prompt, "answers": items}, number, prompt, texts, scores)]


def _sharegpt(rng: Random, number: int) -> list[Item]:
    (a, b), prompt = _answers(rng, number, 2)[0], _text(rng, number)
    record = {"conversations": [{"from": "human", "value": prompt}]}
    record |= {"chosen": {"from": "gpt", "value": a}, "rejected": {"from": "gpt", "value": b}}
    asked = [{"role": "user", "content": prompt}]
    return [Item(record, number, asked, [a, b], [1, 0])]


def _columns(rng: Random, number: int) -> list[Item]:
    (texts, scores), prompt = _answers(rng, number), _text(rng, number)
    answers = [{"t": text, "s": score} for text, score in zip(texts, scores, strict=True)]
    return [Item({"q": prompt, "answers": answers}, number, prompt, texts, scores)]


def _grouped(rng: Random, number: int) -> list[Item]:
    (texts, scores), prompt = _answers(rng, number), _text(rng, number)
    return [
        Item({"prompt": prompt, "response": text, "score": s}, number, prompt, [text], [s])
        for text, s in zip(texts, scores, strict=True)
    ]


LAYOUTS = {
    "text": _plain,
    "messages": _messages,
    "pairs": _pairs,
    "safe": _safe,
    "shp": _shp,
    "orca": _orca,
    "alpaca": _alpaca,
    "transcripts": _transcripts,
    "feedback": _feedback,
    "nectar": _nectar,
    "sharegpt": _sharegpt,
    "columns": _columns,
    "grouped": _grouped,
}

# --- Damage


def _hostile(rng: Random) -> object:
    """A value that a field hardly expects. "@@...@@" stands for a bare JSON token."""
    levels = rng.choice((20, 58, 63, 70, 300, 900, 3000))
    deep = f"@@{'[' * levels}1{']' * levels}@@"
    long = "word " * 20_000 if rng.random() < 0.02 else "long"
    tool_call = {"function": {"name": rng.choice(ODD), "arguments": {rng.choice(ODD): "@@NaN@@"}}}
    message = {"role": rng.choice(ODD), "content": rng.choice((*ODD, None, 3, ["x"]))}
    message |= {"tool_calls": [tool_call]} if rng.random() < 0.5 else {}
    return rng.choice(
        (
            *(None, True, False, 0, -1, 2, 0.5, 1e308, -1e-320, 10**19, 10**400, "", " ", "NaN"),
            *(
                "@@NaN@@",
                "@@Infinity@@",
                "@@-Infinity@@",
                f"@@{LONG}@@",
                f"@@-{LONG}@@",
                "@@1e999@@",
            ),
            *(
                f"@@0.{LONG}@@",
                "1",
                "1e999",
                LONG,
                "true",
                "null",
                "[]",
                "{}",
                '["a", "b"]',
                "[1, 2",
            ),
            *([], {}, [[]], [None], [{}], {"a": None}, ["x"], ["x", "y"], [1, 2], [float(1)] * 9),
            *(deep, long, message, [message], [message, message], {"type": "text", "text": "x"}),
            *([{"type": "text", "text": "x"}], [{"type": "image"}], str([message]), "2020-01-01"),
            *ODD,
        )
    )


ODD = (
    "user", "assistant", "system", "tool", "User", "human", "gpt", "", " ", "\ud800", "a\udfff",
    "\x00", "a\x00b", "\x1b]0;gone\x07", "\x1b[31m", "\u202eback", "\ufeff", "\x7f", "\x85", "a\nb",
    "\r", "\u2028", "e\u0301\u0301", "<|endoftext|>", "</s>", "{{ x }}", "{% raw %}",
    "[{'role': 1}]", "rrhf-probe-answer", "\n\nHuman: x\n\nAssistant: y", "x" * 300,
)  # fmt: skip
NEAR = (
    "Prompt", "promt", "prompts", "response", "Responses", "score", "scores ", "reward", "role",
    "content", "tools", "as_generated", "finish_reasons", "criteria", "unscored", "failures",
    "rewards", "log_ratios", "system", "chosen", "rejected", "responses", "scores", "sources",
    "chat_template_kwargs", "query", "history", "model", "input", "labels",
)  # fmt: skip


def _spoil(rng: Random, case: Case, item: Item) -> None:
    """Damage a row: its values (keys only where a file has no columns), JSON or bytes."""
    item.intact = False
    has_columns = case.kind in ("csv", "tsv", "parquet")
    for _ in range(rng.choice((1, 1, 2, 5))):
        item.record = _change(rng, item.record, not has_columns)
    if case.kind in ("jsonl", "array") and rng.random() < 0.4:
        text = dumps(item.record, case.ascii)
        item.text = _tear(rng, _twist(rng, text) if rng.random() < 0.5 else text)


def _change(rng: Random, record: object, with_keys: bool) -> object:
    """Change one value, or one key, anywhere in the record."""
    if rng.random() < 0.02 and with_keys:
        return _hostile(rng)
    record = copy.deepcopy(record)
    places = list(_places(record))
    if not places:
        return record
    holder, key = rng.choice(places)
    odd_key = rng.choice((*ODD, *NEAR))
    is_top = holder is record and not with_keys
    if isinstance(holder, list):
        kind = rng.choice(("value", "drop", "double", "swap"))
    else:
        kind = "value" if is_top else rng.choice(("value", "value", "drop", "rename", "add"))
    if kind == "value":
        holder[key] = _hostile(rng)
    elif kind == "drop":
        del holder[key]
    elif kind == "double":
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "swap":
        rng.shuffle(holder)
    elif kind == "rename":
        holder[odd_key] = holder.pop(key)
    else:
        holder[odd_key] = _hostile(rng)
    return record


def _places(value: object):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def dumps(record: object, escape: bool = True) -> str:
    """JSON of a record with its bare tokens."""
    return re.sub(r'"@@([^"@]*)@@"', r"\1", json.dumps(record, ensure_ascii=escape))


def _twist(rng: Random, text: str) -> str:
    """Change a token of a JSON text."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[-\w.+]+|\s+|.', text, re.DOTALL)
    at = rng.randrange(len(tokens))
    new = rng.choice(
        ("", ",", ":", "[", "]", "{", "}", '"', "NaN", "-", "+1", "01", "1.", ".5", "1e", "nul",
         LONG, "-Infinity", "1e400", '"\\u12"', '"\\ud800"', "'a'", "//", "\t", "\x00", '"prompt"',
         "[" * 5000)
    )  # fmt: skip
    tokens[at : at + rng.randint(0, 2)] = [new]
    return "".join(tokens)


def _tear(rng: Random, text: str) -> bytes:
    encoded = bytearray(text.encode(errors="surrogatepass"))
    for _ in range(rng.choice((0, 1, 1, 3))):
        at, size = rng.randrange(len(encoded) + 1), rng.choice((1, 1, 3, 40))
        new = rng.choice(
            (b"", b"\x00", b"\xff", b"\n", b"\r", b"\xc0\x80", b"\xed\xa0\x80", b'"', b"\\")
        )
        if rng.random() < 0.1:
            del encoded[at:]
        encoded[at : at + rng.choice((0, size))] = new
    return bytes(encoded)


def _add_columns(rng: Random, case: Case) -> None:
    """Add columns of types that JSON lacks, to be passed on."""
    values = (float("nan"), float("inf"), b"\xff\x00", Decimal("1.50"), date(2020, 1, 2), "\ud800")
    values += (datetime(2020, 1, 2, 3), [float("nan")], {"k": b"x"}, 2**63 - 1, "\x1b[31m")
    value = rng.choice(values)
    for item in case.items:
        item.record["extra"] = value
        item.intact &= value != "\ud800"


DAMAGES = ("bom", "crlf", "blank", "no end", "utf-16", "torn", "flipped", "empty")

# --- Options

ABSURD = (
    ("batch_size", "0"), ("batch_size", "nan"), ("batch_size", "1e999"), ("columns", "{prompt: '"),
    ("columns", "{prompt: q[}"), ("columns", "[1, 2]"), ("columns", "{promt: q}"), ("group_by", ""),
    ("group_by", "\x1b[31m"), ("group_by", "nothing"), ("seed", "9" * 5000), ("seed", "-1"),
    ("on_bad_rows", "maybe"), ("on_bad_rows", "[skip]"), ("chat_template_kwargs", "[1]"),
    ("chat_template_kwargs", "{tools: 1}"), ("chat_template_kwargs", "{chat_template: '{% if'}"),
    ("apply_chat_template", "perhaps"), ("policies", "[]"), ("policies", "{"), ("policies", "[{}]"),
    ("policies", "[{method: provided, source: 3}]"), ("policies", "[{method: guess}]"),
    ("policies", "[{method: provided, use_responses: none}]"), ("max_length", "-1"),
    ("max_length", "2"), ("max_length", "1e3"), ("max_prompt_length", "0"), ("stop_strings", "[1]"),
    ("stop_strings", "['']"), ("stop_strings", "t"), ("show_tokens", "1e99"),
    ("show_tokens", "null"), ("kl_coef", "nan"), ("kl_coef", "-1"), ("reward_fn", "os:getcwd"),
    ("reward_fn", "no.such:thing"), ("reward_fn", "x"), ("reward_fn", ":"),
    ("output", "/dev/null/x"), ("output", ""), ("overwrite", "2"), ("data", "/no/such/file.jsonl"),
    ("data", ""), ("data", "[]"), ("data", "a:b:c:d"), ("data", "*.nothing"),
    ("train_data", "\x00"), ("train_data", "no such\x1b[1mfile.csv"), ("use_responses", "provided"),
    ("eval_fraction", "0.99"), ("nonsense", "1"), ("ouput", "x"), ("num_train_epochs", "1e308"),
    ("model_name_or_path", "/no/such/model"), ("config", "/dev/null"), ("keep_all", "{}"),
    ("finished_only", "true"), ("margin", "inf"), ("seed", "\u0664"),
)  # fmt: skip


def _draw_options(rng: Random, case: Case) -> None:
    options = case.options
    options["on_bad_rows"] = "skip" if case.skip else "error"
    if case.layout == "grouped":
        options["group_by"] = "prompt"
    if case.layout == "columns":
        options["columns"] = COLUMNS
    if case.command == "sample":
        options["policies"] = "[{method: provided}]"
        options["keep_all"] = rng.choice(("true", "false"))
        options["finished_only"] = rng.choice(("true", "false"))
    if case.command in ("score", "evaluate", "iterate"):
        options["reward_fn"] = "tests.hostile.inputs:worth"
    if case.command == "score":
        options["batch_size"] = str(rng.choice((1, 3, 16)))
    if case.command in ("train", "step"):
        options |= rng.choice(({}, {"max_prompt_length": "9"}, {"max_response_length": "5"}))
        options |= rng.choice(({}, {"stop_strings": '["none"]'}, {"packing": "none"}))
        options["chat_template_kwargs"] = json.dumps({"chat_template": TEMPLATE})
        options["show_tokens" if case.command == "train" else "max_steps"] = "1"
    if case.command == "train":
        options["show_tokens"] = "99"
    if rng.random() < 0.15:
        options["apply_chat_template"] = "true"
    if rng.random() < 0.08:
        case.absurd, value = rng.choice(ABSURD)
        options[case.absurd] = value
