"""Run a command: errors as one line, and the exit code."""

import os
import sys
import time
import traceback
from argparse import ArgumentError
from collections.abc import Callable
from typing import NoReturn

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.parse import Config, parse_config

# EX_TEMPFAIL of sysexits.h: try again later.
PREEMPTED = 75


def run_command(
    name: str,
    description: str,
    config_class: type[Config],
    run: Callable[[Config], int],
    arguments: list[str] | None = None,
    *,
    many_processes: bool = False,
) -> int:
    """Parse the options and run; returns the exit code: that of `run`, 2 for a mistake in options
    or data (a ValueError), 1 if the device runs out of memory, 130 for Ctrl-C. A launcher of
    several processes is refused unless the command shares its work among `many_processes`."""
    try:
        if not many_processes and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"this command is one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}: "
                f"start it by python -m rrhf_fast.{name}, not by torchrun"
            )
        return run(parse_config(config_class, arguments, name, description))
    except (ArgumentError, ValueError) as error:
        # Nearly always every rank makes the same mistake. The first one reports it, and the
        # launcher then ends the others while they wait.
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


def how_to_resume(config: object) -> str:
    """What to do after a stage stopped half-way, for its error line."""
    how = ", without --overwrite" if config.overwrite else ""
    return f"what is done is kept: run the same command again{how}"


def fail(name: str, problem: object, code: int) -> int:
    """Print the problem as one line; returns the exit code."""
    print(f"rrhf_fast.{name}: error: {one_line(problem, None)}", file=sys.stderr)
    return code


def leave(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`. With several ranks it ends at once: a failed
    rank that waits for the others, which wait for it, keeps the launcher from ending the job."""
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
