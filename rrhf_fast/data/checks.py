"""The error for a bad row, and the checks of single values."""

import json
import math

NO_ARRAY = "expected a JSON object on each line, found what looks like a JSON array"


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


# How messages begin when Python prints them.
PRINTED = tuple(f"{{'{key}':" for key in ("role", "content", "from", "value"))


def check_text(text: object, name: str, where: str) -> str:
    """Return the text as a plain string. Raises BadRow unless it is a string of valid Unicode. A
    printed list of messages, as pandas writes it to CSV, is refused too."""
    if not isinstance(text, str):
        raise BadRow("wrong type", where, f"{name}: expected a string, found {show(text)}")
    if text.lstrip(" [").startswith(PRINTED):
        problem = f"{name}: messages as Python prints them, expected JSON (json.dumps, or Parquet)"
        raise BadRow("wrong type", where, problem)
    check_unicode(text, name, where)
    return str(text)


def check_unicode(value: object, name: str, where: str) -> None:
    """Raise BadRow if any string in a JSON value holds half of a surrogate pair."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            problem = f"{name}: holds half of a surrogate pair, expected valid Unicode"
            raise BadRow("not Unicode", where, problem)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_unicode(key, name, where)
            check_unicode(item, name, where)
    elif isinstance(value, list):
        for item in value:
            check_unicode(item, name, where)


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
        raise BadRow(kind, where, f"{name}: expected a number, found {show(score)}")
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
    return record


def show(value: object) -> str:
    """Describe a value on one line for a message: its type and the value, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, or nested too deeply
        text = "..."
    kind = "str" if isinstance(value, str) else type(value).__name__
    return f"{kind} {text if len(text) <= 40 else text[:37] + '...'}"


def one_line(problem: object, limit: int | None = 300) -> str:
    """An error, or a text from elsewhere, as a part of a message: its first `limit` characters
    without line breaks and lone surrogates; the type of an error that says nothing."""
    text = " ".join(str(problem).split()).encode(errors="replace").decode()
    return text[:limit] if text or isinstance(problem, str) else type(problem).__name__


def listed(names: list[str]) -> str:
    """List at most 20 field names for a message, odd ones quoted."""
    shown = [name if name.isprintable() and len(name) <= 40 else show(name)[4:] for name in names]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return ", ".join(shown[:20]) + more
