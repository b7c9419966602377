"""Checkpoints to resume from: PyTorch's distributed checkpoints (DCP), written by a thread.

    output_dir/checkpoint-<step>/
      trainer_state.json    step, schedule, config, lengths of the files that grow
      config.json, ...      the Hugging Face model around the weights, for `rrhf_fast.export`
      __<rank>_<n>.distcp   weights, optimizer state, random states
      .metadata             written last, in one move: without it the checkpoint does not exist

Weights and optimizer state are stored by name and whole shape, so any number of ranks can read
them. The position in the data is the step, since the order of an epoch follows from its seed.
"""

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler

from rrhf_fast.data.checks import one_line
from rrhf_fast.model.save import SaveFailed, write_config, write_generation_config
from rrhf_fast.stages.run_folder import (
    STATE_FILE,
    complete_checkpoints,
    is_complete,
    is_ours,
    read_state,
)
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.prepare import Run
from rrhf_fast.train.save import trained_tensors

# DCP says this of every run that no launcher started.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# Files of output_dir that grow with the run; resuming cuts them to what they were.
GROWING_FILES = ("metrics.jsonl", "samples.jsonl")
# Options that say how a run is carried out, not what it computes.
CARRIED_OUT = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "run_name",
    "save_total_limit", "logging_steps", "report_to", "save_dtype", "trust_remote_code",
    "dry_run", "show_tokens",
}  # fmt: skip


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    num_tokens: int = 0
    skipped: int = 0  # steps in a row up to this one
    active_fraction: float = 1.0  # of tokens, about: a running mean over steps

    def update(self, active_fraction: float) -> None:
        """Take a step's active fraction into account."""
        self.active_fraction += 0.2 * (active_fraction - self.active_fraction)


class Stager(BlockingAsyncStager):
    """Copies the state to the CPU. From a GPU that is fastest into pinned memory, which takes long
    to get and is therefore kept for the next save (`cache_staged_state_dict`). Where it cannot be
    had, or holds a state of other keys, each save gets memory of its own."""

    def stage(self, state_dict: dict) -> dict:
        """The copy; waits until it is made."""
        try:
            return super().stage(state_dict)
        except Exception:  # of the allocator, or PyTorch's own for other keys
            if not self.cache_staged_state_dict:
                raise
            self.cache_staged_state_dict, self.state_dict_cache = False, None
            return super().stage(state_dict)


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer, schedule: LRScheduler):
        self._run, self._optimizer, self._schedule = run, optimizer, schedule
        self._pending: tuple[Path, Future] | None = None
        alone = run.world.mesh is None
        # A group of the thread's own, so that its messages do not mix with those of the step.
        group = None if alone else dist.new_group(backend="gloo")
        self._ranks = {"process_group": group, "no_dist": alone}
        # With cpu_offload the state is in pinned memory already, and little is left of the CPU's.
        on_gpu = run.world.device.type == "cuda" and not run.config.cpu_offload
        self._stager = Stager(cache_staged_state_dict=on_gpu)

    def save(self, progress: Progress) -> None:
        """Copy the state and start writing; call `finish` before counting on it. All ranks must
        call."""
        self.finish()  # before what it writes from is used again
        folder = self._run.output_dir / f"checkpoint-{progress.step}"
        with self._run.world.together(), _clear_errors(folder):
            self._run.world.once(lambda: self._begin(folder, progress))
            state = self._tensors() | {self._rng_key: pickle.dumps(_random_states())}
            options = {"async_stager": self._stager, **self._ranks}
            future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder), **options)
        self._pending = folder, future

    def finish(self, *, wait: bool = True) -> None:
        """Raise `SaveFailed` if the write did; afterwards remove what save_total_limit leaves out.
        Without `wait`, only if it is done. All ranks must call."""
        world, limit = self._run.world, self._run.config.save_total_limit
        # Several ranks do not find it done at the same step.
        if self._pending is None or not (wait or (world.size == 1 and self._pending[1].done())):
            return
        (folder, future), self._pending = self._pending, None
        with world.together(), _clear_errors(folder):
            future.result()
            if world.is_first and limit is not None:
                for old in complete_checkpoints(self._run.output_dir)[:-limit]:
                    _remove(old)

    def clear(self, *, keep_complete: bool) -> None:
        """Remove what earlier runs left in output_dir: checkpoints that were never completed, or
        all."""
        if not self._run.world.is_first:
            return
        for folder in self._run.output_dir.glob("checkpoint-*"):
            if is_ours(folder) and not (keep_complete and is_complete(folder)):
                with _clear_errors(folder):
                    _remove(folder)
        for folder in self._run.output_dir.glob(".checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def resume(self, folder: Path) -> tuple[Progress, dict[str, int]]:
        """Load everything but options, such as rates and decays, which are this run's; returns the
        progress and the lengths of the growing files.

        Raises:
            ValueError: the checkpoint is of other rows, or of a model of another shape.
        """
        saved = read_state(folder)
        if saved["data"] != self._data:
            raise ValueError(
                f"resume_from_checkpoint: {folder} is of a run on other rows (to train its model "
                "on these, export it and name it as model_name_or_path)"
            )
        state = self._load(folder, ("model", "optimizer"), "resume_from_checkpoint")
        self._set_moments(state)
        # From one step before, since a step is what computes rates, from this run's schedule.
        step = {"last_epoch": saved["schedule"]["last_epoch"] - 1}
        own = {"base_lrs": self._schedule.base_lrs}
        self._schedule.load_state_dict(saved["schedule"] | own | step)
        self._schedule.step()
        if self._rng_key in state:  # not there on a rank that the saving run did not have
            _set_random_states(pickle.loads(state[self._rng_key]))
        progress = Progress(**{f.name: saved[f.name] for f in fields(Progress)})
        # In another folder than its run's, the files start anew.
        own = folder.parent.resolve() == self._run.output_dir.resolve()
        return progress, saved["files"] if own else {}

    def load_optimizer(self, folder: Path) -> None:
        """Start with another run's moments; rates and decays stay those of this run."""
        self._set_moments(self._load(folder, ("optimizer",), "init_optimizer_from"))

    def _set_moments(self, state: dict) -> None:
        """Of a checkpoint's optimizer take everything but its options."""
        own = [dict(group) for group in self._optimizer.param_groups]
        set_optimizer_state_dict(self._run.model, self._optimizer, state["optimizer"])
        for group, before in zip(self._optimizer.param_groups, own, strict=True):
            group.update({name: value for name, value in before.items() if name != "params"})

    @cached_property
    def _data(self) -> str:
        """A hash of the training rows as tokens and rewards, in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for query in self._run.train.queries:
            for array in (query.prompt_ids, *query.response_ids, query.rewards):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def _rng_key(self) -> str:
        return f"random_states/{self._run.world.rank}"

    def _begin(self, folder: Path, progress: Progress) -> None:
        """The parts that are no tensors."""
        run = self._run
        _remove(folder)
        # Gets its name when it holds the file by which `is_ours` knows it.
        staging = _hidden(folder)
        staging.mkdir()
        with run.model.generation():  # an attention that others have
            write_config(run.model.lm, staging, run.save_dtype)
        write_generation_config(run.model.lm, staging)
        run.tokenizer.save_pretrained(staging)
        lengths = {name: run.output_dir / name for name in GROWING_FILES}
        state = {
            **asdict(progress),
            "num_ranks": run.world.size,
            "schedule": self._schedule.state_dict(),
            "data": self._data,
            "files": {n: path.stat().st_size for n, path in lengths.items() if path.exists()},
            "config": asdict(run.config),
        }
        with (staging / STATE_FILE).open("w") as file:
            json.dump(state, file, indent=2, default=float)  # a rate may be a tensor
            file.flush()
            os.fsync(file.fileno())
        staging.rename(folder)

    def _tensors(self, parts: tuple[str, ...] = ("model", "optimizer")) -> dict:
        """{"model": ..., "optimizer": ...}: the run's own tensors, by name."""
        model, state = self._run.model, {}
        if "model" in parts:
            state["model"] = trained_tensors(model)
        if "optimizer" in parts:
            options = StateDictOptions(ignore_frozen_params=True)
            state["optimizer"] = get_optimizer_state_dict(model, self._optimizer, options=options)
        return state

    def _load(self, folder: Path, parts: tuple[str, ...], option: str) -> dict:
        """Read into the run's own tensors."""
        state = self._tensors(parts)
        reader = dcp.FileSystemReader(folder)
        if self._rng_key in reader.read_metadata().state_dict_metadata:
            state[self._rng_key] = b""
        try:
            dcp.load(state, storage_reader=reader, **self._ranks)
        except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
            problem = str(error).strip().splitlines()[-1]
            raise ValueError(f"{option}: {folder} does not fit this model ({problem})") from error
        return state


def changed_options(folder: Path, config: TrainConfig) -> str:
    """What a resumed run computes otherwise than its checkpoint's run would have, in words."""
    saved = read_state(folder)["config"]
    changes = [
        f"{f.name} {saved[f.name]} -> {getattr(config, f.name)}"
        for f in fields(config)
        if f.name not in CARRIED_OUT
        and f.name in saved
        and saved[f.name] != getattr(config, f.name)
    ]
    return ", ".join(changes)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves a hidden folder, which `clear` removes."""
    hidden = _hidden(folder)
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.is_dir():
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}")


@contextlib.contextmanager
def _clear_errors(folder: Path):
    """One clear line for a full disk or a folder that cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        reasons = [error]
        if isinstance(error, dcp.api.CheckpointException):
            reasons = [reason for reason, _ in error.failures.values()]
        reason = one_line(reasons[0])
        raise SaveFailed(f"output_dir: {folder} could not be written ({reason})") from error


def _random_states() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(states: tuple) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
