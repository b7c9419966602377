"""Run a command: errors as one line, and the exit code."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.ending import PREEMPTED, fail, how_to_resume
from rrhf_fast.stages.files import disk_problem
from rrhf_fast.stages.launcher import is_first, launched
from rrhf_fast.stages.links import RankLost
from rrhf_fast.stages.loading import own_process
from rrhf_fast.stages.outlet import Outlet
from rrhf_fast.stages.parse import Config, parse_config

# What a name that the user gave leads to; any other failure of the system has reasons outside.
_OF_NAMES = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived; its argument is the signal."""


def run_command(
    name: str,
    description: str,
    config_class: type[Config],
    run: Callable[[Config], int],
    arguments: list[str] | None = None,
    *,
    many_processes: bool = True,
    preempted_by: Collection[str] = ("SIGUSR1",),
) -> int:
    """Parse the options and run; returns the exit code: that of `run`, 2 for a mistake in options
    or data (a ValueError, or a file that cannot be used), 1 if memory, disk or system fail, 130 for
    Ctrl-C, 143 and 129 for SIGTERM and SIGHUP. The signals of `preempted_by`, and among several
    ranks all of these, end it with 75, so that a cluster queues it again. A launcher of several
    processes is refused unless the command shares its work among `many_processes`. What cannot be
    printed stops nothing."""
    out = Outlet(sys.stdout)
    with redirect_stdout(out), redirect_stderr(Outlet(sys.stderr)):
        try:
            code = _ending(
                name, description, config_class, run, arguments, many_processes, preempted_by
            )
        except SystemExit:  # of --help
            code = None
        out.flush()
        if not code and out.problem is not None:
            return fail(name, f"standard output: {out.problem}", 1)
        if code is None:
            raise SystemExit(0)
        return code


def _ending(
    name: str,
    description: str,
    config_class: type[Config],
    run: Callable[[Config], int],
    arguments: list[str] | None,
    many_processes: bool,
    preempted_by: Collection[str],
) -> int:
    """Run the command and say how it ended, on one line; returns the exit code."""
    config = None
    try:
        size = launched().size
        if not many_processes and size > 1:
            raise ValueError(
                f"this command is one process, but WORLD_SIZE is {size}: "
                f"start it by python -m rrhf_fast.{name}, not by torchrun or srun"
            )
        with _stopped_by_signals(alone=size == 1):
            config = parse_config(config_class, arguments, name, description)
            return run(config)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if problem := disk_problem(error):
            return fail(name, _of_the_disk(problem, error, config), 1)
        if isinstance(error, ValueError):
            return fail(name, error, 2)
        if isinstance(error, OSError):
            is_name = isinstance(error, _OF_NAMES)
            is_name |= error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
            problem = f"{_where(error, config)}{error.strerror or one_line(error)}"
            return fail(name, problem, 2 if is_name else 1)
        if isinstance(error, RankLost):
            return fail(name, f"{error}; {how_to_resume(config)}", 1)
        problem = _lack_of_memory(error)
        if problem is None:
            raise
        has_batch = hasattr(config_class, "batch_size")
        return fail(name, f"{problem}{': lower --batch_size' if has_batch else ''}", 1)
    except Stopped as error:
        number = error.args[0]
        code = PREEMPTED if number.name in preempted_by else 128 + number
        return fail(name, f"stopped by {number.name}", code)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130) if is_first() else 130
    except SystemExit as error:  # --help ends so, and so does code that others wrote
        if config is None:
            raise
        return fail(name, f"something that was called ended the process (SystemExit {error})", 1)


def _where(error: OSError, config: object) -> str:
    """The file that the error is about, and the option that named it or a folder around it."""
    if not isinstance(error.filename, str | os.PathLike):
        return ""
    path = os.fspath(error.filename)
    values = vars(config).items() if config is not None else ()
    texts = {name: value for name, value in values if isinstance(value, str) and value}
    named = [name for name, text in texts.items() if path.startswith((text, os.path.abspath(text)))]
    return f"{named[0]}: {path}: " if named else f"{path}: "


def _lack_of_memory(error: Exception) -> str | None:
    """The problem, if the error says that there is too little memory."""
    if isinstance(error, MemoryError):
        return f"out of memory ({one_line(error)})" if str(error) else "out of memory"
    text = str(error)
    # torch's type by its name: torch loads slowly. The CPU's allocator has no type of its own.
    if type(error).__name__ == "OutOfMemoryError":
        return text.partition(". ")[0]
    if "DefaultCPUAllocator" in text:
        return f"out of memory ({one_line(text.rpartition(': ')[2])})"
    return None


@contextmanager
def _stopped_by_signals(*, alone: bool) -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP and SIGUSR1 raise `Stopped` where they would have ended the process
    without a word. Among several ranks they end the process at once: one that waits for the others
    would not end otherwise."""

    own = os.getpid()

    def stop(number: int, _) -> None:
        if os.getpid() != own:  # a child that was forked, as multiprocessing does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not alone:
            os._exit(PREEMPTED)
        raise Stopped(signal.Signals(number))

    names = ("SIGTERM", "SIGHUP", "SIGUSR1")
    names = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has one
    if threading.current_thread() is not threading.main_thread():
        names = []
    names = [name for name in names if signal.getsignal(name) == signal.SIG_DFL]
    try:
        for name in names:
            signal.signal(name, stop)
        yield
    finally:
        for name in names:
            signal.signal(name, signal.SIG_DFL)


def _of_the_disk(problem: str, error: Exception, config: object) -> str:
    """The line for what `disk_problem` found behind an error."""
    if str(error).startswith("data_cache_dir"):  # nothing was begun
        return f"{error}; choose another by --data_cache_dir or RRHF_FAST_CACHE"
    if isinstance(error, ValueError):  # it names option and file
        problem = str(error)
    else:
        problem = f"{'output' if hasattr(config, 'output') else 'output_dir'}: {problem}"
    return f"{problem}; {how_to_resume(config)}" if config is not None else problem


def leave(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`. With several ranks it ends at once: a failed
    rank that waits for the others, which wait for it, keeps the launcher from ending the job."""
    own_process()
    try:
        code = main()
    except BaseException as error:
        if _is_alone() or not isinstance(error, SystemExit | Exception):
            raise
        if not isinstance(error, SystemExit):  # of --help
            traceback.print_exc()
        code = (error.code or 0) if isinstance(error, SystemExit) else 1
    _drop_output_nobody_reads()
    if _is_alone():
        sys.exit(code)
    os._exit(code)


def _is_alone() -> bool:
    """Whether this is the only process; known once `main` has run, which adopts tasks of srun."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _drop_output_nobody_reads() -> None:
    """Flush; where a stream is closed or its reader gone, point it to nowhere, since Python's own
    flush at the end would complain."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1 if stream is sys.stdout else 2)
