"""Log metrics to metrics.jsonl, and to the trackers that `report_to` names."""

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.files import append, disk_problem, naming
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.trackers import Tracker, open_tracker


class MetricsLog:
    """Writes each record to every destination. A record is a flat dict of numbers with a "step"."""

    def __init__(self, output_dir: Path, config: TrainConfig, *, writes: bool = True):
        """Without `writes` (on all ranks but the first) records are only kept in memory. Raises
        ValueError if a tracker in `report_to` is not installed."""
        self.records: list[dict] = []
        names = config.report_to if writes else []
        self._trackers = {name: open_tracker(name, output_dir, config) for name in names}
        self._path, self._file, self._writes = output_dir / "metrics.jsonl", None, writes

    def resume(self, length: int) -> None:
        """Continue after the first `length` bytes of the file; records written after the checkpoint
        are dropped. Damaged lines stay in the file and are not read. Raises ValueError if it is no
        file that can be read and written."""
        lines = cut(self._path, length, writes=self._writes)
        records = [_record(line) for line in lines]
        self.records = [record for record in records if record is not None]
        if not self._writes or not self._path.exists():
            return
        if damaged := len(records) - len(self.records):
            print(f"warning: {damaged} of {len(records)} lines of {self._path} are damaged")
        self._file = FileIO(self._path, "ab")

    def write(self, record: dict) -> None:
        """Append one record and flush it, so that a kill of this process does not lose it.
        Non-finite numbers become null. Raises OSError, with the file's name."""
        record = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self.records.append(record)
        if not self._writes:
            return
        with naming(self._path):
            if self._file is None:  # replaces an earlier run's, but not before the first record
                self._file = FileIO(self._path, "ab")
                self._file.truncate(0)
            append(self._file, json.dumps(record, allow_nan=False).encode() + b"\n")
        numbers = {k: v for k, v in record.items() if k != "step" and v is not None}
        self._tell(lambda tracker: tracker.log(numbers, record["step"]))

    def show(self, samples: list[dict], step: int) -> None:
        """Give the trackers a table of samples, dicts with the same keys."""
        self._tell(lambda tracker: tracker.show(samples, step))

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        """Give each tracker something. One that fails, since its server is gone perhaps, does not
        end the run: it is left out from here on."""
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # of a client, of any type
                if disk_problem(error):
                    raise
                del self._trackers[name]
                with suppress(Exception):
                    tracker.finish()
                problem = f"{name} failed ({one_line(error)}) and gets no more of this run"
                left = f"{self._path} has everything"
                print(f"warning: report_to: {problem}; {left}", file=sys.stderr, flush=True)


def cut(path: Path, length: int, *, writes: bool = True) -> list[bytes]:
    """Cut a file of lines (without `writes`, only what is read of it) to its first `length` bytes,
    and to whole lines; returns these. A missing file has none. Raises ValueError if it is no file
    that can be read and written."""
    try:
        if path.is_symlink():  # to a file of someone else, perhaps
            raise ValueError(f"output_dir: {path} is a link, expected a file")
        if not path.exists():
            return []
        kept, _, _ = path.read_bytes()[:length].rpartition(b"\n")
        lines = kept.split(b"\n") if kept else []
        if writes:
            os.truncate(path, sum(len(line) + 1 for line in lines))
    except OSError as error:
        problem = f"{path} cannot be continued ({error.strerror})"
        raise ValueError(f"output_dir: {problem}") from error
    return lines


def _record(line: bytes) -> dict | None:
    """A line's record, or None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    values = (value for value in record.values() if value is not None)
    is_whole = all(isinstance(value, int | float) and abs(value) < 2**1000 for value in values)
    return record if is_whole else None
