"""Work that survives `kill -9`: a journal of finished units beside the output file.

Each finished unit is one line, appended and synced before the next begins. A line torn by a crash
has no newline, so reading drops it and its unit is redone. The output is built from the journal
alone, in input order, and renamed into place. An interrupted run that is repeated therefore ends
with the same file, provided that a unit's result depends only on its key and the options.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rrhf_fast.stages.files import write_rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Journal:
    """Finished units of the file `output`, kept in `<output>.journal`; use it in a `with` block.

    done: results by key; keys and results are JSON.
    """

    def __init__(self, output: str | Path, fingerprint: str, *, overwrite: bool = False):
        """Open the journal, or create it.

        Args:
            output: the final file.
            fingerprint: of everything that results depend on; a journal with another fingerprint is
                refused.
            overwrite: discard an earlier output or journal.

        Raises:
            ValueError: the output exists, another process is writing it, the journal is damaged or
                holds results of other options, or this system has no file locks.
        """
        if fcntl is None:
            problem = "this system has no file locks, which keep two runs from writing one file"
            raise ValueError(f"output: {problem} (use Linux, macOS or WSL)")
        self.output, self.path = Path(output), Path(f"{output}.journal")
        self.done: dict[str, Any] = {}
        self._lock = threading.Lock()
        if not self.path.exists():
            self._check_output(overwrite)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ValueError(f"output: {output} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"output: another process is writing {output}") from error
        self._read(fingerprint, overwrite)

    def _check_output(self, overwrite: bool) -> None:
        if self.output.exists() and not overwrite:
            raise ValueError(
                f"output: {self.output} exists already (choose another, or set --overwrite true)"
            )

    def _read(self, fingerprint: str, overwrite: bool) -> None:
        if overwrite:
            self._file.truncate(0)
        self._file.seek(0)
        whole, _, torn = self._file.read().rpartition(b"\n")
        if torn:
            self._file.truncate(len(whole) + 1 if whole else 0)
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            earlier = records[0]["fingerprint"] if records else None
            for record in records[1:]:
                if "forgotten" in record:
                    for key in record["forgotten"]:
                        del self.done[key]
                else:
                    self.done[record["key"]] = record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"output: {self.path} is damaged (delete it to start over)") from error
        if earlier not in (None, fingerprint):
            if self.done:
                raise ValueError(
                    f"output: {self.path} holds the unfinished work of a run with other options, "
                    "rows, models or reward function (repeat that run to finish it, or set "
                    "--overwrite true)"
                )
            # No results recorded.
            self._check_output(overwrite)
            self._file.truncate(0)
        if earlier != fingerprint:
            self._append({"fingerprint": fingerprint})

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
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

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


def fingerprint(*parts: Any) -> str:
    """Hash JSON values: equal values have equal fingerprints."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
