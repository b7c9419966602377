"""What every command shares: options from a config class, one-line errors, exit codes."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

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
    """Options of the command line (default: this process's) as a config; raises ArgumentError."""
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
    options = parser.parse_args(arguments).as_dict()
    options.pop("config")
    return config_class(**options)


def run_command(
    name: str,
    description: str,
    config_class: type[Config],
    run: Callable[[Config], int],
    arguments: list[str] | None = None,
) -> int:
    """Parse and run; returns the exit code: that of `run`, 2 for a mistake in options or data (a
    ValueError), 130 for Ctrl-C."""
    try:
        return run(parse_config(config_class, arguments, name, description))
    except (ArgumentError, ValueError) as error:
        # A mistake is nearly always every rank's, and the first rank's line says it: the launcher
        # then ends the others while they wait.
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(10)
        return fail(name, error, 2)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)


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
