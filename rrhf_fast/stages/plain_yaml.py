"""YAML as plain data: texts, numbers, booleans, lists and mappings. Nothing in it runs or repeats.

Other loaders read more than a file of options needs: tags that name Python objects, aliases that
grow a page to gigabytes, 1:30 as 90, 010 as 8, and the second of two equal keys.
"""

import copy
import re

import yaml

# Characters of a text, and of the data when its aliases are filled in.
MOST = 2**20
_DEEPEST = 50

_WORDS = {word: None for word in ("", "~", "null")}
_WORDS |= dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
_WORDS = {
    form(word): value for word, value in _WORDS.items() for form in (str, str.title, str.upper)
}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")


class NotPlain(ValueError):
    """A text that is not YAML, or holds more than plain data. `line` counts from 1; None: none."""

    def __init__(self, problem: str, line: int | None = None):
        super().__init__(problem)
        self.line = line


def load(text: str) -> object:
    """The data in a YAML document; None if it is empty. Names in mappings are always texts. Raises
    NotPlain."""
    if len(text) > MOST:
        raise NotPlain(f"more than {MOST} characters")
    if hidden := re.search("[\ud800-\udfff]", text):
        raise NotPlain("not valid Unicode", text.count("\n", 0, hidden.start()) + 1)
    try:
        return _Document(text).read()
    except yaml.reader.ReaderError as error:
        line = text.encode()[: error.position].count(b"\n") + 1
        raise NotPlain(f"not YAML ({error.reason})", line) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        raise NotPlain(f"not YAML ({problem})", mark and mark.line + 1) from error


class _Document:
    """Builds the data from the parser's events, which come one at a time: a text nested a million
    times is refused before the parser has read it."""

    def __init__(self, text: str):
        self._events = yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self._left = MOST
        self._anchors: dict[str, tuple[object, int] | None] = {}  # value and size; None: unfinished

    def read(self) -> object:
        values = []
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if values:
                    raise _at(event, "expected one document, found another")
                values.append(self._value(self._next(), 0))
        return values[0] if values else None

    def _next(self) -> yaml.Event:
        return next(self._events)

    def _value(self, event: yaml.Event, depth: int) -> object:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        if depth > _DEEPEST:
            raise _at(event, f"nested more than {_DEEPEST} times")
        before = self._left
        if event.anchor:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            self._spend(event, len(event.value) + 1)
            value = _scalar(event)
        else:
            if event.tag not in (None, "!"):
                raise _at(event, f"{event.tag}: tags are not read")
            self._spend(event, 1)
            read = self._list if isinstance(event, yaml.SequenceStartEvent) else self._mapping
            value = read(depth + 1)
        if event.anchor:
            self._anchors[event.anchor] = value, before - self._left
        return value

    def _alias(self, event: yaml.AliasEvent, depth: int) -> object:
        known = self._anchors.get(event.anchor)
        if known is None:
            where = "within what it names" if event.anchor in self._anchors else "of nothing"
            raise _at(event, f"*{event.anchor}: an alias {where}")
        value, size = known
        self._spend(event, size)
        if depth + _height(value) > _DEEPEST:
            raise _at(event, f"nested more than {_DEEPEST} times, with its aliases filled in")
        return copy.deepcopy(value)  # so that a change to one changes no other

    def _spend(self, event: yaml.Event, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _at(event, f"more than {MOST} characters, with its aliases filled in")

    def _list(self, depth: int) -> list:
        items = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._value(event, depth))
        return items

    def _mapping(self, depth: int) -> dict:
        own, merged = {}, {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _at(event, "expected a name, found a list, a mapping or an alias")
            name = self._value(event, depth)
            name = name if isinstance(name, str) else event.value  # 1, on and null are names here
            value = self._value(self._next(), depth)
            if name == "<<" and event.implicit[0]:
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        raise _at(event, "<<: expected a mapping, or a list of them")
                    merged = part | merged
                continue
            if name in own:
                raise _at(event, f"{name}: given twice")
            own[name] = value
        return merged | own


def _scalar(event: yaml.ScalarEvent) -> object:
    text = event.value
    if event.tag is not None and event.tag not in _TEXT_TAGS:
        raise _at(event, f"{event.tag}: tags are not read")
    if event.implicit[0]:  # plain, without a tag
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > 400:
                raise _at(event, f"a number of {len(text)} digits")
            return int(text.replace("_", ""), 0)
        if _FLOAT.fullmatch(text):
            text = text.replace("_", "").lower()
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        return text
    try:  # JSON writes an emoji as two escapes
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise _at(event, "half of a surrogate pair") from error


def _height(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_height, inner), default=0)


def _at(event: yaml.Event, problem: str) -> NotPlain:
    return NotPlain(problem, event.start_mark.line + 1)
