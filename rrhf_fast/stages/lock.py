"""One run per folder: a lock that ends with its process and says who holds it.

The holder has `folder/.lock` locked (flock) and its name in it, {"host", "pid", "started"}. Hosts
that do not see each other's locks see its sign of life: the file's time, renewed every 20 seconds.
"""

import atexit
import contextlib
import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rrhf_fast.data.checks import one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
# Seconds between two signs of life; without any, after which a holder elsewhere is taken for dead,
# by the clock of the file system, or by watching: clocks of hosts may differ.
_BEAT, _SILENCE, _WATCH = 20.0, 300.0, 90.0
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# A link could lead to a file of someone else, and opening a pipe could wait for ever.
_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextmanager
def locked(folder: str | Path, option: str = "output_dir") -> Iterator[None]:
    """Inside, no other process has the lock of this folder; this process may take it repeatedly.

    The folder is created, and removed again if nothing was put in it. One that cannot be created or
    written needs no lock: whatever writes there says why it cannot.

    Raises:
        ValueError: another process holds the lock, and nothing in the folder was touched.
    """
    # The process is part of the key: a forked child does not have its parent's lock.
    key = os.getpid(), os.path.realpath(folder)
    with _guard:
        lock = _held.get(key) or _Lock(Path(key[1], LOCK_FILE))
        lock.count += 1
        _held[key] = lock
        if lock.count == 1:
            try:
                lock.take(f"{option}: {folder}")
            except BaseException:
                lock.count = 0
                del _held[key]
                raise
    try:
        yield
    finally:
        with _guard:
            lock.count -= 1
            if lock.count == 0 and key[0] == os.getpid() and _held.get(key) is lock:
                del _held[key]
                lock.release()


def when_released(folder: str | Path, action: Callable[[], object]) -> None:
    """Call `action` once this process does not hold the folder's lock: the last sign of a run that
    was cut off goes after the lock, or a kill between the two would leave a lock alone. Its OSError
    is ignored."""
    with _guard:
        if lock := _held.get((os.getpid(), os.path.realpath(folder))):
            lock.actions.append(action)
            return
    with contextlib.suppress(OSError):
        action()


@dataclass
class _Lock:
    path: Path
    count: int = 0  # of `with` blocks inside
    file: int | None = None  # descriptor; None where the folder cannot be written
    made: list[Path] = field(default_factory=list)  # folders, deepest first
    actions: list[Callable[[], object]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def take(self, who: str) -> None:
        """Create and lock the file; the folder's, if need be, first. `who` begins messages."""
        self.released.clear()
        for _ in range(1000):
            try:
                self._make_folder()
                file, is_new = self._open(who)
            except (FileNotFoundError, FileExistsError):  # removed by its holder between two calls
                continue
            except OSError:  # not writable
                return
            try:
                if not self._is_won(file, is_new, who):
                    continue
                text = {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
                with contextlib.suppress(OSError):  # on a full disk it has no name
                    os.write(file, json.dumps(text).encode())
                self.file, file = file, None
                break
            finally:
                if file is not None:
                    os.close(file)
        else:
            if self.path.parent.is_dir():
                raise ValueError(f"{who}: {self.path} cannot be created")
            return
        threading.Thread(target=self._live, name="lock", daemon=True).start()

    def release(self) -> None:
        """Remove the file, then unlock it: removed later, it could be another's."""
        self.released.set()
        if self.file is not None:
            with contextlib.suppress(OSError):
                if fcntl is None:  # an open file cannot be removed there
                    os.close(self.file)
                    self.path.unlink()
                elif self._is_at_path(self.file):
                    self.path.unlink()
            if fcntl is not None:
                os.close(self.file)
            self.file = None
        for action in self.actions:
            with contextlib.suppress(OSError):
                action()
        with contextlib.suppress(OSError):  # gone already
            for folder in self.made:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _make_folder(self) -> None:
        folder = self.path.parent
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.made = self.made or missing

    def _open(self, who: str) -> tuple[int, bool]:
        """The file's descriptor, and whether this call created it."""
        with contextlib.suppress(FileExistsError):
            return os.open(self.path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            return os.open(self.path, _FLAGS), False
        except FileNotFoundError:
            raise
        except OSError as error:
            problem = f"{self.path} cannot be opened ({error.strerror})"
            raise ValueError(f"{who}: {problem}; remove it if no run writes there") from error

    def _is_won(self, file: int, is_new: bool, who: str) -> bool:
        """Whether this process holds the open file's lock; False to try again. Raises ValueError
        if another process holds it."""
        is_free = flock(file)
        if is_free is not False and not self._is_at_path(file):
            return False
        if is_new and is_free is not False:
            return True
        holder = _Holder.of(file, f"{who}: {self.path}")
        refusal = holder.refusal(is_free)
        if refusal and holder.is_known_by_signs(is_free) and not self._shows_life(holder):
            refusal = None
        if refusal:
            # Where flock works, a dead process holds nothing.
            dead = "" if is_free is False else f"; if that run is dead, remove {self.path}"
            hint = f"(wait for it, or choose another{dead})"
            raise ValueError(f"{who} is being written by {refusal} {hint}")
        if holder.is_elsewhere:
            print(f"note: {self.path} of {holder} is taken over: no sign of life")
        with contextlib.suppress(OSError):  # gone already
            self.path.unlink()
        return False

    def _shows_life(self, holder: "_Holder") -> bool:
        """Watch for the next sign of life of a holder elsewhere."""
        how = f"watching for the next for {_WATCH:.0f} s; if that run is dead, remove the file"
        print(f"note: {self.path}: {holder}'s last sign of life is {holder.age} old; {how}")
        seen, end = self._time(), time.monotonic() + _WATCH
        while self._time() == seen and time.monotonic() < end:
            time.sleep(min(1.0, _WATCH))
        return self._time() not in (seen, None)

    def _time(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _live(self) -> None:
        while not self.released.wait(_BEAT):
            file = self.file
            with contextlib.suppress(OSError):
                if file is not None and self._is_at_path(file):  # not one who took it over
                    os.utime(self.path)


@dataclass
class _Holder:
    """Who a lock file names. All fields may be unknown: it is empty until its holder writes it."""

    silence: float  # seconds since its last sign of life
    host: str = ""
    pid: int = 0
    started: str = ""

    @classmethod
    def of(cls, file: int, what: str) -> "_Holder":
        """Read an open lock file. Raises ValueError if it is something else."""
        status = os.fstat(file)
        text = os.read(file, 4096) if stat.S_ISREG(status.st_mode) else b"?"
        holder = cls(time.time() - status.st_mtime)
        if not text:
            return holder
        try:
            entries = json.loads(text)
            host, pid, started = entries["host"], entries["pid"], entries["started"]
        except (ValueError, TypeError, KeyError, RecursionError):
            host, start = None, b'{"host": "'
            if text[: len(start)] == start[: len(text)] and b"}" not in text:
                return holder  # killed while it wrote
        if not isinstance(host, str) or type(pid) is not int or not isinstance(started, str):
            raise ValueError(f"{what} is not a lock of rrhf_fast (remove it if it is useless)")
        return cls(holder.silence, host, pid, started)

    @property
    def is_elsewhere(self) -> bool:
        return self.host not in ("", socket.gethostname())

    @property
    def age(self) -> str:
        return f"{self.silence / 60:.0f} minutes" if self.silence > 99 else f"{self.silence:.0f} s"

    def __str__(self) -> str:
        if not self.host:
            return "another process"
        return f"process {self.pid} on host {one_line(self.host, 80)}"

    def is_known_by_signs(self, is_free: bool | None) -> bool:
        """Whether only the file's time can tell if the holder is alive."""
        unseen = self.is_elsewhere or (is_free is None and (not self.host or fcntl is None))
        return unseen and is_free is not False

    def refusal(self, is_free: bool | None) -> str | None:
        """Who holds the lock, or None if nobody does. `is_free`: as `flock` says."""
        since = f"{self} since {one_line(self.started, 40)}" if self.host else str(self)
        if is_free is False:
            return since
        if self.is_known_by_signs(is_free):
            return f"{self}, which shows signs of life" if self.silence < _SILENCE else None
        return since if is_free is None and _is_running(self.pid) else None


def flock(file: int) -> bool | None:
    """Lock an open file. Returns False if another process has, None if there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


_held: dict[tuple[int, str], _Lock] = {}
# Reentrant: collecting garbage can release a lock inside.
_guard = threading.RLock()


@atexit.register
def _release_all() -> None:
    """Locks of objects that were never closed."""
    for (pid, _), lock in list(_held.items()):
        if pid == os.getpid():
            lock.release()
    _held.clear()
