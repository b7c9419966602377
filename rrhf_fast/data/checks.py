"""The error for a bad row, and the checks of single values."""

import json
import math
import re
import unicodedata

NO_ARRAY = "expected a JSON object on each line, found what looks like a JSON array"
# Levels of lists and objects in a record. Functions that visit all of it call themselves.
MAX_DEPTH = 64


class BadRow(ValueError):
    """A row that cannot be used. The summary counts these errors by `kind`, a short name."""

    def __init__(self, kind: str, where: str, problem: str):
        super().__init__(kind, where, problem)  # all arguments, so that it can be pickled
        self.kind = kind

    def __str__(self) -> str:
        _, where, problem = self.args
        return f"{where}: {problem}"


class Cell(str):
    """A CSV cell: text of unknown type. The checks below parse it where a number or a list is
    expected."""


_VIRAMA = 9  # the combining class of such signs
# How messages begin when Python prints them: with a name and, in the same object, the other.
_PAIRS = (("role", "content"), ("content", "role"), ("from", "value"), ("value", "from"))
_PRINTED = re.compile("|".join(rf"[ \[]*\{{'{a}': .*'{b}': " for a, b in _PAIRS), re.DOTALL)


def check_text(text: object, name: str, where: str) -> str:
    """Return the text as a plain string. Raises BadRow unless it is a string of valid Unicode. A
    printed list of messages, as pandas writes it to CSV, is refused too."""
    if not isinstance(text, str):
        raise BadRow("wrong type", where, f"{name}: expected a string, found {show(text)}")
    if _PRINTED.match(text):
        problem = f"{name}: messages as Python prints them, expected JSON (json.dumps, or Parquet)"
        raise BadRow("wrong type", where, problem)
    check_json(text, name, where)
    return str(text)


def check_json(value: object, name: str, where: str, levels: int = MAX_DEPTH - 8) -> None:
    """Raise BadRow if anything in the value cannot be written as JSON, half of a surrogate pair,
    NaN or infinity, bytes, or is nested too deeply to be read again from where stages put it."""
    if levels < 0:
        raise BadRow("nested too deeply", where, f"{name}: nested too deeply")
    if isinstance(value, str):
        if not is_unicode(value):
            problem = f"{name}: holds half of a surrogate pair, expected valid Unicode"
            raise BadRow("not Unicode", where, problem)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_json(key, name, where)
            check_json(item, name, where, levels - 1)
    elif isinstance(value, list):
        for item in value:
            check_json(item, name, where, levels - 1)
    elif isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadRow("not JSON", where, f"{name}: holds {show(value)}, which JSON lacks")


def is_unicode(text: str) -> bool:
    """Return whether the text has no lone surrogates, and so can be encoded."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_list(value: object, name: str, where: str) -> list:
    """Return a copy of the list. Raises BadRow if the value is not a list."""
    if isinstance(value, Cell):
        value = from_json(value, name, where)
    if value is None:
        raise BadRow("missing field", where, f"{name}: missing (expected a list)")
    if not isinstance(value, list):
        raise BadRow("wrong type", where, f"{name}: expected a list, found {show(value)}")
    return list(value)


def check_texts(value: object, name: str, where: str) -> list[str] | None:
    """Return a list of strings, or None for None. Raises BadRow for anything else."""
    if value is None:
        return None
    texts = check_list(value, name, where)
    return [check_text(text, f"{name}[{i}]", where) for i, text in enumerate(texts)]


def check_reasons(value: object, name: str, where: str) -> list[str | None] | None:
    """Return a list of strings, or None for each that is missing; None for None. Raises BadRow for
    anything else."""
    if value is None:
        return None
    reasons = check_list(value, name, where)
    return [
        None if reason is None else check_text(reason, f"{name}[{i}]", where)
        for i, reason in enumerate(reasons)
    ]


def check_flags(value: object, name: str, where: str) -> list[bool] | None:
    """Return a list of booleans, or None for None. Raises BadRow for anything else."""
    if value is None:
        return None
    flags = check_list(value, name, where)
    for i, flag in enumerate(flags):
        if not isinstance(flag, bool):
            problem = f"{name}[{i}]: expected true or false, found {show(flag)}"
            raise BadRow("wrong type", where, problem)
    return flags


def check_length(name: str, values: list | None, count: int, where: str) -> None:
    """Raise BadRow unless `values` is None or holds one item per response."""
    if values is not None and len(values) != count:
        expected = f"expected one for each of the {count} responses"
        raise BadRow("unequal lengths", where, f"{name}: {expected}, found {len(values)}")


def check_score(score: object, name: str, where: str) -> float:
    """Return the score as a finite float. Raises BadRow if it is not a finite number."""
    if isinstance(score, Cell):
        try:
            score = float(score)
        except ValueError:
            score = score.strip() or None
    if isinstance(score, bool) or not isinstance(score, int | float):
        kind = "missing score" if score is None else "wrong type"
        hint = " (write 1 for true, 0 for false)" if isinstance(score, bool) else ""
        raise BadRow(kind, where, f"{name}: expected a number, found {show(score)}{hint}")
    try:
        score = float(score)
    except OverflowError:  # an integer of more than 308 digits
        score = math.inf
    if not math.isfinite(score):
        raise BadRow("non-finite score", where, f"{name}: expected a finite number, found {score}")
    return score


def from_json(text: str, name: str, where: str) -> object:
    """Parse JSON; None for a blank string. Raises BadRow if the text is not JSON."""
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number too long
        problem = f"{name}: expected JSON, found {show(str(text))}"
        raise BadRow("not JSON", where, problem) from error


def check_object(record: object, where: str) -> dict:
    """Return the record. Raises BadRow unless it is an object."""
    if isinstance(record, BadRow):  # a line that is not JSON
        raise record
    if isinstance(record, list):
        raise BadRow("not an object", where, NO_ARRAY)
    if not isinstance(record, dict):
        raise BadRow("not an object", where, f"expected a JSON object, found {show(record)}")
    if _is_deeper(record, MAX_DEPTH):
        problem = f"expected at most {MAX_DEPTH} levels of lists and objects within each other"
        raise BadRow("nested too deeply", where, problem)
    return record


def _is_deeper(value: object, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(
        levels == 0 or _is_deeper(item, levels - 1)
        for item in items
        if isinstance(item, dict | list)
    )


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)


# Reads integers of more digits than Python converts as infinite, as 1e999 is.
ANY_INTEGER = json.JSONDecoder(parse_int=_integer)


def printed(value: object, limit: int = 80) -> str:
    """A value as Python prints it, on one line, shortened to `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, or nested too deeply
        text = "(too large to show)"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def show(value: object) -> str:
    """Describe a value on one line for a message: its type and the value, shortened."""
    kind = "str" if isinstance(value, str) else type(value).__name__
    return f"{kind} {printed(value, 40)}"


def visible(text: str) -> str:
    """The text with every character that a terminal obeys or hides written out, as \\x1b: controls,
    line ends, directions, zero widths, halves of surrogate pairs. Joiners and non-joiners stay
    where they shape emoji or letters, as in Persian and Indic text."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode() if _is_hidden(text, i) else c
        for i, c in enumerate(text)
    )


def visible_lines(text: str) -> str:
    """`visible` for a text of several lines, which may hold tabs."""
    return re.sub(r"[^\n\t]+", lambda part: visible(part[0]), text)


def _is_hidden(text: str, i: int) -> bool:
    if unicodedata.category(text[i]) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return False
    if text[i] not in "\u200c\u200d":
        return True
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    # A virama ends a word in its pure form by a joiner.
    ends_word = before and unicodedata.combining(before) == _VIRAMA
    return not (ends_word or (_is_shaped(before) and _is_shaped(after)))


def _is_shaped(letter: str) -> bool:
    """Whether joiners beside this change its looks: an emoji or a letter, but none of ASCII, where
    they would only hide."""
    kind = unicodedata.category(letter) if letter and not letter.isascii() else ""
    return kind.startswith(("L", "M")) or kind in ("So", "Sk")


def one_line(problem: object, limit: int | None = 300) -> str:
    """An error, or a text from elsewhere, as a part of a message: its first `limit` characters,
    `visible` and on one line; the type of an error that says nothing."""
    text = visible(" ".join(str(problem).split()))
    return text[:limit] if text or isinstance(problem, str) else type(problem).__name__


def listed(names: list[str], most: int = 20, length: int = 40) -> str:
    """List names for a message, `most` of them at most, odd ones and those longer than `length`
    quoted."""
    shown = [
        name if name.isprintable() and len(name) <= length else printed(name, length)
        for name in names[:most]
    ]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown) + more
