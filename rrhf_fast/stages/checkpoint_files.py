"""The small files of a checkpoint: its state, and the checksums by which damage is found.

checksums.json holds the XXH3 hash (128 bits) of every other file, by name: it finds damage, not
forgery, and costs a fraction of the time of SHA-256. It is written last. Checkpoints of earlier
versions have none, nor has one whose save was cut off just before.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

import xxhash
from annotated_types import Ge, Le

from rrhf_fast.data.checks import one_line, show
from rrhf_fast.stages.files import write_text
from rrhf_fast.stages.options import check

STATE_FILE = "trainer_state.json"
SUMS_FILE = "checksums.json"
WEIGHTS = ".distcp"  # how names of files of tensors end
_LARGEST = 2**24  # bytes of a small file

Count = Annotated[int, Ge(0), Le(2**53)]


@dataclass
class _Config:
    """The entries of a stored config that others than its own run rely on."""

    max_tokens_per_pack: Annotated[int, Ge(1), Le(2**53)]
    use_peft: bool
    model_name_or_path: str | None = None
    lora_r: Annotated[int, Ge(1), Le(2**53)] = 1
    lora_alpha: Annotated[int, Ge(1), Le(2**53)] = 1
    lora_target_modules: str | list[str] = ""
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False


@dataclass
class _Schedule:
    last_epoch: Count


@dataclass
class _Window:
    sums: list[float]
    grad_norms: Annotated[float, Ge(0)]
    seconds: Annotated[float, Ge(0)]
    num_steps: Count


@dataclass
class _State:
    step: Count
    num_tokens: Count
    skipped: Count
    active_fraction: Annotated[float, Ge(0), Le(2)]
    num_ranks: Annotated[int, Ge(1), Le(2**53)]
    data: str
    files: dict[str, Count]
    schedule: _Schedule
    config: _Config
    window: _Window | None = None  # unknown to earlier versions


def read_state(folder: Path) -> dict:
    """Read trainer_state.json. Raises ValueError, in one line, if it cannot be read, lacks an entry
    or has one of another type."""
    state = read_object(folder / STATE_FILE)
    try:
        parts = {
            "schedule": _as(_Schedule, state.get("schedule"), "schedule"),
            "config": _as(_Config, state.get("config"), "config"),
        }
        if "window" in state:
            parts["window"] = _as(_Window, state["window"], "window")
        check(_as(_State, state | parts, "it"))
    except ValueError as error:
        raise ValueError(f"{STATE_FILE}: {one_line(error)}") from error
    return state


def _as(kind: type, entries: object, name: str):
    """The entries that `kind` has, of a record which may hold more."""
    if not isinstance(entries, dict):
        raise ValueError(f"{name}: expected an object, found {show(entries)}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.name not in entries]
    if needed:
        raise ValueError(f"{name} lacks {', '.join(needed)}")
    return kind(**{f.name: entries[f.name] for f in fields(kind) if f.name in entries})


def read_object(path: Path) -> dict:
    """Read a small file, a JSON object. Raises ValueError, in one line, if it is something else."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST:,} bytes")
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, found {show(record)}")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise ValueError(f"{path.name} cannot be read ({reason})") from error
    return record


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The hashes of these files of a folder, by name."""

    def of(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # releases the GIL

    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(of, names), strict=True))


def write_checksums(folder: Path, weights: dict[str, str]) -> None:
    """Write checksums.json: those of the files of tensors, which their writers know, and of all
    others, which are on the disk for certain before it is."""
    others = _files(folder) - weights.keys() - {SUMS_FILE}
    for name in others:
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
    sums = weights | checksums(folder, others)
    write_text(folder / SUMS_FILE, json.dumps(sums, indent=2, sort_keys=True) + "\n")


def wrong_files(folder: Path, rank: int = 0, size: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint that has checksums, one line each. Each of
    `size` ranks checks its share."""
    if not (folder / SUMS_FILE).exists():
        return []
    try:
        sums = read_object(folder / SUMS_FILE)
    except ValueError as error:
        return [str(error)] if rank == 0 else []
    present = _files(folder)
    problems = []
    if rank == 0:
        weights = {name for name in present if name.endswith(WEIGHTS)}
        problems += [f"{one_line(name)} is missing" for name in sorted(sums.keys() - present)]
        problems += [f"{one_line(name)} is not its file" for name in sorted(weights - sums.keys())]
    share = sorted(sums.keys() & present)[rank::size]
    try:
        found = checksums(folder, share)
    except OSError as error:
        return [*problems, f"its files cannot be read ({error.strerror})"]
    return problems + [f"{name} has changed" for name in share if found[name] != sums[name]]


def _files(folder: Path) -> set[str]:
    # Not what a killed writer of a file left beside it.
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".saving")
    return {path.relative_to(folder).as_posix() for path in paths}
