"""Options of a command line and of files as a config."""

import re
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rrhf_fast.data.checks import printed, visible_lines
from rrhf_fast.stages import plain_yaml
from rrhf_fast.stages.help import default_of, groups, help_page
from rrhf_fast.stages.options import REMOVED, check, check_names, describe, fits

Config = TypeVar("Config")

# How names of files of options end.
_OF_OPTIONS = (".yaml", ".yml", ".json")
# Words that take no value.
_ALONE = {"-h": "help", "--help": "help", "--print_config": "print_config"}


def parse_config(
    config_class: type[Config],
    arguments: list[str] | None = None,
    name: str = "train",
    description: str | None = None,
) -> Config:
    """Options of the command line (default: this process's) as a config.

    Values are plain data, wherever they stand: none names a class or a module to load.

    Raises:
        ValueError: an option that there is not, an option without a value or a value without an
            option, a value of the wrong type or out of range, or a file of options that cannot be
            read as such.
    """
    words = list(_words(config_class, sys.argv[1:] if arguments is None else arguments))
    if ("help", None) in words:
        print(help_page(config_class, name, description), end="")
        raise SystemExit(0)
    options: dict = {}
    for option, text in words:
        if option == "config":
            _add_file(options, config_class, text)
        elif option != "print_config":
            path, read = option.removesuffix("+").split("."), partial(_read, text, name=option)
            _set(options, config_class, path, read, option.endswith("+"))
    needed = [f.name for f in fields(config_class) if f.default is f.default_factory is MISSING]
    missing = [name for name in needed if options.get(name) is None]
    if ("print_config", None) in words:
        config = config_class(**dict.fromkeys(missing) | options)
        print(_as_yaml(config), end="")
        raise SystemExit(0)
    if missing:
        raise ValueError(f"{missing[0]}: missing")
    config = config_class(**options)
    check(config)
    return config


def _words(config_class: type, arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """The options of a command line with their values; None for those that take none."""
    words = deque(arguments)
    while words:
        word = words.popleft()
        if word in _ALONE:
            yield _ALONE[word], None
            continue
        name, has_value, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            hint = f" (a file of options: --config {word})" if word.endswith(_OF_OPTIONS) else ""
            raise ValueError(f"{word}: expected --OPTION VALUE{hint}")
        if name != "config":
            check_names(config_class, {name.removesuffix("+"): None}, "", dotted=True)
        if not has_value:
            follows = bool(words) and not re.fullmatch(r"--\w[^\s]*", words[0])
            if not follows and _is_switch(config_class, name):
                text = "true"
            elif not follows:
                raise ValueError(f"{name}: expected a value, found {words[0] if words else 'none'}")
            else:
                text = words.popleft()
        yield name, text


def _is_switch(config_class: type, name: str) -> bool:
    """Whether an option, perhaps one within another, is true or false: alone it means true."""
    kind = config_class
    for part in name.split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return bool in _parts(kind)


def _set(
    options: dict,
    config_class: type,
    path: list[str],
    read: Callable[[Any], object],
    is_item: bool = False,
) -> None:
    """Set an option, or one within it, to what `read` makes of its type; add an item to a list."""
    name, *rest = path
    if name in REMOVED:
        return
    kind = get_type_hints(config_class, include_extras=True).get(name)
    if kind is None:
        raise ValueError(f"{name}: no such option")
    before = options.get(name, default_of(config_class.__dataclass_fields__[name]))
    if rest:
        _set_within(options, name, kind, before, rest, read, is_item)
        return
    value = read(kind)
    if is_item:
        items = before if isinstance(before, list) else [] if before is None else [before]
        value = [*items, *(value if isinstance(value, list) else [value])]
    if not (is_dataclass(kind) and isinstance(value, dict)):
        options[name] = value
        return
    for key, item in value.items():
        _set(options.setdefault(name, {}), kind, key.split("."), lambda _, item=item: item)


def _set_within(
    options: dict,
    name: str,
    kind: Any,
    before: Any,
    rest: list[str],
    read: Callable[[Any], object],
    is_item: bool,
) -> None:
    """`_set` for --NAME.REST: in a config, in the last config of a list, or in a mapping."""
    inner = get_args(kind)[0] if get_origin(kind) is list else None
    if is_dataclass(kind):
        place = options.setdefault(name, {})
        if not isinstance(place, dict):
            raise ValueError(f"{name}: expected {describe(kind)}, found {printed(place)}")
        _set(place, kind, rest, read, is_item)
    elif is_dataclass(inner):
        options[name] = before
        if not (isinstance(before, list) and before and isinstance(before[-1], dict)):
            raise ValueError(f"{name}.{'.'.join(rest)}: {name} holds nothing to set it in")
        _set(before[-1], inner, rest, read, is_item)
    else:
        (mapping,) = [part for part in _parts(kind) if dict in (part, get_origin(part))] or [None]
        if mapping is None or is_item:
            raise ValueError(f"{name}.{'.'.join(rest)}: no such option")
        place = options[name] = dict(before) if isinstance(before, dict) else {}
        for key in rest[:-1]:
            place[key] = dict(place[key]) if isinstance(place.get(key), dict) else {}
            place = place[key]
        place[rest[-1]] = read(get_args(mapping)[1] if get_args(mapping) else Any)


def _parts(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _read(text: str, kind: Any, *, name: str) -> object:
    """A word of the command line as a value of the type: YAML, or the text itself where the type
    has texts. Raises ValueError for a text that cannot be read."""
    if is_dataclass(kind) and not text.lstrip().startswith("{"):
        return _file_of_options(text, kind, f"{name}: ")
    parts, takes_text = _parts(kind), kind is Any or fits(text, kind)
    if NoneType in parts and text in ("null", "~"):
        return None
    if takes_text and all(part in (str, NoneType) or get_origin(part) is Literal for part in parts):
        return text
    try:
        value = plain_yaml.load(text)
    except plain_yaml.NotPlain as error:
        if takes_text:
            return text
        raise ValueError(f"{name}: {error}") from error
    if is_dataclass(kind) and isinstance(value, dict):
        check_names(kind, value, f"{name}.", dotted=True)
    if not (kind is Any or fits(value, kind)):  # it is refused later, as what was meant
        return value if isinstance(value, list | dict) or type(value) in (int, float) else text
    is_text = takes_text and kind is not Any and not isinstance(value, list | dict)
    return text if is_text else value


def _add_file(options: dict, config_class: type, file: str) -> None:
    for name, value in _file_of_options(file, config_class, "config: ").items():
        _set(options, config_class, name.split("."), lambda _, value=value: value)


def _file_of_options(file: str, config_class: type, where: str) -> dict:
    """The options in a file, by name. Raises ValueError, beginning with `where` and the file, if it
    is too large, is not YAML, or holds no options of the config class."""
    try:
        if not stat.S_ISREG(Path(file).stat().st_mode):
            # Others may have no end, and a folder is none.
            raise IsADirectoryError(None, "not a file")
        with open(file, "rb") as stream:
            data = stream.read(plain_yaml.MOST + 1)
        options = plain_yaml.load(data.decode("utf-8-sig"))
    except plain_yaml.NotPlain as error:
        line = f":{error.line}" if error.line else ""
        raise ValueError(f"{where}{file}{line}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}{file}: not YAML (not UTF-8 at byte {error.start})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{where}{file}: cannot be read ({reason})") from error
    if not isinstance(options, dict):
        actual = "nothing" if options is None else printed(options)
        raise ValueError(f"{where}{file}: expected lines of `option: value`, found {actual}")
    check_names(config_class, options, f"{where}{file}: ", dotted=True)
    return options


def _as_yaml(config: object) -> str:
    dump = partial(yaml.safe_dump, _in_order(config), sort_keys=False)
    text = dump(allow_unicode=True)
    return text if visible_lines(text) == text else dump(allow_unicode=False)


def _in_order(value: object) -> object:
    """A config as a mapping, its options in the order of --help."""
    if isinstance(value, list):
        return [_in_order(item) for item in value]
    if not is_dataclass(value):
        return value
    names = [name for _, options in groups(type(value)) for name, *_ in options]
    return {name: _in_order(getattr(value, name)) for name in names}
