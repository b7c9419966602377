"""Work that survives `kill -9`: a journal of finished units beside the output file.

Each finished unit is one line, appended and synced before the next begins. A line torn by a crash
has no newline, or NULs where bytes did not reach the disk; as the last line it is dropped, and its
unit is redone. The output is built from the journal alone, in input order, and renamed into place;
the journal's removal is the last change that a run makes. An interrupted run that is repeated
therefore ends with the same file, provided that a unit's result depends only on its key and the
options.
"""

import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from rrhf_fast.stages.files import append, disk_problem, naming, sync_folder, write_rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# How the first line begins.
_FIRST = b'{"fingerprint": "'


class Journal:
    """Finished units of the file `output`, kept in `<output>.journal`; use it in a `with` block.

    done: results by key; keys and results are JSON.
    """

    def __init__(
        self,
        output: str | Path,
        fingerprint: str,
        *,
        overwrite: bool = False,
        accepts: Callable[[str, Any], bool] = lambda key, result: True,
    ):
        """Open the journal, or create it.

        Args:
            output: the final file.
            fingerprint: of everything that results depend on; a journal with another fingerprint is
                refused.
            overwrite: discard an earlier output or journal.
            accepts: whether a key's result, read from the journal, is one that the stage writes.

        Raises:
            ValueError: the output exists, another process is writing it, the journal is damaged or
                holds results of other options, or this system has no file locks.
        """
        if fcntl is None:
            problem = "this system has no file locks, which keep two runs from writing one file"
            raise ValueError(f"output: {problem} (use Linux, macOS or WSL)")
        self.output, self.path = Path(output), _path(output)
        self.done: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._file = self._open(overwrite)
        try:
            self._begin(fingerprint, overwrite, accepts)
        except BaseException:
            self._file.close()
            raise

    def _open(self, overwrite: bool) -> FileIO:
        """Create or open the journal and lock it."""
        if not self.path.exists():
            self._check_output(overwrite)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(self.path, "ab+", opener=_regular)
        except OSError as error:
            if disk_problem(error):
                raise
            problem = "its journal is a link" if self.path.is_symlink() else error.strerror
            raise ValueError(f"output: {self.output} cannot be written ({problem})") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
        except OSError as error:
            file.close()
            problem = f"{self.path} cannot be locked ({error.strerror})"
            if isinstance(error, BlockingIOError):
                problem = f"another process is writing {self.output}"
            raise ValueError(f"output: {problem}") from error
        file.close()  # the process that held the lock has finished and removed the file
        return self._open(overwrite)

    def _check_output(self, overwrite: bool) -> None:
        if self.output.exists() and not overwrite:
            raise ValueError(
                f"output: {self.output} exists already (choose another, or set --overwrite true)"
            )

    def _begin(self, fingerprint: str, overwrite: bool, accepts: Callable) -> None:
        """Read what is there, cut off a torn line, and write the first one if need be."""
        size, earlier = (0, None) if overwrite else self._read(accepts)
        if earlier not in (None, fingerprint):
            if self.done:
                raise ValueError(
                    f"output: {self.path} holds the unfinished work of a run with other options, "
                    "rows, models or reward function (repeat that run to finish it, or set "
                    "--overwrite true)"
                )
            size = 0
        if size == 0:  # no results recorded
            self._check_output(overwrite)
        with naming(self.path):
            self._file.truncate(size)
        if size == 0:
            self._append({"fingerprint": fingerprint})
            sync_folder(self.path.parent)

    def _read(self, accepts: Callable[[str, Any], bool]) -> tuple[int, str | None]:
        """Fill `done`; returns the bytes of all complete lines, and the fingerprint."""
        size, earlier, number = 0, None, 0
        try:
            for number, line in enumerate(self._lines(), 1):
                record = _parse(line)
                if number == 1:
                    earlier = _first(record)
                else:
                    self._replay(record, accepts)
                size += len(line)
        except _Damaged as problem:
            cure = "remove that line to redo its unit, or the file to start over"
            raise ValueError(
                f"output: {self.path} is damaged at line {number} ({problem}; "
                f"{cure if number > 1 else 'remove the file to start over'})"
            ) from None
        return size, earlier

    def _lines(self) -> Iterator[bytes]:
        """All lines but a torn one at the end."""
        with naming(self.path), self.path.open("rb") as file:
            for number, line in enumerate(file):
                if (b"\0" in line or not line.endswith(b"\n")) and not file.peek(1):
                    # The first line is torn only if it begins as ours does.
                    written = line.rstrip(b"\n").rstrip(b"\0")
                    if number or written[: len(_FIRST)] == _FIRST[: len(written)]:
                        return
                yield line

    def _replay(self, record: dict, accepts: Callable[[str, Any], bool]) -> None:
        """Take one record's results into `done`, or out of it."""
        if record.keys() == {"key", "result"} and isinstance(record["key"], str):
            key, result = record["key"], record["result"]
            if key in self.done:
                raise _Damaged(f"a second result for {key}")
            if not accepts(key, result):
                raise _Damaged(f"a result for {key} that this stage does not write")
            self.done[key] = result
        elif record.keys() == {"forgotten"} and isinstance(record["forgotten"], list):
            for key in record["forgotten"]:
                if not isinstance(key, str) or key not in self.done:
                    raise _Damaged("forgets what it does not hold")
                del self.done[key]
        else:
            raise _Damaged("not a record of a journal")

    def write(self, key: str, result: Any) -> None:
        """Record a finished unit; synced to disk on return. Threads may call it concurrently."""
        with self._lock:
            assert key not in self.done, key
            self._append({"key": key, "result": result})
            self.done[key] = result

    def forget(self, keys: Iterable[str]) -> None:
        """Discard useless results; their units will be redone."""
        keys = list(keys)
        self._append({"forgotten": keys})
        for key in keys:
            del self.done[key]

    def _append(self, record: dict) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with naming(self.path):
            append(self._file, line, sync=True)

    def finish(self, rows: list[dict]) -> None:
        """Write the final file, then delete the journal."""
        write_rows(self.output, rows)
        self.path.unlink()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, ValueError) and not self.done:
            self.path.unlink(missing_ok=True)  # a mistake in the options; no results recorded
        self._file.close()


def is_finished(output: str | Path) -> bool:
    """Whether a stage has written this file and removed its journal. A kill between the two leaves
    both, and the stage, called again, removes the journal."""
    return Path(output).exists() and not _path(output).exists()


def is_usage(value: object) -> bool:
    """Whether these are counts of tokens by name, as stages journal them."""
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _path(output: str | Path) -> Path:
    return Path(f"{output}.journal")


def _regular(path: str, flags: int) -> int:
    """Open a file, though not one of someone else that a link leads to, and no pipe."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "its journal is not a file")
    return handle


class _Damaged(Exception):
    """What is wrong with a line."""


def _parse(line: bytes) -> dict:
    def refuse(name: str):
        raise _Damaged(f"{name}, which JSON lacks")

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            raise _Damaged("a repeated name")
        return record

    try:
        record = json.loads(line.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _Damaged("not JSON") from error
    if not isinstance(record, dict):
        raise _Damaged("not a JSON object")
    return record


def _first(record: dict) -> str:
    """The fingerprint in the first line."""
    if record.keys() != {"fingerprint"} or not isinstance(record["fingerprint"], str):
        raise _Damaged("no journal of rrhf_fast begins so")
    return record["fingerprint"]


def fingerprint(*parts: Any) -> str:
    """Hash JSON values: equal values have equal fingerprints."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
