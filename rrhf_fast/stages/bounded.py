"""Limits on the time and memory of code that comes as text: templates and regular expressions can
run for ever."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

try:
    import resource
except ImportError:  # Windows
    resource = None

_PAGES = Path("/proc/self/statm")  # memory in use; Linux only
_HAS_PAGES = _PAGES.exists()
# Reading how much memory is in use takes as long as a short task, so it is done once for so many.
_TASKS_PER_READING = 32


class TooMuch(ValueError):
    """A limit was reached."""


class Limits:
    """Limits on a task, the content of a `with` block of this object. The timer is set once for all
    tasks in a block of `many`, because to set it takes as long as a short task does.

    Signals, and so the limit on time, work in the main thread only. The limit on memory would hold
    in all threads; it too is only set for tasks of the main one.

    Args:
        seconds: of processor time, up to one second more; needs a Unix. A single operation, such as
            a power of huge integers, is not interrupted.
        size: bytes of memory; needs Linux. What up to 32 tasks of a block leave behind counts too.

    Raises:
        TooMuch: at the limit, from within the task.
    """

    def __init__(self, seconds: int, size: int | None = None):
        self._seconds, self._size = seconds, size
        self._thread: int | None = None  # that has set the timer
        self._alone = contextlib.ExitStack()  # the block of a task that is in none
        self._is_running = False
        self._ticks = 0  # of the timer, one per second, since the task began
        self._number = 0  # of the task in its block
        self._within: tuple[int, int] | None = None  # RLIMIT_AS during a task
        self._before = (-1, -1)  # and otherwise

    @contextlib.contextmanager
    def many(self) -> Iterator[None]:
        """A block of tasks, each with limits of its own."""
        if self._thread is not None or not _can_be_timed():
            yield
            return
        before = signal.signal(signal.SIGVTALRM, self._tick)
        self._thread, self._number = threading.get_ident(), 0
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, 1, 1)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
            self._thread = None

    def __enter__(self) -> None:
        if self._thread is None and _can_be_timed():
            self._alone.enter_context(self.many())
        if self._thread != threading.get_ident():
            return
        if self._number % _TASKS_PER_READING == 0:
            self._read_memory()
        self._number += 1
        self._ticks, self._is_running = 0, True
        if self._within:
            resource.setrlimit(resource.RLIMIT_AS, self._within)

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self._thread != threading.get_ident():
            return
        self._is_running = False
        if self._within:
            resource.setrlimit(resource.RLIMIT_AS, self._before)
        self._alone.close()
        if self._within and isinstance(error, MemoryError):
            raise TooMuch(f"takes more than {self._size / 2**30:g} GiB of memory") from error

    def _tick(self, number: int, frame: FrameType | None) -> None:
        self._ticks += 1
        if self._is_running and self._ticks > self._seconds:
            raise TooMuch(f"takes more than {self._seconds} seconds")

    def _read_memory(self) -> None:
        """Find the limit on all memory that leaves a task its size from now on."""
        if self._size is None or not _HAS_PAGES:
            return
        soft, hard = self._before = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(_PAGES.read_bytes().split()[0]) * resource.getpagesize() + self._size
        self._within = (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard)


def _can_be_timed() -> bool:
    """Whether this is the main thread of a system that has the timer, as Windows has not."""
    has_timer = hasattr(signal, "setitimer") and hasattr(signal, "SIGVTALRM")
    return has_timer and threading.current_thread() is threading.main_thread()
