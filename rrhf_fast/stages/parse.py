"""Options of a command line and of files as a config, and the page that --help prints."""

import argparse
import inspect
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import partial, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionParser, ArgumentParser, DefaultHelpFormatter

from rrhf_fast.stages.options import REMOVED, check, check_names, limits

Config = TypeVar("Config")

_EPILOG = (
    "Lists are written [a, b]; --OPTION+ VALUE appends to one. "
    "Write null for an option that is not set."
)
# Options that jsonargparse adds and explains otherwise.
_HELP = {
    "print_config": "Print the value of every option as YAML, a file for --config, and exit.",
    "train": "YAML file of options of the trainer, --train.OPTION.",
}
_OF_EVERY_COMMAND = ("--help", "--config", "--print_config")


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of descriptions, which are commands, and adds no Python types to options."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(text.strip(), indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: Action) -> str:
        text = super()._format_action_invocation(action)
        is_list = any(option.endswith("+") for option in action.option_strings)
        return text.partition(", ")[0] if is_list else text  # the epilog tells of --OPTION+

    def _get_help_string(self, action: Action) -> str:
        return _HELP.get(action.dest, action.help)


def parse_config(
    config_class: type[Config],
    arguments: list[str] | None = None,
    name: str = "train",
    description: str | None = None,
) -> Config:
    """Options of the command line (default: this process's) as a config.

    Raises:
        ArgumentError: an option without a value, or a value without an option.
        ValueError: an option that there is not, a value of the wrong type or out of range, or a
            file of options that cannot be read as such.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _check_command_line(config_class, arguments)
    _check_files(config_class, arguments)
    usage = f"python -m rrhf_fast.{name} [--config FILE] [--OPTION VALUE ...]"
    parser = _Parser(usage=usage, description=description, epilog=_EPILOG)
    parser.add_argument(
        "--config", action="config", metavar="FILE",
        help="YAML file of options, `option: value`. Options after it take precedence.",
    )  # fmt: skip
    _add_options(parser, config_class)
    options = parser.parse_args(arguments).clone(with_meta=False).as_dict()
    _read_keys(options, config_class, arguments)
    for field in fields(config_class):
        if field.default is field.default_factory is MISSING and options[field.name] is None:
            raise ValueError(f"{field.name}: missing")
    config = config_class(**{f.name: options[f.name] for f in fields(config_class)})
    check(config)
    return config


def _read_keys(options: dict, config_class: type, arguments: list[str]) -> None:
    """Read VALUE of --NAME.KEY VALUE as YAML where NAME is a mapping, or a list of configs and KEY
    is not a text: jsonargparse leaves a string. Quoted values elsewhere stay strings."""
    words = iter(arguments)
    for word in words:
        name, has_value, text = word.partition("=")
        if not name.startswith("--") or "." not in name:
            continue
        text = text if has_value else next(words, "")
        *path, key = name.removeprefix("--").split(".")
        place, kind, is_item = options, config_class, False
        for part in path:
            kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
            place = place.get(part) if isinstance(place, dict) else None
            if get_origin(kind) is list and isinstance(place, list) and place:
                place, kind, is_item = place[-1], get_args(kind)[0], True
        wants = get_type_hints(kind).get(key, str) if is_item and is_dataclass(kind) else kind
        if wants in (str, str | None) or not (is_item or kind is dict):
            continue
        if isinstance(place, dict) and place.get(key) == text:
            place[key] = yaml.safe_load(text)


_Parser = partial(
    ArgumentParser,
    formatter_class=_HelpFormatter,
    exit_on_error=False,
    allow_abbrev=False,  # a later option could change what an abbreviation means
)


def _add_options(parser: ArgumentParser, config_class: type, prefix: str = "") -> None:
    """Add a group of options for each class that the config inherits fields from, its own first.
    Types are checked later, by `check`: here a value that cannot be converted stays as it is."""
    for name in REMOVED:  # files may hold them
        parser.add_argument(f"--{name}", type=Any, default=SUPPRESS, help=SUPPRESS)
    for title, options in _groups(config_class):
        group = parser.add_argument_group(prefix + title)
        for name, kind, default, text in options:
            if is_dataclass(kind):
                inner = _Parser()
                _add_options(inner, kind, f"--{name}: ")
                group.add_argument(f"--{name}", action=ActionParser(inner))
                continue
            group.add_argument(
                f"--{name}",
                type=_bare(kind) | Any,
                default=default,
                metavar=_metavar(kind),
                help=text,
            )
            if get_origin(kind) is list and is_dataclass(item := get_args(kind)[0]):
                parser.add_argument_group(f"Each item of --{name}", _page(item))


def _groups(config_class: type) -> Iterator[tuple[str, list[tuple]]]:
    """Title, and name, annotation, default and explanation of each option, of each class that the
    config inherits fields from, its own first."""
    kinds, seen = get_type_hints(config_class, include_extras=True), set()
    for owner in config_class.__mro__:
        names = [name for name in inspect.get_annotations(owner) if name not in seen]
        seen |= set(names)
        if names:
            docs = docstring_parser.parse_from_object(owner).params
            docs = {param.arg_name: param.description for param in docs}
            options = []
            for name in names:
                default = _default(config_class.__dataclass_fields__[name])
                text = _help(docs.get(name, ""), kinds[name], default)
                options.append((name, kinds[name], default, text))
            yield owner.__doc__.strip().rstrip("."), options


def _page(config_class: type) -> str:
    """The options of a config that stands in a list."""
    lines = [
        f"{name} {_metavar(kind)}: {' '.join(text.split())}"
        for _, options in _groups(config_class)
        for name, kind, _, text in options
    ]
    return "\n".join(textwrap.fill(line, 90, subsequent_indent="    ") for line in lines)


def _default(field: Field) -> Any:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(default, list):
        return [asdict(item) if is_dataclass(item) else item for item in default]
    return None if default is MISSING else default


def _bare(kind: Any) -> Any:
    """An annotation as jsonargparse reads it: without limits, and mappings for configs."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _bare(args[0])
    if origin in (Union, UnionType):
        return reduce(or_, map(_bare, args))
    if origin is list:
        return list[_bare(args[0])]
    if origin is Literal:
        return kind | str  # Any would make False of "no"
    return dict if is_dataclass(kind) else kind


def _metavar(kind: Any) -> str:
    """What to write behind an option, such as INT|auto."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _metavar(args[0])
    if origin in (Union, UnionType):
        return "|".join(_metavar(option) for option in args if option is not NoneType)
    if origin is Literal:
        return f"{{{','.join(args)}}}" if len(args) > 1 else args[0]
    if origin is list:
        return f"[{_metavar(args[0])},...]"
    if origin is dict or kind is dict or is_dataclass(kind):
        return "{NAME: VALUE,...}"
    return {bool: "{true,false}", str: "TEXT"}.get(kind, kind.__name__.upper())


def _help(text: str, kind: Any, default: Any) -> str:
    """The docstring of an option, with its limits and its default."""
    details = [", ".join(limits(kind))] if limits(kind) else []
    if isinstance(default, str | int | float):
        details.append(f"default: {str(default).lower() if default is bool(default) else default}")
    return f"{text} ({'; '.join(details)})" if details else text


def _check_command_line(config_class: type, arguments: list[str]) -> None:
    """Raise ValueError where a word that begins with -- is no option."""
    for word in arguments:
        name = word.partition("=")[0]
        # With a space it is a value.
        if name.startswith("--") and " " not in name and name not in _OF_EVERY_COMMAND:
            name = name.removeprefix("--").removesuffix("+")
            check_names(config_class, {name: None}, "", dotted=True)


def _check_files(config_class: type, arguments: list[str]) -> None:
    """Raise ValueError, with the file's name, where a --config file holds no options of this
    command."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    for file in map(Path, finder.parse_known_args(arguments)[0].config):
        try:
            options = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"config: {file}: cannot be read ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else file
            problem = getattr(error, "problem", None) or error
            raise ValueError(f"config: {where}: not YAML ({problem})") from error
        if not isinstance(options, dict):
            found = "nothing" if options is None else f"{options!r:.80}"
            raise ValueError(f"config: {file}: expected lines of `option: value`, found {found}")
        check_names(config_class, options, f"config: {file}: ", dotted=True)
