"""Log metrics to metrics.jsonl, and to TensorBoard, W&B or trackio if `report_to` names them."""

import json
import math
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from rrhf_fast.train.config import TrainConfig


class MetricsLog:
    """Writes each record to every destination. A record is a flat dict of numbers with a "step"."""

    def __init__(self, output_dir: Path, config: TrainConfig, *, writes: bool = True):
        """Without `writes` (on all ranks but the first) records are only kept in memory. Raises
        ValueError if a tracker in `report_to` is not installed."""
        self.records: list[dict] = []
        names = config.report_to if writes else []
        self._trackers = [_open_tracker(name, output_dir, config) for name in names]
        self._path, self._file, self._writes = output_dir / "metrics.jsonl", None, writes

    def resume(self, length: int) -> None:
        """Continue after the first `length` bytes of the file; records written after the checkpoint
        are dropped."""
        if self._path.exists():
            kept = self._path.read_bytes()[:length]
            self.records = [json.loads(line) for line in kept.splitlines()]
            if self._writes:
                self._file = self._path.open("r+")
                self._file.truncate(len(kept))
                self._file.seek(0, 2)

    def write(self, record: dict) -> None:
        """Append one record and flush it, so that a kill of this process does not lose it.
        Non-finite numbers become null."""
        record = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self.records.append(record)
        if not self._writes:
            return
        if self._file is None:  # replaces an earlier run's file, but not before the first record
            self._file = self._path.open("w")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in record.items() if k != "step" and v is not None}
        for log, _ in self._trackers:
            log(numbers, record["step"])

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        for _, finish in self._trackers:
            finish()


def _open_tracker(name: str, output_dir: Path, config: TrainConfig):
    """A tracker's functions (log(numbers, step), finish())."""
    module_name = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    try:
        module = import_module(module_name)
    except ImportError as error:
        problem = f"{name} is not installed ({error}); pip install rrhf-fast[tracking]"
        raise ValueError(f"report_to: {problem}") from error
    if name == "tensorboard":
        writer = module.SummaryWriter(str(output_dir))

        def log(numbers: dict, step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return log, writer.close
    # wandb and trackio share one interface.
    run = module.init(
        project="rrhf_fast", name=config.run_name or output_dir.name, config=asdict(config)
    )
    return (lambda numbers, step: run.log(numbers, step=step)), run.finish
