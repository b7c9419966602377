"""The page that --help prints: every option with its explanation, its limits and its default."""

import argparse
import inspect
import textwrap
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from rrhf_fast.stages.options import limits

_EPILOG = (
    "Lists are written [a, b]; --OPTION+ VALUE appends to one. A switch may stand alone:\n"
    "--OPTION is --OPTION true. Write null for an option that is not set."
)


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of descriptions, which are commands, and breaks no word at a hyphen."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(text.strip(), indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def help_page(config_class: type, name: str, description: str | None) -> str:
    """The page of the command `name`."""
    usage = f"python -m rrhf_fast.{name} [--config FILE] [--OPTION VALUE ...]"
    page = ArgumentParser(
        usage=usage, description=description, epilog=_EPILOG, formatter_class=_HelpFormatter
    )
    add = partial(page.add_argument, default=SUPPRESS)
    add(
        "--config", metavar="FILE",
        help="YAML file of options, `option: value`. Options after it take precedence.",
    )  # fmt: skip
    add(
        "--print_config", action="store_true",
        help="Print the value of every option as YAML, a file for --config, and exit.",
    )  # fmt: skip
    _add_options(page, config_class)
    return page.format_help()


def _add_options(page: ArgumentParser, config_class: type, prefix: str = "") -> None:
    """Add a group of options for each class that the config inherits fields from, its own first."""
    for title, options in groups(config_class):
        group = page.add_argument_group(f"--{prefix.rstrip('.')}: {title}" if prefix else title)
        for name, kind, _, text in options:
            if is_dataclass(kind):
                page.add_argument(
                    f"--{name}", metavar="FILE",
                    help=f"YAML file of options of the trainer, --{name}.OPTION.",
                )  # fmt: skip
                _add_options(page, kind, f"{name}.")
                continue
            text = text.replace("%", "%%")
            group.add_argument(f"--{prefix}{name}", metavar=_metavar(kind), help=text)
            if get_origin(kind) is list and is_dataclass(item := get_args(kind)[0]):
                page.add_argument_group(f"Each item of --{name}", _page(item))


def groups(config_class: type) -> Iterator[tuple[str, list[tuple]]]:
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
                default = default_of(config_class.__dataclass_fields__[name])
                text = _help(docs.get(name, ""), kinds[name], default)
                options.append((name, kinds[name], default, text))
            yield owner.__doc__.strip().rstrip("."), options


def _page(config_class: type) -> str:
    """The options of a config that stands in a list."""
    lines = [
        f"{name} {_metavar(kind)}: {' '.join(text.split())}"
        for _, options in groups(config_class)
        for name, kind, _, text in options
    ]
    return "\n".join(textwrap.fill(line, 90, subsequent_indent="    ") for line in lines)


def default_of(field: Field) -> Any:
    """The default of an option as plain data; None if it has none."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(default, list):
        return [asdict(item) if is_dataclass(item) else item for item in default]
    return None if default is MISSING else default


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
