"""`--columns`: JMESPath expressions that find the fields of a row in records of any layout."""

import jmespath
from jmespath.exceptions import JMESPathError
from jmespath.visitor import TreeInterpreter

from rrhf_fast.data.checks import BadRow, Cell, listed, one_line, show

# Fields that may be mapped: those of a row, of a pair and of a row of one response.
NAMES = ("prompt", "responses", "scores", "sources")
NAMES += ("system", "tools", "chat_template_kwargs", "as_generated", "finish_reasons")
NAMES += ("chosen", "rejected", "score_chosen", "score_rejected")
NAMES += ("response", "score")
# Fields that may be null, provided that the record has the field that the path begins with.
OPTIONAL = ("sources", "system", "tools", "chat_template_kwargs", "finish_reasons")
# Nodes whose first child applies to the record; the other children apply to its result.
_FIRST_CHILD_ONLY = ("subexpression", "index_expression", "pipe")
_FIRST_CHILD_ONLY += ("projection", "filter_projection", "value_projection")


class _KeepNulls(TreeInterpreter):
    """JMESPath, but projections keep nulls: dropping one from `answers[].score` would shift later
    scores to the wrong responses."""

    def visit_projection(self, node: dict, value: object) -> list | None:
        base = self.visit(node["children"][0], value)
        if not isinstance(base, list):
            return None
        return [self.visit(node["children"][1], item) for item in base]

    def visit_filter_projection(self, node: dict, value: object) -> list | None:
        base = self.visit(node["children"][0], value)
        if not isinstance(base, list):
            return None
        _, then, condition = node["children"]
        kept = [item for item in base if self._is_true(self.visit(condition, item))]
        return [self.visit(then, item) for item in kept]

    def visit_value_projection(self, node: dict, value: object) -> list | None:
        base = self.visit(node["children"][0], value)
        if not isinstance(base, dict):
            return None
        return [self.visit(node["children"][1], item) for item in base.values()]


class Columns:
    """JMESPath expressions by field name."""

    def __init__(self, paths: dict[str, str]):
        """Raises ValueError for an unknown field or a path that is not JMESPath."""
        self.paths = paths
        self._parsed = {}
        for name, path in paths.items():
            if name not in NAMES:
                expected = f"expected one of {', '.join(NAMES)}"
                raise ValueError(f"columns: {name}: not a field of a row ({expected})")
            try:
                self._parsed[name] = jmespath.compile(path).parsed
            except (JMESPathError, RecursionError) as error:
                reason = one_line(str(error).partition(" for expression")[0]).rstrip(" ^,")
                raise ValueError(f"columns: {name}: {path!r} is not JMESPath ({reason})") from error
        self._interpreter = _KeepNulls()
        self.fields = set().union(*map(_fields, self._parsed.values()))

    def find(self, record: dict, where: str) -> dict:
        """Evaluate the paths. Returns values by field; raises BadRow if a path finds nothing."""
        is_csv = any(isinstance(value, Cell) for value in record.values())
        # Functions of JMESPath accept only plain strings.
        plain = {k: str(v) if isinstance(v, Cell) else v for k, v in record.items()}
        values = {}
        for name, parsed in self._parsed.items():
            try:
                value = self._interpreter.visit(parsed, plain)
            except (JMESPathError, TypeError, ValueError, AttributeError, RecursionError) as error:
                reason = one_line(error)
                problem = f"columns: {name}: {self.paths[name]!r} fails ({reason})"
                raise BadRow("path fails", where, problem) from error
            may_be_null = name in OPTIONAL and not _fields(parsed).isdisjoint(record)
            if _is_nothing(value) and not may_be_null:
                problem = f"columns: {name}: {self.paths[name]!r} finds nothing"
                problem += f"; found the fields {listed(list(record))}"
                raise BadRow("path finds nothing", where, problem)
            values[name] = _as_cells(value) if is_csv else value
        return values


def parse_paths(option: dict[str, str] | str | None) -> dict[str, str]:
    """Parse the option `columns`: a dict, or a string that YAML cannot parse because of brackets in
    a path, such as `{prompt: question, responses: answers[].text}`. Raises ValueError."""
    if not isinstance(option, str):
        return option or {}
    text = option.strip()
    if text[:1] != "{" or text[-1:] != "}":
        raise ValueError(f"columns: expected {{field: path, ...}}, found {show(option)}")
    paths = {}
    for part in filter(str.strip, _split(text[1:-1])):
        name, colon, path = part.partition(":")
        if not colon or not path.strip():
            raise ValueError(f"columns: expected {{field: path, ...}}, found {show(part.strip())}")
        paths[name.strip().strip("'\"")] = _unquoted(path.strip())
    return paths


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, None
    for letter in text:
        if quote:
            quote = None if letter == quote else quote
        elif letter in "'\"`":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _unquoted(path: str) -> str:
    is_quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    return path[1:-1] if is_quoted and path[0] not in path[1:-1] else path


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(item is None for item in value))


def _as_cells(value: object) -> object:
    if isinstance(value, list):
        return [_as_cells(item) for item in value]
    return Cell(value) if isinstance(value, str) else value


def _fields(parsed: dict) -> set[str]:
    """Return the fields of the record that a path begins with."""
    kind = parsed["type"]
    if kind == "field":
        return {parsed["value"]}
    children = [child for child in parsed.get("children", []) if isinstance(child, dict)]
    if kind in _FIRST_CHILD_ONLY:
        children = children[:1]
    return set() if kind == "expref" else set().union(*map(_fields, children))
