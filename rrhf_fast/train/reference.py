"""The log-prob of every response under the initial model, for `--reference initial`.

One forward over all rows before the first step; after it, 4 bytes per response are left and no
second model. Checkpoints keep the values, each array by a fingerprint of model and rows: a resumed
run finds its own there, or computes them before it loads the weights of the checkpoint.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from rrhf_fast.data.packs import Batch, PackPlanner, ahead
from rrhf_fast.model.lora import is_adapter
from rrhf_fast.model.sharded import named_tensors
from rrhf_fast.train.distributed import World, whole
from rrhf_fast.train.prepare import Run

FILE = "reference_logps.npz"  # in a checkpoint
# Grouping all rows at once would take a time quadratic in their number.
_QUERIES_AT_ONCE = 1024
# Entries of a model's config that change no log-prob.
_NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "transformers_version"}


@dataclass(frozen=True)
class ReferenceLogps:
    """The values of all responses of a corpus; called with numbers of queries, those of theirs."""

    values: np.ndarray  # [S] float32, the sum of each response's log-probs
    starts: np.ndarray  # [G+1] int64, the first response of each query

    def __call__(self, query_ids: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.values[_places(self.starts, query_ids)])


def attach_reference(run: Run, *, held_out_only: bool = False) -> None:
    """Let the run's packs carry the log-probs under its model as it is now: those of the checkpoint
    to resume from, where it has them for this model and these rows, or else computed. Does nothing
    without `--reference initial`, or for packs that carry them already. All ranks must call.

    Raises:
        ValueError: a log-prob is not finite (names the row), or a model in memory is not the one
            that the checkpoint's run began with.
    """
    config, world, started = run.config, run.world, time.perf_counter()
    sides = (run.held_out,) if held_out_only else (run.train, run.held_out)
    planners = [side for side in sides if side is not None and side.reference is None]
    if config.reference == "none" or not planners:
        return
    model = _fingerprint(run)
    folder = None if config.resume_from_checkpoint is None else run.checkpoint
    kept = {} if folder is None else world.once(lambda: _read(folder))
    if folder is not None and run.is_given and not any(key.startswith(model) for key in kept):
        # It may be trained already, by the run whose checkpoint this is.
        raise ValueError(
            f"reference: the model in memory is not the one that the run of {folder} began with; "
            "pass that model, or name it"
        )
    for planner in planners:
        key = f"{model}-{planner.queries.digest()}"
        starts = np.append(0, planner.queries.index["num_responses"].cumsum(dtype=np.int64))
        run.reference[key] = kept[key] if key in kept else _compute(run, planner, starts)
        planner.reference = ReferenceLogps(run.reference[key], starts)
    count = sum(len(planner.reference.values) for planner in planners)
    how = f"under the initial model, in {time.perf_counter() - started:.1f} s"
    if run.reference.keys() <= kept.keys():
        how = f"from {folder}"
    elif folder is not None:
        why = "has those of another model or of other rows" if kept else "has none"
        how += f" ({folder} {why})"
    world.print(f"reference  log-probs of {count:,} responses {how}")


def write_reference(run: Run, folder: Path) -> None:
    """Add the run's values, if it has any, to the files of a checkpoint."""
    if run.reference:
        np.savez(folder / FILE, **run.reference)


def _read(folder: Path) -> dict[str, np.ndarray]:
    """The values in a checkpoint by fingerprint; none if they cannot be read."""
    try:
        with np.load(folder / FILE, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # of a damaged archive, of any type; checksums, if there are any, were right
        return {}


def _fingerprint(run: Run) -> str:
    """A hash of everything about the model that its log-probs depend on. Adapters add nothing
    before the first step."""
    settings = run.model.lm.config.to_dict()
    settings = {name: value for name, value in settings.items() if name not in _NOT_COMPUTED}
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in named_tensors(run.model.lm).items():
        if not is_adapter(name):
            tensor = whole(tensor.detach())
            if run.world.is_first:
                digest.update(name.encode())
                digest.update(tensor.float().cpu().contiguous().numpy())
    return run.world.once(digest.hexdigest)


@torch.no_grad()
def _compute(run: Run, planner: PackPlanner, starts: np.ndarray) -> np.ndarray:
    """[S] float32; each rank runs the model on its share of the rows."""
    model, world = run.model, run.world
    sums = torch.zeros(starts[-1], device=model.device)
    steps = ahead(_shares(planner, world), pin_memory=world.device.type == "cuda")
    options = {"unit": "query", "desc": "reference", "disable": world.bar, "delay": 2.0}
    with (
        model.engaged(),
        closing(steps),
        tqdm(total=len(planner.queries), **options) as progress,
    ):
        for batch in steps:
            for pack in batch.packs:
                logps = model.response_logps(pack.to(model.device))
                if pack.num_queries:
                    places = torch.from_numpy(_places(starts, pack.query_ids.tolist()))
                    sums[places.to(model.device)] = logps
            progress.update(batch.num_queries)
    values = world.sum(sums).cpu().numpy()
    if len(odd := np.flatnonzero(~np.isfinite(values))):
        query = int(np.searchsorted(starts, odd[0], side="right")) - 1
        problem = f"a response has the log-prob {values[odd[0]]} under the initial model"
        where = planner.queries.where(query)
        raise ValueError(f"reference: {where}: {problem} (expected a finite number)")
    return values


def _shares(planner: PackPlanner, world: World) -> Iterator[Batch]:
    """This rank's packs of all queries, one at a time, as many on every rank."""
    total = len(planner.queries)
    for start in range(0, total, _QUERIES_AT_ONCE):
        queries = range(start, min(start + _QUERIES_AT_ONCE, total))
        mine = planner.deal(queries, world.size)[world.rank]
        for number, ids in enumerate(mine, 1):
            done = len(queries) if number == len(mine) else 0
            yield Batch([planner.build(ids)], done)


def _places(starts: np.ndarray, query_ids: Sequence[int]) -> np.ndarray:
    """The numbers of the responses of these queries."""
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in query_ids])
