"""Trackers of experiments, each through its own client: TensorBoard, W&B, trackio, MLflow."""

import os
import sys
import threading
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.files import disk_problem, naming
from rrhf_fast.train.config import TrainConfig

PROJECT = "rrhf_fast"
_LONGEST = 500  # characters that MLflow takes of an option


class Tracker(Protocol):
    """What takes the metrics of a run."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def show(self, samples: list[dict], step: int) -> None:
        """Take samples, dicts with the same keys, as a table."""

    def finish(self) -> None:
        """Take no more."""


def open_tracker(name: str, output_dir: Path, config: TrainConfig) -> Tracker:
    """The tracker of this name, as `report_to` has it. Raises ValueError if it is not installed."""
    module_name = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    try:
        module = import_module(module_name)
    except ImportError as error:
        problem = f"{name} is not installed ({error}); pip install {name}"
        raise ValueError(f"report_to: {problem}") from error
    kind = {"tensorboard": _TensorBoard, "mlflow": _MLflow}.get(name, _Wandb)
    try:
        return kind(module, output_dir, config)
    except Exception as error:  # its server cannot be reached, say
        raise ValueError(f"report_to: {name} cannot be started ({one_line(error)})") from error


class _Wandb:
    """W&B and trackio, which share one interface."""

    def __init__(self, module: ModuleType, output_dir: Path, config: TrainConfig):
        self._module, name = module, config.run_name or output_dir.name
        self._run = module.init(project=PROJECT, name=name, config=asdict(config))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def show(self, samples: list[dict], step: int) -> None:
        self._run.log({"samples": self._module.Table(dataframe=_frame(samples))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, module: ModuleType, output_dir: Path, config: TrainConfig):
        self._module = module
        module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        # Within a run of the caller's, if there is one.
        module.start_run(run_name=config.run_name or output_dir.name, nested=True)
        module.log_params({k: str(v)[:_LONGEST] for k, v in asdict(config).items()})

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._module.log_metrics(numbers, step=step)

    def show(self, samples: list[dict], step: int) -> None:
        self._module.log_table(_frame(samples), f"samples/step-{step}.json")

    def finish(self) -> None:
        self._module.end_run("FINISHED" if sys.exc_info()[0] is None else "FAILED")


class _TensorBoard:
    """TensorBoard's files, which a thread writes. When a disk is full, the thread's traceback says
    less than the error that the next call here raises."""

    def __init__(self, module: ModuleType, output_dir: Path, config: TrainConfig):
        self._writer, self._folder = module.SummaryWriter(str(output_dir)), output_dir
        self._before = threading.excepthook
        threading.excepthook = lambda ended: disk_problem(ended.exc_value) or self._before(ended)

    def log(self, numbers: dict[str, float], step: int) -> None:
        with naming(self._folder):
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)

    def show(self, samples: list[dict], step: int) -> None:
        rows = [samples[0], dict.fromkeys(samples[0], "---"), *samples]
        lines = [[_cell(value) for value in row.values()] for row in rows]
        lines[0] = list(samples[0])
        with naming(self._folder):
            table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
            self._writer.add_text("samples", table, step)

    def finish(self) -> None:
        try:
            with naming(self._folder):
                self._writer.flush()  # raises the thread's error, which closing does not
        finally:
            self._writer.close()
            threading.excepthook = self._before


def _cell(value: object) -> str:
    """A value in a table of Markdown."""
    return " ".join(str(value).replace("\\", "\\\\").replace("|", "\\|").split())


def _frame(samples: list[dict]):
    import pandas

    return pandas.DataFrame(samples)
