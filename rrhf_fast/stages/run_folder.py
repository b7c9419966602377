"""The folder of a run: claim it for a set of options, pass these on to stages, find checkpoints."""

import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from rrhf_fast.stages.files import read_json, write_text
from rrhf_fast.stages.options import without_removed

STATE_FILE = "trainer_state.json"


def claim(output_dir: str, options: dict, *, replaces: Collection[str] = ()) -> Path:
    """Create the folder of a run and record its options, or reuse it if it holds the same run. An
    earlier run without results does not count.

    Args:
        options: everything that the results depend on, as JSON.
        replaces: remove an earlier run, which may consist of the files with these names.

    Raises:
        ValueError: the folder cannot be written, or holds a run with other options, or other files.
    """
    folder, file = Path(output_dir), Path(output_dir, "options.json")
    text = json.dumps(options, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (result := _first_result(folder)) is not None:
            if not file.exists():
                problem = f"holds other files, for example {result} (choose another folder)"
                raise ValueError(f"output_dir: {output_dir} {problem}")
            before, now = without_removed(read_json(file)), json.loads(text)
            if replaces:
                _empty(folder, replaces)
            elif changed := sorted(
                name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
            ):
                raise ValueError(
                    f"output_dir: {output_dir} holds a run with another {', '.join(changed)} "
                    "(choose another folder)"
                )
        write_text(file, text)
    except OSError as error:
        raise ValueError(
            f"output_dir: {output_dir} cannot be written ({error.strerror})"
        ) from error
    return folder


def _first_result(folder: Path) -> str | None:
    """Any non-empty file other than the options."""
    files = (path for path in folder.rglob("*") if path.is_file())
    files = (path for path in files if not path.name.startswith("options."))
    return next((str(path.relative_to(folder)) for path in files if path.stat().st_size), None)


def _empty(folder: Path, names: Collection[str]) -> None:
    """Remove these files; refuse if the folder holds any others."""
    if others := [path.name for path in folder.iterdir() if path.name not in names]:
        problem = f"holds other files, for example {others[0]} (choose another folder)"
        raise ValueError(f"output_dir: {folder} {problem}")
    for name in names:
        folder.joinpath(name).unlink(missing_ok=True)


def pass_on(config: object, target: type, **options):
    """Build the config of a stage that a run calls: the options shared with `config`, and these."""
    names = {f.name for f in fields(target)} & {f.name for f in fields(config)} - set(options)
    return target(**{name: getattr(config, name) for name in names}, **options)


def is_ours(folder: Path) -> bool:
    """Whether this trainer began the checkpoint. The file that transformers' Trainer writes has the
    same name but other entries."""
    try:
        return {"step", "num_ranks", "data"} <= set(read_state(folder))
    except (OSError, ValueError, TypeError):
        return False


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was fully written."""
    return (folder / ".metadata").is_file() and is_ours(folder)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    complete = [path for path in output_dir.glob("checkpoint-*") if is_complete(path)]
    return sorted(complete, key=lambda path: read_state(path)["step"])


def find_checkpoint(name: str, output_dir: Path | None, option: str) -> Path | None:
    """Resolve a checkpoint's path. For resume_from_checkpoint, "latest" is the newest checkpoint of
    output_dir, or None if there is none. Raises ValueError for an incomplete checkpoint."""
    if name == "latest" and option == "resume_from_checkpoint":
        checkpoints = complete_checkpoints(output_dir) if output_dir.exists() else []
        return checkpoints[-1] if checkpoints else None
    if not is_complete(Path(name)):
        raise ValueError(
            f"{option}: {name} is not a complete checkpoint (expected checkpoint-<step>)"
        )
    return Path(name)


def read_state(folder: Path) -> dict:
    """Read trainer_state.json."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
