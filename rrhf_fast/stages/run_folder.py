"""Which checkpoints the folder of a training run holds."""

import json
from pathlib import Path

STATE_FILE = "trainer_state.json"


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
