"""Output that cannot end a run, nor control a terminal: what a stream cannot print is lost, but not
the work."""

import errno
import os
from typing import Any, TextIO

from rrhf_fast.data.checks import visible_lines
from rrhf_fast.stages.launcher import is_first


def say(text: str) -> None:
    """Print lines for the user, once however many ranks there are; what a terminal would obey in
    them is written out."""
    if is_first():
        print(visible_lines(text), flush=True)


class Outlet:
    """A stream in the place of stdout or stderr. Letters that its encoding lacks are escaped; after
    its reader is gone (as of `| head`), or someone closed it, what is written is dropped."""

    def __init__(self, stream: TextIO | None):
        # None: the descriptor was closed when Python started.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.problem: str | None = None  # why output was lost, unless nobody reads it

    def write(self, text: str) -> int:
        """Write as much as can be written; returns the length of the text."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush, if there is anywhere to flush to."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def close(self) -> None:
        """Nothing: the run still needs it."""

    def _lost(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EBADF):
            self.problem = error.strerror

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
