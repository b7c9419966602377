"""Checkpoints to resume from: PyTorch's distributed checkpoints (DCP), written by a thread.

    output_dir/checkpoint-<step>/
      trainer_state.json    step, schedule, config, lengths of the growing files
      reference_logps.npz   with --reference initial: see `rrhf_fast.train.reference`
      config.json, ...      the Hugging Face model except its weights, for `rrhf_fast.export`
      __<rank>_<n>.distcp   weights, optimizer state, random states
      .metadata             what is in which of these
      checksums.json        of all files above, written last: incomplete without it

Weights and optimizer state are stored by name and full shape, so any number of ranks can read them.
The step determines the position in the data, since the order of an epoch follows from its seed.
"""

import contextlib
import json
import os
import random
import shutil
from concurrent.futures import Future
from dataclasses import asdict, fields
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
from rrhf_fast.stages.checkpoint_files import STATE_FILE, read_state
from rrhf_fast.stages.checkpoint_reader import first_failure, load_checkpoint, names_in
from rrhf_fast.stages.run_folder import (
    complete_checkpoints,
    is_complete,
    is_ours,
)
from rrhf_fast.train.best import best_step, check_metric
from rrhf_fast.train.checkpoint_writer import Writer
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import reshard
from rrhf_fast.train.metrics import MetricsLog
from rrhf_fast.train.prepare import Run
from rrhf_fast.train.progress import Progress, Window
from rrhf_fast.train.reference import attach_reference, write_reference
from rrhf_fast.train.save import trained_tensors

# Files of output_dir that grow with the run; resuming truncates them to their length at the time.
GROWING_FILES = ("metrics.jsonl", "samples.jsonl")
# Options that do not change what a run computes.
NOT_COMPUTED = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "run_name",
    "save_total_limit", "logging_steps", "report_to", "log_completions", "save_dtype",
    "trust_remote_code", "dry_run", "dry_run_machine", "show_tokens", "data_cache_dir",
    "dataset_num_proc", "push_to_hub", "hub_model_id", "hub_private_repo",
}  # fmt: skip


class Stager(BlockingAsyncStager):
    """Copies the state to the CPU. From a GPU, pinned memory is fastest, but slow to allocate, and
    therefore kept for the next save (`cache_staged_state_dict`). If it cannot be allocated, or
    holds a state with other keys, each save allocates its own memory."""

    def stage(self, state_dict: dict) -> dict:
        """Copy the state and wait for the copy."""
        try:
            return super().stage(state_dict)
        except Exception:  # from the allocator, or PyTorch's own for other keys
            if not self.cache_staged_state_dict:
                raise
            self.cache_staged_state_dict, self.state_dict_cache = False, None
            return super().stage(state_dict)


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(
        self,
        run: Run,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        log: MetricsLog,
    ):
        self._log = log  # which evaluation was best is read off its records
        self._run, self._optimizer, self._schedule = run, optimizer, schedule
        self._pending: tuple[Path, Future] | None = None
        alone = run.world.mesh is None
        # The thread has its own group, so that its messages do not mix with those of the step.
        group = None if alone else dist.new_group(backend="gloo")
        self._ranks = {"process_group": group, "no_dist": alone}
        # With cpu_offload the state is in pinned memory already, and CPU memory is scarce.
        on_gpu = run.world.device.type == "cuda" and not run.config.cpu_offload
        self._stager = Stager(cache_staged_state_dict=on_gpu)

    def save(self, progress: Progress, *, only_best: bool = False) -> None:
        """Copy the state and start writing; the checkpoint is complete after `finish`. With
        `only_best` it goes once a later evaluation is better. All ranks must call."""
        self.finish()  # before its staging memory is reused
        folder = self.folder(progress.step)
        with self._run.world.together(), _clear_errors(folder):
            self._run.world.once(lambda: self._begin(folder, progress, only_best))
            state = self._tensors() | {self._rng_key: _random_states()}
            options = {"async_stager": self._stager, **self._ranks}
            future = dcp.async_save(state, storage_writer=Writer(folder), **options)
        self._pending = folder, future

    def finish(self, *, wait: bool = True) -> None:
        """Raise `SaveFailed` if the pending write failed, then remove checkpoints that nobody
        wants any more. Without `wait`, only if the write is done. All ranks must call."""
        world = self._run.world
        # Several ranks would not see it done at the same step.
        if self._pending is None or not (wait or (world.size == 1 and self._pending[1].done())):
            return
        (folder, future), self._pending = self._pending, None
        with world.together(), _clear_errors(folder):
            future.result()
            if world.is_first:
                self._remove_unwanted(folder)

    def _remove_unwanted(self, newest: Path) -> None:
        """Remove what was written only as the best of its time, and what is beyond
        save_total_limit, but neither the best nor the newest."""
        config, best = self._run.config, None
        if config.load_best_model_at_end:
            best = self.folder(best_step(self._log.records, config))
        # Even if an attempt that this run does not resume left some of later steps.
        complete = complete_checkpoints(self._run.output_dir)
        earlier = [old for old in complete if old not in (newest, best)]
        was_best = [old for old in earlier if _is_only_best(old)]
        wanted = [old for old in earlier if old not in was_best]
        limit = config.save_total_limit
        beyond = [] if limit is None else wanted[: max(0, len(wanted) + 1 - limit)]
        for old in (*was_best, *beyond):
            _remove(old)

    def check_best(self, step: int) -> None:
        """Raise ValueError if the evaluations so far cannot tell which model is best, or if that
        of a resumed run, now after `step`, is gone."""
        config, records = self._run.config, self._log.records
        follows = config.load_best_model_at_end or config.early_stopping_patience is not None
        if follows and any(record["step"] == 0 for record in records):
            check_metric(records, config)
        best = best_step(records, config) if config.load_best_model_at_end else None
        if best not in (None, step) and not is_complete(self.folder(best)):
            problem = f"step {best} was best so far, and {self.folder(best)} is gone"
            raise ValueError(f"load_best_model_at_end: {problem} (or was never written)")

    def folder(self, step: int | None) -> Path:
        """Where the checkpoint of this step is, or would be."""
        return self._run.output_dir / f"checkpoint-{step}"

    def clear(self, *, keep_complete: bool) -> None:
        """Remove incomplete checkpoints of earlier runs from output_dir, or all checkpoints. All
        ranks must call."""
        self._run.world.once(lambda: self._clear(keep_complete))

    def _clear(self, keep_complete: bool) -> None:
        for folder in self._run.output_dir.glob("checkpoint-*"):
            if is_ours(folder) and not (keep_complete and is_complete(folder)):
                with _clear_errors(folder):
                    _remove(folder)
        for folder in self._run.output_dir.glob(".checkpoint-*"):
            if folder.name.removeprefix(".checkpoint-").isdecimal():
                shutil.rmtree(folder, ignore_errors=True)

    def resume(self, folder: Path) -> tuple[Progress, dict[str, int]]:
        """Load everything except options, such as rates and decays, which this run sets; return the
        progress and the lengths of the growing files.

        Raises:
            ValueError: the checkpoint is from other rows, or a model of another shape.
        """
        saved = read_state(folder)
        if saved["data"] != self._data:
            raise ValueError(
                f"resume_from_checkpoint: {folder} is from a run on other rows, or of an earlier "
                "version (to train its model on these rows, export it and pass it as "
                "model_name_or_path)"
            )
        attach_reference(self._run)  # while the model is the initial one
        state = self._load(folder, ("model", "optimizer"), "resume_from_checkpoint")
        self._set_moments(state)
        # Load the previous step and step once, which computes rates from this run's schedule.
        own, last = self._schedule.state_dict(), saved["schedule"]["last_epoch"] - 1
        steps = last + own["_step_count"] - own["last_epoch"]
        self._schedule.load_state_dict(own | {"last_epoch": last, "_step_count": steps})
        self._schedule.step()
        # Absent if the saving run had fewer ranks; pickled, and not read, in old checkpoints.
        if isinstance(random_states := state.get(self._rng_key), str):
            _set_random_states(random_states)
        progress = Progress(**{f.name: saved[f.name] for f in fields(Progress) if f.name in saved})
        if "window" in saved:
            progress.window = Window(**saved["window"])
            found, expected = len(progress.window.sums), len(Window().sums)
            if found != expected:
                problem = f"{STATE_FILE}: window: expected {expected} sums, found {found}"
                raise ValueError(f"resume_from_checkpoint: {folder}: {problem}")
        # In another output_dir the files start anew.
        is_own = folder.parent.resolve() == self._run.output_dir.resolve()
        return progress, saved["files"] if is_own else {}

    def load_model(self, step: int) -> None:
        """Replace the weights by those of this run's checkpoint of `step`, which is complete. All
        ranks must call."""
        reshard(self._run.model)
        self._load(self.folder(step), ("model",), "load_best_model_at_end")
        # DCP writes into the tensors; copies of weights go by versions.
        torch.autograd.graph.increment_version(list(self._run.model.parameters()))

    def load_optimizer(self, folder: Path) -> None:
        """Start with another run's moments, but this run's rates and decays."""
        self._set_moments(self._load(folder, ("optimizer",), "init_optimizer_from"))

    def _set_moments(self, state: dict) -> None:
        """Load a checkpoint's optimizer state, but not its options."""
        own = [dict(group) for group in self._optimizer.param_groups]
        set_optimizer_state_dict(self._run.model, self._optimizer, state["optimizer"])
        for group, before in zip(self._optimizer.param_groups, own, strict=True):
            group.update({name: value for name, value in before.items() if name != "params"})

    @cached_property
    def _data(self) -> str:
        """A hash of the training rows' tokens and rewards, in order."""
        return self._run.train.queries.digest()

    @property
    def _rng_key(self) -> str:
        return f"random_states/{self._run.world.rank}"

    def _begin(self, folder: Path, progress: Progress, only_best: bool) -> None:
        """Write the non-tensor state."""
        run = self._run
        _remove(folder)
        # Renamed once it holds the file by which `is_ours` recognises it.
        staging = _hidden(folder)
        staging.mkdir()
        with run.model.generation():  # the saved config must name a standard attention
            write_config(run.model.lm, staging, run.save_dtype)
        write_generation_config(run.model.lm, staging)
        run.tokenizer.save_pretrained(staging)
        write_reference(run, staging)
        lengths = {name: run.output_dir / name for name in GROWING_FILES}
        state = {
            **asdict(progress),
            "num_ranks": run.world.size,
            "checksums": "xxh3_128",
            "only_best": only_best,
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
        if self._rng_key in names_in(folder, option):
            state[self._rng_key] = ""
        load_checkpoint(state, folder, option, **self._ranks)
        return state


def changed_options(folder: Path, config: TrainConfig) -> str:
    """Describe the options that changed since the checkpoint and affect what a run computes."""
    # Options that its version did not have had their defaults.
    saved = asdict(TrainConfig()) | read_state(folder)["config"]
    changes = [
        f"{f.name} {one_line(saved[f.name], 80)} -> {getattr(config, f.name)}"
        for f in fields(config)
        if f.name not in NOT_COMPUTED
        and f.name in saved
        and saved[f.name] != getattr(config, f.name)
    ]
    return ", ".join(changes)


def _is_only_best(folder: Path) -> bool:
    """Whether a checkpoint was written only as the best of its time; one that is damaged stays."""
    try:
        return bool(read_state(folder).get("only_best"))
    except ValueError:
        return False


def _remove(folder: Path) -> None:
    """Delete a checkpoint. If killed midway, a hidden folder remains, which `clear` removes."""
    hidden = _hidden(folder)
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.is_dir():
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}")


@contextlib.contextmanager
def _clear_errors(folder: Path):
    """Report a full disk or an unwritable folder in one line, as `SaveFailed`."""
    try:
        yield
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        reason = one_line(_cause(first_failure(error)))
        raise SaveFailed(f"output_dir: {folder} could not be written ({reason})") from error


def _cause(error: BaseException) -> BaseException:
    """The system's error behind one of PyTorch's, if there is one: a full disk, say."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen or error


def _random_states() -> str:
    """The states of all random generators, as JSON."""
    _, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [keys.tolist(), *rest]}
    states["torch"] = torch.get_rng_state().tolist()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return json.dumps(states)


def _set_random_states(text: str) -> None:
    states = json.loads(text)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
