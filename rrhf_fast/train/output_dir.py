"""The output folder: check that no other run owns it, and create it."""

from contextlib import ExitStack
from pathlib import Path

from rrhf_fast.model.save import is_unfinished
from rrhf_fast.stages.files import disk_problem
from rrhf_fast.stages.lock import locked
from rrhf_fast.stages.run_folder import is_ours, new_folder
from rrhf_fast.train.config import TrainConfig

MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "config.json",
)
# Files that a run replaces: an earlier one's, or a user's of the same name.
RUN_FILES = ("metrics.jsonl", "samples.jsonl", *MODEL_FILES)


def check_output_dir(config: TrainConfig, lock: ExitStack) -> None:
    """Hold the folder's lock until `lock` is closed. Raise ValueError if another process has it, or
    if this run would destroy another run's files without being told to."""
    if config.output_dir is None:
        return
    lock.enter_context(locked(config.output_dir))
    output_dir = Path(config.output_dir)
    model = config.model_name_or_path
    if config.use_peft and model is not None and Path(model).resolve() == output_dir.resolve():
        problem = f"{output_dir} holds the adapters' base model (choose another)"
        raise ValueError(f"output_dir: {problem}")
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    for folder in folders:
        if not is_ours(folder):
            problem = f"{folder} is not a checkpoint of rrhf_fast"
            raise ValueError(f"output_dir: {problem} (choose another)")
    if config.overwrite_output_dir:
        source = config.init_optimizer_from
        if source is not None and _is_inside(source, output_dir):
            problem = f"{source} is in the output_dir, which --overwrite_output_dir clears"
            raise ValueError(f"init_optimizer_from: {problem} (choose another output_dir)")
        return
    resumed = config.resume_from_checkpoint
    has_model = any((output_dir / name).exists() for name in MODEL_FILES)
    can_resume = folders or not has_model or is_unfinished(output_dir)
    if resumed is not None and (
        can_resume if resumed == "latest" else _is_inside(resumed, output_dir)
    ):
        return  # resumes its own run
    names = (*RUN_FILES, *(folder.name for folder in folders))
    used = [name for name in names if (output_dir / name).exists()]
    if used:
        problem = f"{config.output_dir} already holds {used[0]} of another run"
        if resumed == "latest" and "metrics.jsonl" in used:
            problem = f"{config.output_dir} holds a model, and no checkpoint to resume from"
        how = "choose another, or set --overwrite_output_dir true"
        if can_resume and resumed is None:
            how += "; to finish that run, set --resume_from_checkpoint latest"
        raise ValueError(f"output_dir: {problem} ({how})")


def claim_output_dir(config: TrainConfig, lock: ExitStack) -> Path:
    """Create the folder, and hold its lock until `lock` is closed."""
    output_dir = new_folder() if config.output_dir is None else Path(config.output_dir)
    lock.enter_context(locked(output_dir))  # again, unless the folder is new
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if disk_problem(error):
            raise
        problem = f"{output_dir} cannot be written ({error.strerror})"
        raise ValueError(f"output_dir: {problem}") from error
    return output_dir


def _is_inside(checkpoint: str, output_dir: Path) -> bool:
    return Path(checkpoint).resolve().parent == output_dir.resolve()
