"""Small files, written whole or not at all; and what the system's errors say about a disk."""

import contextlib
import errno
import glob
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The machine's failures rather than the user's: a full disk, a quota, a read-only file system, a
# limit on file sizes, a broken disk, too many open files. EDQUOT is unknown to Windows.
_WRITING = {errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_ANY_USE = {errno.EIO, errno.EMFILE, errno.ENFILE}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put this file's name into the system's errors: those of write and fsync lack one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def disk_problem(error: BaseException | None) -> str | None:
    """What to report if the machine's storage is behind an error or its causes, else None.
    Libraries wrap the system's errors in their own, or only quote them."""
    while error is not None:
        text = "" if isinstance(error, ValueError) else str(error)  # that may quote anything
        quoted = (number for number in _WRITING if os.strerror(number) in text)
        number = error.errno if isinstance(error, OSError) else next(quoted, None)
        if number in _WRITING | _ANY_USE:
            name = getattr(error, "filename", None) or "a file"
            done = "written" if number in _WRITING else "read or written"
            return f"{name} could not be {done} ({os.strerror(number)})"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new hidden file beside `path` to write to; once the block ends it is synced and
    renamed to `path`.

    A crash at any moment leaves the earlier file or the new one, never half of it. What it leaves
    of the hidden file is removed by the next write to `path`.
    """
    with naming(path):
        _remove_leftovers(path)
        # A fresh name that nothing can wait at: neither a link to elsewhere nor another writer.
        staging = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.saving")
        handle = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl and fcntl.flock(handle, fcntl.LOCK_EX)
            yield staging
            os.fsync(handle)
            if fcntl is None:
                os.close(handle)  # Windows renames no open file
                handle = None
            os.replace(staging, path)
        except BaseException:
            with contextlib.suppress(OSError):
                staging.unlink()
            raise
        finally:
            if handle is not None:
                os.close(handle)
        sync_folder(path.parent)


def append(file: FileIO, data: bytes, *, sync: bool = False) -> None:
    """Append to an unbuffered file all of these bytes or, if the system refuses some, none."""
    size = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        if sync:
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def _prefix(path: Path) -> str:
    return f".{path.name[:48]}."  # a name may have 255 bytes


def _remove_leftovers(path: Path) -> None:
    """Remove the hidden files of writers of `path` that died."""
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}????????.saving"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the writer lives
            leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Make new and renamed files of the folder outlast a loss of power. Not all systems can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Replace a JSONL file in one step."""
    with replacing(path) as staging, staging.open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def to_json(value: Any, **options) -> str:
    """Strict JSON, with the `options` of json.dumps: what JSON lacks, NaN and infinity, becomes
    null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict:
    """Read the JSON object that a stage wrote. Raises ValueError, with the file's name, if it is
    damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (expected a JSON object)")
    return record
