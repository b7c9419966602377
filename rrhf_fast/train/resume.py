"""Where a run starts: afresh, or from a checkpoint and the files that go with it."""

import os

from rrhf_fast.stages.run_folder import find_checkpoint
from rrhf_fast.train.checkpoint import Checkpoints, Progress, changed_options
from rrhf_fast.train.metrics import MetricsLog
from rrhf_fast.train.prepare import Run


def start(run: Run, checkpoints: Checkpoints, log: MetricsLog) -> Progress:
    """Resume from the checkpoint that the config names, or start afresh."""
    config, world = run.config, run.world
    name = config.resume_from_checkpoint or config.init_optimizer_from
    option = "resume_from_checkpoint" if config.resume_from_checkpoint else "init_optimizer_from"
    folder = world.once(lambda: name and find_checkpoint(name, run.output_dir, option))
    if folder is None or option == "init_optimizer_from":
        if folder is not None:
            checkpoints.load_optimizer(folder)
        elif name is not None:
            world.print(f"resume     no checkpoint in {run.output_dir} yet: starting afresh")
        checkpoints.clear(keep_complete=False)
        return Progress()
    checkpoints.clear(keep_complete=True)
    progress, lengths = checkpoints.resume(folder)
    log.resume(lengths.get("metrics.jsonl", 0))
    samples = run.output_dir / "samples.jsonl"
    if world.is_first and samples.exists():
        os.truncate(samples, min(samples.stat().st_size, lengths.get("samples.jsonl", 0)))
    changes = changed_options(folder, config)
    world.print(f"resume     {folder}" + (f", with changes: {changes}" if changes else ""))
    return progress


def first_evaluation(records: list[dict]) -> dict[str, float]:
    """The held-out metrics before the first step, from the records of the run's earlier part."""
    first = next((record for record in records if record["step"] == 0), {})
    return {
        name.removeprefix("eval/"): value
        for name, value in first.items()
        if name != "step" and value is not None
    }


def was_left_out(records: list[dict], step: int) -> bool:
    """Whether a signal cut off the evaluation after this step, in the run's earlier part."""
    here = [record for record in records if record["step"] == step]
    return bool(records) and not any(key.startswith("eval/") for r in here for key in r)
