"""The output folder: whose it is, and which checkpoints it holds."""

import contextlib
import itertools
import json
import time
from pathlib import Path

from rrhf_fast.config import TrainConfig

STATE_FILE = "trainer_state.json"
# Files that mark a folder as the output of an earlier run.
RUN_FILES = (
    "metrics.jsonl",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)


def check_output_dir(config: TrainConfig) -> None:
    """Raise ValueError if this run would destroy files of another one, unless it was told to."""
    if config.output_dir is None:
        return
    output_dir = Path(config.output_dir)
    model = config.model_name_or_path
    if config.use_peft and model is not None and Path(model).resolve() == output_dir.resolve():
        problem = f"{output_dir} is the model that the adapters belong to (choose another)"
        raise ValueError(f"output_dir: {problem}")
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    for folder in folders:
        if not is_ours(folder):
            raise ValueError(f"output_dir: {folder} is no checkpoint of rrhf_fast (choose another)")
    if config.overwrite_output_dir:
        source = config.init_optimizer_from
        if source is not None and _is_inside(source, output_dir):
            problem = f"{source} is in the output_dir that --overwrite_output_dir clears"
            raise ValueError(f"init_optimizer_from: {problem} (choose another output_dir)")
        return
    resumed = config.resume_from_checkpoint
    if resumed is not None and (
        (folders or not any((output_dir / name).exists() for name in RUN_FILES[1:]))
        if resumed == "latest"
        else _is_inside(resumed, output_dir)
    ):
        return  # its own earlier run
    names = (*RUN_FILES, *(folder.name for folder in folders))
    used = [name for name in names if (output_dir / name).exists()]
    if used:
        problem = f"{config.output_dir} already holds {used[0]} of another run"
        raise ValueError(
            f"output_dir: {problem} (choose another, or set --overwrite_output_dir true)"
        )


def claim_output_dir(config: TrainConfig) -> Path:
    """Make the folder. Two runs that start in the same second get a folder each."""
    try:
        if config.output_dir is not None:
            output_dir = Path(config.output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
        else:
            name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
            for number in itertools.count(1):
                output_dir = Path(name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    output_dir.mkdir(parents=True)
                    break
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        problem = f"{config.output_dir or 'runs'} cannot be written ({error.strerror})"
        raise ValueError(f"output_dir: {problem}") from error
    return output_dir


def is_ours(folder: Path) -> bool:
    """Whether this trainer began the checkpoint. That of transformers' Trainer holds a file of the
    same name, with other entries."""
    try:
        return {"step", "num_ranks", "data"} <= set(read_state(folder))
    except (OSError, ValueError, TypeError):
        return False


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    return (folder / ".metadata").is_file() and is_ours(folder)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if is_complete(path)]
    return sorted(found, key=lambda path: read_state(path)["step"])


def find_checkpoint(name: str, output_dir: Path | None, option: str) -> Path | None:
    """The folder of a checkpoint by its path; to resume from also the latest of output_dir, or None
    if it has none. Raises ValueError for a path that is no complete checkpoint."""
    if name == "latest" and option == "resume_from_checkpoint":
        found = complete_checkpoints(output_dir) if output_dir.exists() else []
        return found[-1] if found else None
    if not is_complete(Path(name)):
        raise ValueError(f"{option}: {name} is no complete checkpoint (a folder checkpoint-<step>)")
    return Path(name)


def read_state(folder: Path) -> dict:
    """trainer_state.json."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def _is_inside(checkpoint: str, output_dir: Path) -> bool:
    return Path(checkpoint).resolve().parent == output_dir.resolve()
