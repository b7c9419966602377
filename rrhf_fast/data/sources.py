"""The name of a source -> its records, from files, folders and Hugging Face datasets.

A source is one of

    rows.jsonl  rows.json  rows.parquet  rows.csv  rows.tsv     text also as .gz or .zst
    'shards/*.jsonl.gz'     a pattern: its files, sorted by name
    folder                  its files of these kinds, or a saved dataset (save_to_disk)
    name                    a dataset of the Hugging Face hub
    name:split              a split of a folder or a dataset; "train" by default
    name:config:split       a split of one of its configurations
"""

import glob
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from rrhf_fast.data.checks import BadRow, one_line
from rrhf_fast.data.files import (
    KINDS,
    Chunk,
    Records,
    chunked,
    kind_of,
    may_hold_rows,
    plain_record,
    read_file,
)

# Words in a file name that name its split, as in `datasets`.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= {"eval": "test", "evaluation": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.")
# Files that `datasets` writes next to the rows.
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class InMemory:
    """Rows that are not in a file: dicts, as a list, a `datasets.Dataset` or another iterable.
    Errors refer to them by `name`."""

    name: str
    rows: Iterable[dict]

    def __post_init__(self):
        if isinstance(self.rows, Mapping):
            problem = f"expected rows, found the keys {', '.join(map(str, self.rows))}"
            raise ValueError(f"{self.name}: {problem} (choose a split, or give a list of rows)")
        if not isinstance(self.rows, Iterable):
            kind = type(self.rows).__name__
            raise ValueError(f"{self.name}: expected rows or the name of a file, found a {kind}")

    def __str__(self) -> str:
        return self.name


def read_records(source: str | InMemory) -> Records:
    """Yield (where, record) for each record of a source. For a record that cannot be read, as a
    line that is not JSON, it is a BadRow. Raises the ValueError of `read_chunks`."""
    for chunk in read_chunks(source):
        yield from chunk.records()


def read_chunks(source: str | InMemory) -> Iterator[Chunk]:
    """Yield the same records in chunks, of which lines are not decoded yet: another process may.

    Raises:
        ValueError: there is no such file, dataset or split, or it cannot be read.
    """
    found = _find(source)
    if isinstance(found, list):
        for file in found:
            yield from read_file(file)
    else:
        yield from chunked(_dataset_records(found.rows, found.name))


def content_of(source: str | InMemory) -> list | None:
    """What stands for the content of a source: the hash of each file, or the fingerprint that
    `datasets` gives. None where nothing does: pipes, and rows in memory. Raises ValueError if it
    cannot be read."""
    found = _find(source)
    if isinstance(found, list):
        return (
            [[str(file), _hash_of(file)] for file in found] if all(map(_is_file, found)) else None
        )
    if isinstance(source, str) and (files := local_files(source)):  # of a dataset in a folder
        return [[str(file), _hash_of(file)] for file in files]
    mark = getattr(found.rows, "_fingerprint", None)
    # A function that transforms rows as they are read is no part of the fingerprint.
    is_custom = mark is not None and getattr(found.rows, "format", {}).get("type") == "custom"
    return None if mark is None or is_custom else [found.name, mark]


def _is_file(path: Path) -> bool:
    """Whether this is a file or nothing, which reading reports; no pipe."""
    return path.is_file() or not path.exists()


def _hash_of(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error


def _find(source: str | InMemory) -> list[Path] | InMemory:
    """The files of a source, or its dataset."""
    if isinstance(source, InMemory):
        return source
    name, parts = _split_source(source)
    path = Path(name)
    if not name:
        raise ValueError(f"{source!r}: expected the name of a file, a folder or a dataset")
    if "\0" in name:
        raise ValueError(f"{source!r}: expected a name without NUL characters")
    if path.is_dir():
        return _folder(path, parts, source)
    if not path.exists() and glob.has_magic(name):
        files = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        files = [file for file in files if _is_found(file)]
        if not files:
            raise ValueError(f"{source}: no file matches this pattern")
        return files
    if path.exists() or kind_of(path) in KINDS:
        if parts:
            raise ValueError(f"{source}: {name} is a file, which has no splits")
        return [path]
    return _hub(name, parts, source)


def local_files(source: str) -> list[Path]:
    """Return the files that a source may read, sorted; none for a dataset of the hub."""
    name, _ = _split_source(source)
    path = Path(name)
    paths = [path]
    if path.is_dir():
        paths = path.rglob("*")
    elif not path.exists() and glob.has_magic(name):
        paths = map(Path, glob.glob(name, recursive=True))
    return sorted(path for path in paths if path.is_file())


def _split_source(source: str) -> tuple[str, list[str]]:
    """Split "name:config:split" after the longest existing path, which may contain colons."""
    pieces = source.split(":")
    for count in range(len(pieces), 0, -1):
        name = ":".join(pieces[:count])
        if name and Path(name).exists():
            return name, pieces[count:]
    if glob.has_magic(source) or kind_of(Path(source)) in KINDS:
        return source, []
    return pieces[0], pieces[1:]


def _folder(path: Path, parts: list[str], source: str) -> list[Path] | InMemory:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(path, parts, source)
    readme = path / "README.md"
    paths = [file for file in sorted(path.rglob("*")) if not _is_hidden(file.relative_to(path))]
    files = [file for file in paths if _holds_rows(file) and _is_found(file)]
    # A dataset card may assign files to splits.
    is_described = readme.exists() and re.search(
        r"^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    if is_described or not files or len(parts) > 1:
        return _hub(str(path), parts, source)
    if linked := next((file for file in paths if file.is_symlink() and file.is_dir()), None):
        problem = "a link to a folder, which is not followed (name its files by a pattern)"
        raise ValueError(f"{linked}: {problem}")
    return _files_of_split(path, files, parts, source)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _holds_rows(path: Path) -> bool:
    return path.name not in _NOT_ROWS and may_hold_rows(path)


def _is_found(path: Path) -> bool:
    """Whether this is a file. Raises ValueError for a link to nothing, which would be missed."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path}: a link to a file that is not there")
    return path.is_file()


def _files_of_split(path: Path, files: list[Path], parts: list[str], source: str) -> list[Path]:
    """Return the files of the requested split. Without a request, return all files, or those of
    "train" if file names mention several splits or held-out ones.

    Of a folder from the hub, files data/SPLIT-00000-of-00001.parquet name the split."""
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(path)).lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        if file.parent.name == "data" and (shard := _SHARD.match(file.name)):
            split = shard[1]
        by_split.setdefault(split, []).append(file)
    splits = sorted(by_split.keys() - {None})
    if not parts and (not splits or splits == ["train"] or len(by_split) == 1):
        return files
    split = _named_split(parts, splits)
    if split not in splits:
        known = f"only {', '.join(splits)}" if splits else "its file names mention none"
        raise ValueError(f"{source}: no split {split!r}, {known}")
    if not parts and None in by_split:
        problem = f"{by_split[None][0].name} names no split, but other files do"
        raise ValueError(f"{source}: {problem} (choose one, such as {path}:train)")
    return by_split[split]


def _named_split(parts: list[str], splits: Collection[str]) -> str:
    """Return the requested split, by exactly this name if there is one, else by a synonym."""
    split = parts[0] if parts else "train"
    if split in splits:
        return split
    kind = _SPLITS.get(split.lower(), split)
    return next((name for name in splits if _SPLITS.get(name.lower(), name) == kind), split)


def _saved(path: Path, parts: list[str], source: str) -> InMemory:
    """Read a dataset, or a dict of splits, that `save_to_disk` wrote."""
    import datasets  # slow to import and needed only here

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` and pyarrow raise a dozen types
        problem = f"the saved dataset cannot be loaded ({one_line(error)})"
        raise ValueError(f"{source}: {problem}") from error
    if len(parts) > 1:
        raise ValueError(f"{source}: a saved dataset has no configurations (expected name:split)")
    if isinstance(saved, datasets.DatasetDict):
        split = _named_split(parts, saved)
        if split not in saved:
            raise ValueError(f"{source}: no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    elif parts and parts[0] != str(saved.split):
        known = f"only {saved.split}" if saved.split else "the dataset was saved without splits"
        raise ValueError(f"{source}: no split {parts[0]!r}, {known}")
    return InMemory(str(path), saved)


def _hub(name: str, parts: list[str], source: str) -> InMemory:
    """Read a dataset that `datasets` finds by name, or in a folder."""
    import datasets  # slow to import and needed only here

    if len(parts) > 2 or not all(parts):
        expected = "expected name, name:split or name:config:split"
        raise ValueError(f"{source}: not a source of rows ({expected})")
    *config, split = parts or ["train"]
    try:
        dataset = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # `datasets` raises a dozen types for a missing dataset
        problem = f"neither a file nor a dataset that could be loaded ({one_line(error)})"
        raise ValueError(f"{source}: {problem}") from error
    return InMemory(name, dataset)


def _dataset_records(dataset, name: str) -> Records:
    index = 0
    try:
        for record in dataset:
            where = f"{name}[{index}]"
            yield where, _plain_row(record, where)
            index += 1
    except Exception as error:  # damaged files, images that cannot be decoded, ...
        raise ValueError(f"{name}[{index}]: cannot be read ({one_line(error)})") from error


def _plain_row(record: object, where: str) -> object:
    if not isinstance(record, Mapping):
        return record
    try:
        return plain_record(record)
    except Exception as error:  # values of any class; lists that contain themselves
        return BadRow("cannot be read", where, f"cannot be read ({one_line(error)})")
