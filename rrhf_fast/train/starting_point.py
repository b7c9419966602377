"""Choose the checkpoint that a run starts from, and make sure that it is whole."""

from pathlib import Path

from rrhf_fast.stages.checkpoint_reader import damage, summary
from rrhf_fast.stages.run_folder import complete_checkpoints, is_complete
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World


def starting_point(config: TrainConfig, world: World) -> Path | None:
    """The checkpoint that resume_from_checkpoint or init_optimizer_from names; "latest" is the
    newest whole one of output_dir, or None where there is none at all. All ranks must call.

    Raises:
        ValueError: it is incomplete or damaged; or "latest", and all are damaged.
    """
    resumed = config.resume_from_checkpoint
    if resumed == "latest":
        return _latest(Path(config.output_dir), world)
    option = "init_optimizer_from" if resumed is None else "resume_from_checkpoint"
    name = getattr(config, option)
    if name is None:
        return None
    if not world.once(lambda: is_complete(Path(name))):
        expected = "expected checkpoint-<step>"
        raise ValueError(f"{option}: {name} is not a complete checkpoint ({expected})")
    if problem := _problem(Path(name), world):
        raise ValueError(f"{option}: {name} is damaged ({problem})")
    return Path(name)


def _latest(output_dir: Path, world: World) -> Path | None:
    damaged = []
    for folder in world.once(lambda: complete_checkpoints(output_dir))[::-1]:
        problem = _problem(folder, world)
        if problem is None:
            return folder
        world.print(f"warning: {folder} is damaged and passed over ({problem})")
        damaged.append(folder.name)
    if damaged:
        problem = f"no checkpoint in {output_dir} is whole: {', '.join(damaged[:10])} are damaged"
        how = "remove them, or name another to resume from"
        raise ValueError(f"resume_from_checkpoint: {problem} ({how})")
    return None


def _problem(folder: Path, world: World) -> str | None:
    """What is damaged in a checkpoint. Each rank reads its share of the files."""
    with world.together():
        mine = damage(folder, world.rank, world.size)
    return summary([problem for of_rank in world.gather(mine) for problem in of_rank])
