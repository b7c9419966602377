"""Where a run starts: afresh, or from a checkpoint and the files that go with it."""

import contextlib
from pathlib import Path

from rrhf_fast.stages.checkpoint_files import SUMS_FILE, read_state, write_checksums
from rrhf_fast.train.checkpoint import Checkpoints, changed_options
from rrhf_fast.train.metrics import MetricsLog, cut
from rrhf_fast.train.prepare import Run
from rrhf_fast.train.progress import Progress
from rrhf_fast.train.reference import attach_reference


def start(run: Run, checkpoints: Checkpoints, log: MetricsLog) -> Progress:
    """Resume from the run's checkpoint, or start afresh."""
    config, world, folder = run.config, run.world, run.checkpoint
    is_resumed = config.resume_from_checkpoint is not None
    if folder is None or not is_resumed:
        if folder is not None:
            checkpoints.load_optimizer(folder)
        elif is_resumed:
            world.print(f"resume     no checkpoint in {run.output_dir} yet: starting afresh")
        checkpoints.clear(keep_complete=False)
        earlier = run.output_dir / "samples.jsonl"  # another run's
        world.once(lambda: earlier.unlink(missing_ok=True))
        attach_reference(run)
        return Progress()
    before = read_state(folder)["config"]["train_batch_size"]
    if before != config.train_batch_size:  # a run's place in its rows is a number of steps
        problem = f"expected {before}, as in {folder}, found {config.train_batch_size}"
        raise ValueError(f"train_batch_size: {problem} (a resumed run keeps it)")
    checkpoints.clear(keep_complete=True)
    progress, lengths = checkpoints.resume(folder)
    world.once(lambda: _complete(folder))
    with world.together():
        log.resume(lengths.get("metrics.jsonl", 0))
        if world.is_first:
            cut(run.output_dir / "samples.jsonl", lengths.get("samples.jsonl", 0))
    changes = changed_options(folder, config)
    changes = f", with changes: {changes}" if changes else ""
    left = "" if progress.step < run.num_steps else f"; no step is left of {run.num_steps}"
    world.print(f"resume     {folder}{changes}{left}")
    return progress


def _complete(folder: Path) -> None:
    """Add the checksums to a checkpoint whose save was cut off before them."""
    if "checksums" in read_state(folder) and not (folder / SUMS_FILE).exists():
        print(f"warning: {folder} has no {SUMS_FILE}, so damage would not be seen; writing it")
        with contextlib.suppress(OSError):  # another user's, perhaps
            write_checksums(folder, {})


def evaluation_at(records: list[dict], step: int) -> dict[str, float]:
    """The held-out metrics after this step, 0 for those before the first, from a run's records."""
    evaluations = (r for r in records if r["step"] == step and any(map(_is_held_out, r)))
    return {
        name.removeprefix("eval/"): value
        for name, value in next(evaluations, {}).items()
        if name != "step" and value is not None
    }


def _is_held_out(name: str) -> bool:
    return name.startswith("eval/")


def was_left_out(records: list[dict], step: int) -> bool:
    """Whether a signal cut off the evaluation after this step, in the run's earlier part."""
    here = [record for record in records if record["step"] == step]
    return bool(records) and not any(_is_held_out(key) for r in here for key in r)
