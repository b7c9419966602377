"""Signals that end a run: after the step at hand, never in the middle of an update."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rrhf_fast.train.distributed import World


class Signals:
    """SIGTERM, SIGUSR1 and SIGHUP (with several ranks also Ctrl-C, which one rank cannot obey
    alone) ask the loop to stop after the step at hand. On a single rank Ctrl-C raises
    KeyboardInterrupt, deferred between `hold` and `release`: a half-applied update would corrupt
    the model."""

    def __init__(self, world: World):
        self.stop = False
        self._alone = world.size == 1
        self._names = [signal.SIGTERM]
        if hasattr(signal, "SIGUSR1"):  # not on Windows
            self._names.append(signal.SIGUSR1)
        # nohup ignores it.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._names.append(signal.SIGHUP)
        # Leave Ctrl-C alone where a background job ignores it or a notebook handles it.
        if not self._alone or signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._names.append(signal.SIGINT)
        self._held = self._interrupted = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # signals arrive nowhere else
            self._before = {name: signal.signal(name, self._handle) for name in self._names}
        return self

    def __exit__(self, *_):
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def hold(self) -> None:
        """Defer Ctrl-C until `release`."""
        self._held = True

    def release(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed since `hold`."""
        self._held = False
        if self._interrupted:
            raise KeyboardInterrupt

    def _handle(self, number: int, _) -> None:
        if number != signal.SIGINT or not self._alone:
            self.stop = True
        elif self._held:
            self._interrupted = True
        else:
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C inside: a second one must not lose what the first one saves."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals arrive elsewhere
        return
    before = signal.signal(signal.SIGINT, lambda *_: print("saving, please wait", flush=True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
