"""The folder of a run: claim it for a set of options, pass these on to stages, find checkpoints."""

import contextlib
import itertools
import json
import time
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from rrhf_fast.stages.checkpoint_files import STATE_FILE, SUMS_FILE, read_object, read_state
from rrhf_fast.stages.files import disk_problem, read_json, write_text
from rrhf_fast.stages.lock import LOCK_FILE
from rrhf_fast.stages.options import without_removed


def claim(output_dir: str, options: dict, *, replaces: Collection[str] = ()) -> Path:
    """Create the folder of a run and record its options, or reuse it if it holds the same run. An
    earlier run without results does not count.

    Args:
        options: everything that the results depend on, as JSON.
        replaces: remove an earlier run, which may consist of the files that match these patterns.

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
            try:
                before, now = without_removed(read_json(file)), json.loads(text)
            except ValueError as error:
                raise ValueError(f"output_dir: {error} (choose another folder)") from error
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
        if disk_problem(error):
            raise
        raise ValueError(
            f"output_dir: {output_dir} cannot be written ({error.strerror})"
        ) from error
    return folder


def new_folder() -> Path:
    """Create runs/DATE-TIME for a run that names no output_dir. Runs that start in the same second
    get separate folders. Raises ValueError if it cannot be created."""
    name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        for number in itertools.count(1):
            folder = Path(name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise ValueError(f"output_dir: runs cannot be written ({error.strerror})") from error


def _first_result(folder: Path) -> str | None:
    """Any non-empty file other than the options and locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    files = (path for path in files if not path.name.startswith(("options.", ".options.")))
    return next((str(path.relative_to(folder)) for path in files if path.stat().st_size), None)


def _empty(folder: Path, patterns: Collection[str]) -> None:
    """Remove files in the order of these patterns; refuse if the folder holds any others."""
    patterns = (".*.saving", *patterns)  # of `replacing`, killed
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    kept = {LOCK_FILE, *(path.name for path in files)}
    if others := [path.name for path in folder.iterdir() if path.name not in kept]:
        problem = f"holds other files, for example {others[0]} (choose another folder)"
        raise ValueError(f"output_dir: {folder} {problem}")
    for path in files:
        path.unlink(missing_ok=True)


def pass_on(config: object, target: type, **options):
    """Build the config of a stage that a run calls: the options shared with `config`, and these."""
    names = {f.name for f in fields(target)} & {f.name for f in fields(config)} - set(options)
    return target(**{name: getattr(config, name) for name in names}, **options)


def is_ours(folder: Path) -> bool:
    """Whether this trainer began the checkpoint, which may be damaged. The file that transformers'
    Trainer writes has the name of our state but other entries."""
    try:
        if STATE_FILE in read_object(folder / SUMS_FILE):
            return True
    except ValueError:
        pass
    try:
        state = read_object(folder / STATE_FILE)
    except ValueError:
        # Of another program, unless the files beside it are ours.
        names = (STATE_FILE, ".metadata")
        return all((folder / name).is_file() for name in names)
    return {"step", "num_ranks", "data"} <= set(state)


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was written to its end. It may be damaged since."""
    # DCP writes .metadata last; where it was lost since, the sums are left.
    names = (".metadata", SUMS_FILE)
    return is_ours(folder) and any((folder / name).is_file() for name in names)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(filter(is_complete, output_dir.glob("checkpoint-*")), key=_step)


def _step(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    try:
        return read_state(folder)["step"]
    except ValueError:
        number = folder.name.removeprefix("checkpoint-")
        return int(number) if number.isdecimal() and len(number) < 16 else -1
