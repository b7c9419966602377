"""What every command shares: options from a config class, one-line errors, exit codes."""

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, TypeVar

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    set_parsing_settings,
)

Config = TypeVar("Config")

# EX_TEMPFAIL of sysexits.h: try again later.
PREEMPTED = 75


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of the description, which are commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.strip()


def parse_config(
    config_class: type[Config],
    arguments: list[str] | None = None,
    name: str = "train",
    description: str | None = None,
) -> Config:
    """Options of the command line (default: this process's) as a config.

    Raises:
        ArgumentError: an option that there is not, or a value of the wrong type.
        ValueError: a file of options that cannot be read as such.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"python -m rrhf_fast.{name}",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,  # a later option could change what an abbreviation means
    )
    parser.add_argument("--config", action="config", help="YAML file of options.")
    parser.add_class_arguments(config_class)
    _check_files(config_class, arguments)
    try:
        options = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        no_list = re.search(r"\"(\w+)\":\s+Expected a <class 'list'>. Got value: (.*)", str(error))
        if no_list is None:
            raise
        option, value = no_list.groups()
        problem = f"{option}: expected a list, [{value}], found {value}"
        raise ValueError(problem) from error
    options.pop("config")
    return config_class(**options)


def _check_files(config_class: type, arguments: list[str] | None) -> None:
    """Raise ValueError, with the file's name, where a --config file holds no options of this
    command."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    names = {field.name for field in fields(config_class)}
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
            found = "nothing" if options is None else repr(options)[:80]
            raise ValueError(f"config: {file}: expected lines of `option: value`, found {found}")
        for name in map(str, options):
            if name.partition(".")[0] not in names:
                near = get_close_matches(name, names, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"config: {file}: {name}: no such option{hint}")


def run_command(
    name: str,
    description: str,
    config_class: type[Config],
    run: Callable[[Config], int],
    arguments: list[str] | None = None,
    *,
    many_processes: bool = False,
) -> int:
    """Parse and run; returns the exit code: that of `run`, 2 for a mistake in options or data (a
    ValueError), 1 where the device's memory does not suffice, 130 for Ctrl-C. A launcher of several
    processes is refused, unless the command shares its work among `many_processes`."""
    try:
        if not many_processes and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"this command is one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}: "
                f"start it by python -m rrhf_fast.{name}, not by torchrun"
            )
        return run(parse_config(config_class, arguments, name, description))
    except (ArgumentError, ValueError) as error:
        # A mistake is nearly always every rank's, and the first rank's line says it: the launcher
        # then ends the others while they wait.
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(10)
        return fail(name, error, 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by its name: torch loads slowly
            raise
        problem, has_batch = str(error).partition(". ")[0], hasattr(config_class, "batch_size")
        return fail(name, f"{problem}{': lower --batch_size' if has_batch else ''}", 1)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)


def go_on(config: object) -> str:
    """What to do after a stage stopped half-way: the work that is done is kept."""
    how = ", without --overwrite" if config.overwrite else ""
    return f"what is done is kept: run the same command again{how}"


def fail(name: str, problem: object, code: int) -> int:
    """Print the problem as one line; returns the exit code."""
    print(f"rrhf_fast.{name}: error: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


def leave(main: Callable[[], int]) -> NoReturn:
    """End the process with main's exit code. One of several ranks that failed does so at once:
    waiting for the others, who wait for it, would keep the launcher from ending the job."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(main())
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
