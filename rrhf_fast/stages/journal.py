"""Work that survives `kill -9`: a journal of finished units beside the file that is being made.

Each finished unit of work is one line, appended and synced before the next begins. A line that a
crash tore has no newline, so it is dropped when the journal is read again and its unit is done
anew. The final file is made from the journal alone, in the order of the input, and moved into place
in one step. So wherever a run is cut off, running it again ends with the same file, as long as a
unit's result depends on nothing but its key and the options.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Journal:
    """Finished units of the file `output`, kept in `<output>.journal`; use it in a `with` block.

    done: results by key; every key and result is JSON.
    """

    def __init__(self, output: str | Path, fingerprint: str, *, overwrite: bool = False):
        """Open the journal, or begin one.

        Args:
            output: the final file.
            fingerprint: of everything that results depend on; a journal with another one is
                refused.
            overwrite: give up an earlier output, and an earlier journal.

        Raises:
            ValueError: the output is there already, another process is at work on it, the journal
                holds results of other options or is damaged, or this system has no file locks.
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
        lines = whole.splitlines()
        try:
            records = [json.loads(line) for line in lines]
            found = records[0]["fingerprint"] if records else None
            for record in records[1:]:
                if "forgotten" in record:
                    for key in record["forgotten"]:
                        del self.done[key]
                else:
                    self.done[record["key"]] = record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"output: {self.path} is damaged (delete it to start over)") from error
        if found is not None and found != fingerprint:
            if self.done:
                raise ValueError(
                    f"output: {self.path} is the unfinished work of a run with other options, "
                    "rows, models or reward function (repeat that run to finish it, or set "
                    "--overwrite true)"
                )
            # Nothing came of that run.
            self._check_output(overwrite)
            self._file.truncate(0)
            found = None
        if found is None:
            self._append({"fingerprint": fingerprint})

    def write(self, key: str, result: Any) -> None:
        """Keep a finished unit; on disk when this returns. Threads may call it at once."""
        with self._lock:
            assert key not in self.done, key
            self._append({"key": key, "result": result})
            self.done[key] = result

    def forget(self, keys: Iterable[str]) -> None:
        """Give up finished units that are of no use; they will be done again."""
        keys = list(keys)
        self._append({"forgotten": keys})
        for key in keys:
            del self.done[key]

    def _append(self, record: dict) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, rows: list[dict]) -> None:
        """Write the final file; the journal has served."""
        write_rows(self.output, rows)
        self.path.unlink()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, ValueError) and not self.done:
            self.path.unlink(missing_ok=True)  # a mistake, and nothing came of it
        self._file.close()


def fingerprint(*parts: Any) -> str:
    """A short name for JSON values: equal values have equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_json(path: Path) -> dict:
    """The object in a small file that a stage wrote. Raises ValueError, with its name, where it is
    damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (expected a JSON object)")
    return record


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSONL beside the target and move it into place: the file is never half-written."""
    staging = path.with_name(path.name + ".saving")
    with staging.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
