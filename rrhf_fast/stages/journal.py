"""Work that survives `kill -9`: a journal of finished units beside the output file.

Each finished unit is one line, appended and synced before the next begins. A line torn by a crash
has no newline, or NULs where bytes did not reach the disk; as the last line it is dropped, and its
unit is redone. The output is built from the journal alone, in input order, and renamed into place;
the journal's removal is the last change that a run makes. An interrupted run that is repeated
therefore ends with the same file, provided that a unit's result depends only on its key and the
options.

Several ranks are dealt the units in turn. Each appends to a journal of its own, its shard, which
the first one moves into its journal: when all have finished, or at the next start, whatever the
number of ranks then.
"""

import errno
import hashlib
import json
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from rrhf_fast.stages.ending import is_on_all_ranks
from rrhf_fast.stages.files import append, disk_problem, naming, sync_folder, write_rows
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import Ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# How the first line begins.
_FIRST = b'{"fingerprint": "'
# Seconds until the file of another host is seen: a file system may remember that it was not there.
_UNSEEN = 30.0


class Journal:
    """Finished units of the file `output`, kept in `<output>.journal`, and by ranks other than the
    first in `<output>.journal.<rank>`; use it in a `with` block.

    done: results by key; keys and results are JSON. Ranks other than the first have only those that
    they wrote since the last `share`.
    """

    def __init__(
        self,
        output: str | Path,
        fingerprint: str,
        *,
        ranks: Ranks | None = None,
        overwrite: bool = False,
        accepts: Callable[[str, Any], bool] = lambda key, result: True,
    ):
        """Open the journal, or create it. All ranks must call.

        Args:
            output: the final file.
            fingerprint: of everything that results depend on; a journal with another fingerprint is
                refused.
            ranks: those that share the work; default this process alone.
            overwrite: discard an earlier output or journal.
            accepts: whether a key's result, read from the journal, is one that the stage writes.

        Raises:
            ValueError: the output exists, another process is writing it, the journal is damaged or
                holds results of other options, this system has no file locks, or the ranks do not
                see the same folder.
        """
        if fcntl is None:
            problem = "this system has no file locks, which keep two runs from writing one file"
            raise ValueError(f"output: {problem} (use Linux, macOS or WSL)")
        self.output, self.path = Path(output), _path(output)
        self.ranks = ranks or Ranks()
        if not self.ranks.is_first:
            self.path = Path(f"{self.path}.{self.ranks.rank}")
        self.done: dict[str, Any] = {}
        self._fingerprint, self._accepts = fingerprint, accepts
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        try:
            self.ranks.first(lambda: self._begin(overwrite))
            # Keys that need not be dealt: they are done, or were dealt before.
            self._dealt = set(self.ranks.once(lambda: list(self.done)))
            if self.ranks.size > 1:
                self._meet()
        except BaseException:
            self._close(useless=not self.ranks.is_first)
            raise

    def _begin(self, overwrite: bool) -> None:
        """Open the first rank's journal and read what is there, cut off a torn line, and write the
        first one if need be; then move shards of an earlier run into it."""
        self._file = self._open(overwrite)
        size, earlier = (0, None) if overwrite else self._read(self.path, self._replay)
        if earlier not in (None, self._fingerprint):
            self._refuse_others(self.path, len(self.done))
            size = 0
        if size == 0:  # no results recorded
            self._check_output(overwrite)
        with naming(self.path):
            self._file.truncate(size)
        if size == 0:
            self._append({"fingerprint": self._fingerprint})
            sync_folder(self.path.parent)
        for path in _shards(self.path):
            self._absorb(path, drop=overwrite)
        if self.done:
            parts = "part" if len(self.done) == 1 else "parts"
            say(f"resuming: {self.path} holds {len(self.done):,} finished {parts} of the work")

    def _open(self, overwrite: bool) -> FileIO:
        """Create or open the first rank's journal and lock it."""
        if not self.path.exists():
            self._check_output(overwrite)
        while True:
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritable(error) from error
            file = self._open_locked(self.path, "ab+")
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
            file.close()  # the process that held the lock has finished and removed the file
            self._check_output(overwrite)

    def _open_locked(self, path: Path, mode: str) -> FileIO:
        try:
            file = FileIO(path, mode, opener=_regular)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            problem = f"{path} cannot be locked ({error.strerror})"
            if isinstance(error, BlockingIOError):
                problem = f"another process is writing {self.output}"
            raise ValueError(f"output: {problem}") from error
        return file

    def _unwritable(self, error: OSError) -> Exception:
        if disk_problem(error):
            return error
        problem = "its journal is a link" if self.path.is_symlink() else error.strerror
        by = "" if self.ranks.is_first else f" by rank {_named(self.ranks.rank)}"
        return ValueError(f"output: {self.output} cannot be written{by} ({problem})")

    def _check_output(self, overwrite: bool) -> None:
        if self.output.exists() and not overwrite:
            raise ValueError(
                f"output: {self.output} exists already (choose another, or set --overwrite true)"
            )

    def _refuse_others(self, path: Path, num_results: int) -> None:
        """Refuse a journal of other options, unless it holds nothing."""
        if num_results:
            raise ValueError(
                f"output: {path} holds the unfinished work of a run with other options, rows, "
                "models or reward function (repeat that run to finish it, or set --overwrite true)"
            )

    def _meet(self) -> None:
        """Create the shards, and make sure that the first rank sees them: without a shared folder
        the work would be lost."""
        with self.ranks.together():
            if not self.ranks.is_first:
                self._file = self._new_shard()
        names = self.ranks.gather((self.path.name, _named(self.ranks.rank)))

        def check() -> None:
            for shard, name in names[1:]:
                if not _appears(self.output.parent / shard):
                    expected = "ranks need one folder that all of them see"
                    raise ValueError(
                        f"output: {self.output} is in another folder for rank {name} than for "
                        f"rank {names[0][1]} ({expected})"
                    )

        self.ranks.first(check)

    def _new_shard(self) -> FileIO:
        _appears(self.path.parent)
        file = self._open_locked(self.path, "xb+")
        try:
            self._append({"fingerprint": self._fingerprint}, file)
        except BaseException:
            file.close()
            raise
        return file

    def _read(self, path: Path, take: Callable[[dict, bytes], None]) -> tuple[int, str | None]:
        """Call `take` with each record and its line; returns the bytes of all complete lines, and
        the fingerprint."""
        size, earlier, number = 0, None, 0
        try:
            for number, line in enumerate(_lines(path), 1):
                record = _parse(line)
                if number == 1:
                    earlier = _first(record)
                else:
                    take(record, line)
                size += len(line)
        except _Damaged as problem:
            cure = "remove that line to redo its unit, or the file to start over"
            raise ValueError(
                f"output: {path} is damaged at line {number} ({problem}; "
                f"{cure if number > 1 else 'remove the file to start over'})"
            ) from None
        return size, earlier

    def _replay(self, record: dict, _: bytes = b"") -> None:
        """Take one record's results into `done`, or out of it."""
        if record.keys() == {"key", "result"} and isinstance(record["key"], str):
            key, result = record["key"], record["result"]
            if key in self.done:
                raise _Damaged(f"a second result for {key}")
            if not self._accepts(key, result):
                raise _Damaged(f"a result for {key} that this stage does not write")
            self.done[key] = result
        elif record.keys() == {"forgotten"} and isinstance(record["forgotten"], list):
            for key in record["forgotten"]:
                if not isinstance(key, str) or key not in self.done:
                    raise _Damaged("forgets what it does not hold")
                del self.done[key]
        else:
            raise _Damaged("not a record of a journal")

    def _absorb(self, path: Path, *, drop: bool = False) -> int:
        """Move a shard's results into this journal and remove the shard; or `drop` them. Returns
        how many it holds."""
        new, count = [], 0

        def take(record: dict, line: bytes) -> None:
            nonlocal count
            count += 1
            key = record.get("key")
            # Unless a crash came between its move and the removal of the shard.
            if not (
                isinstance(key, str)
                and key in self.done
                and record == {"key": key, "result": self.done[key]}
            ):
                self._replay(record)
                new.append(line)

        with self._open_locked(path, "rb"):
            if not drop:
                _, earlier = self._read(path, take)
                if earlier != self._fingerprint:
                    self._refuse_others(path, len(new))
                with naming(self.path):
                    append(self._file, b"".join(new), sync=True)
            path.unlink()
        return count

    def has(self, key: str) -> bool:
        """Whether this unit is done or dealt; ranks agree."""
        return key in self._dealt

    def mine(self, keys: Iterable[str]) -> list[str]:
        """Deal those keys that are not done to the ranks; returns this one's. All ranks must call,
        with the same keys."""
        missing = [key for key in keys if key not in self._dealt]
        self._dealt.update(missing)
        return self.ranks.share(missing)

    def share(self) -> None:
        """Bring the results of all ranks to the first one. All ranks must call."""
        if self.ranks.size == 1:
            return
        mine = None
        if not self.ranks.is_first and self._file is not None:
            mine = self.path.name, len(self.done)
            self._file.close()  # which makes other hosts see all of it
            self._file = None
        shards = self.ranks.gather(mine)

        def absorb() -> None:
            for shard, num_results in filter(None, shards):
                path = self.output.parent / shard
                if (found := self._absorb(path)) != num_results:
                    raise ValueError(f"output: {path} holds {found} of {num_results} results")

        self.ranks.first(absorb)
        if not self.ranks.is_first:
            self.done.clear()

    def write(self, key: str, result: Any) -> None:
        """Record a finished unit; synced to disk on return. Threads may call it concurrently."""
        with self._lock:
            assert key not in self.done, key
            if self._file is None:
                self._file = self._new_shard()
            self._append({"key": key, "result": result})
            self.done[key] = result

    def forget(self, keys: Iterable[str]) -> None:
        """Discard useless results; their units will be redone. On the first rank, after `share`."""
        keys = list(keys)
        self._append({"forgotten": keys})
        for key in keys:
            del self.done[key]
        self._dealt.difference_update(keys)

    def _append(self, record: dict, file: FileIO | None = None) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with naming(self.path):
            append(file or self._file, line, sync=True)

    def finish(self, rows: Iterable[dict]) -> None:
        """Write the final file, then delete the journal. On the first rank, after `share`."""
        write_rows(self.output, rows)
        self.path.unlink()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None = None, *_) -> None:
        # A mistake in the options; no results recorded.
        useless = kind is not None and issubclass(kind, ValueError) and not self.done
        useless &= self.ranks.size == 1 or (error is not None and is_on_all_ranks(error))
        self._close(useless or not (self.ranks.is_first or self.done))

    def _close(self, useless: bool) -> None:
        if self._file is not None:
            if useless:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def is_finished(output: str | Path) -> bool:
    """Whether a stage has written this file and removed its journal. A kill between the two leaves
    both, and the stage, called again, removes the journal."""
    return Path(output).exists() and not _path(output).exists()


def is_usage(value: object) -> bool:
    """Whether these are counts of tokens by name, as stages journal them."""
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _path(output: str | Path) -> Path:
    return Path(f"{output}.journal")


def _shards(path: Path) -> list[Path]:
    """What other ranks left beside the journal of the first."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9]+")
    return sorted(other for other in path.parent.iterdir() if pattern.fullmatch(other.name))


def _named(rank: int) -> str:
    return f"{rank} on host {socket.gethostname()}"


def _appears(path: Path) -> bool:
    """Whether a file or folder that another host made is there, or soon."""
    give_up = time.monotonic() + _UNSEEN
    while not path.exists():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.1)
    return True


def _lines(path: Path) -> Iterator[bytes]:
    """All lines but a torn one at the end."""
    with naming(path), path.open("rb") as file:
        for number, line in enumerate(file):
            if (b"\0" in line or not line.endswith(b"\n")) and not file.peek(1):
                # The first line is torn only if it begins as ours does.
                written = line.rstrip(b"\n").rstrip(b"\0")
                if number or written[: len(_FIRST)] == _FIRST[: len(written)]:
                    return
            yield line


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


def fingerprint(*parts: Any, rows: Iterable[Any] = ()) -> str:
    """Hash JSON values, and then `rows` of them one by one: equal values have equal
    fingerprints."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for row in rows:
        digest.update(b"\n" + json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:32]
