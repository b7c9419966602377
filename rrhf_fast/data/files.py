"""Files, folders, patterns and Hugging Face datasets -> records, one at a time.

A source is one of

    rows.jsonl  rows.json  rows.parquet  rows.csv  rows.tsv     text also as .gz or .zst
    'shards/*.jsonl.gz'     a pattern: its files, sorted by name
    folder                  its files of these kinds, or a saved dataset (save_to_disk)
    name                    a dataset of the Hugging Face hub
    name:split              a split of a folder or a dataset; without one, "train"
    name:config:split       the same of one of its configurations
"""

import csv
import glob
import gzip
import io
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

from rrhf_fast.data.checks import BadRow, Cell, one_line

KINDS = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")
PACKED = (".gz", ".zst")
NO_ARRAY = "expected a JSON object on each line, found what looks like a JSON array"
# Words in a file name that name its split, as in `datasets`.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= {"eval": "test", "evaluation": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# What `datasets` writes beside rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json")

Records = Iterator[tuple[str, object]]


def read_records(source: str) -> Records:
    """Yield ("where", record) for each record of a source; a line that is not JSON is a BadRow.

    Raises:
        ValueError: there is no such file, dataset or split, or it cannot be read.
    """
    name, parts = _split_source(source)
    path = Path(name)
    if not name:
        raise ValueError(f"{source!r}: expected the name of a file, a folder or a dataset")
    if path.is_dir():
        yield from _folder(path, parts, source)
    elif not path.exists() and glob.has_magic(name):
        files = [Path(found) for found in sorted(glob.glob(name, recursive=True))]
        files = [found for found in files if found.is_file()]
        if not files:
            raise ValueError(f"{source}: no file matches this pattern")
        for file in files:
            yield from _file(file)
    elif path.exists() or _kind(path) in KINDS:
        if parts:
            raise ValueError(f"{source}: {name} is a file, which has no splits")
        yield from _file(path)
    else:
        yield from _hub(name, parts, source)


def local_files(source: str) -> list[Path]:
    """The files that a source may read, sorted; none for a dataset of the hub."""
    name, _ = _split_source(source)
    path = Path(name)
    found = [path]
    if path.is_dir():
        found = path.rglob("*")
    elif not path.exists() and glob.has_magic(name):
        found = map(Path, glob.glob(name, recursive=True))
    return sorted(file for file in found if file.is_file())


def _split_source(source: str) -> tuple[str, list[str]]:
    """Split "name:config:split" after the longest path that exists, which may hold colons."""
    pieces = source.split(":")
    for count in range(len(pieces), 0, -1):
        name = ":".join(pieces[:count])
        if name and Path(name).exists():
            return name, pieces[count:]
    if glob.has_magic(source) or _kind(Path(source)) in KINDS:
        return source, []
    return pieces[0], pieces[1:]


def _kind(path: Path) -> str:
    """Return the suffix that names the format, ignoring compression."""
    return Path(path.stem if path.suffix in PACKED else path.name).suffix


def _folder(path: Path, parts: list[str], source: str) -> Records:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        yield from _saved(path, parts, source)
        return
    readme = path / "README.md"
    files = sorted(file for file in path.rglob("*") if _is_rows(file.relative_to(path)))
    files = [file for file in files if file.is_file()]
    # A dataset card may say which file belongs to which split.
    is_described = readme.exists() and re.search(
        r"^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    if is_described or not files or len(parts) > 1:
        yield from _hub(str(path), parts, source)
        return
    for file in _of_split(path, files, parts, source):
        yield from _file(file)


def _is_rows(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not hidden and path.name not in _NO_ROWS and _kind(path) in KINDS


def _of_split(path: Path, files: list[Path], parts: list[str], source: str) -> list[Path]:
    """Choose the files of the requested split. Without a request: all files, unless their names
    name several splits or held-out ones; then those of "train"."""
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(path)).lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        by_split.setdefault(split, []).append(file)
    splits = sorted(by_split.keys() - {None})
    if not parts and (not splits or splits == ["train"] or len(by_split) == 1):
        return files
    split = _named_split(parts, splits)
    if split not in splits:
        found = f"only {', '.join(splits)}" if splits else "its files tell none by their names"
        raise ValueError(f"{source}: no split {split!r}, {found}")
    if not parts and None in by_split:
        odd = by_split[None][0].name
        raise ValueError(f"{source}: {odd} tells no split, and others do (say which: {path}:train)")
    return by_split[split]


def _named_split(parts: list[str], splits: Collection[str]) -> str:
    """The requested split: the one of exactly this name, else one of another name for it."""
    split = parts[0] if parts else "train"
    if split in splits:
        return split
    kind = _SPLITS.get(split.lower(), split)
    return next((name for name in splits if _SPLITS.get(name.lower(), name) == kind), split)


def _file(path: Path) -> Records:
    kind = _kind(path)
    with _readable(path):
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in (".csv", ".tsv"):
            yield from _csv(path, "\t" if kind == ".tsv" else ",")
        elif kind == ".json" and _is_array(path):
            yield from _json_array(path)
        else:
            yield from _json_lines(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn any error of reading a file into one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged, or not gzip ({one_line(error)})") from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise ValueError(f"{path}: cannot be read ({reason})") from error


def _open(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressed according to its name."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix != ".zst":
        return path.open("rb")
    import pyarrow  # slow to import, and needed only here

    if not pyarrow.Codec.is_available("zstd"):
        raise ValueError(f"{path}: .zst needs a pyarrow that is built with zstd")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        return file.read(4096).removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def _decoded(encoded: bytes, where: str, start: int) -> str:
    """Decode bytes that begin at byte `start` of the file."""
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        place = f"byte {start + error.start} of the file"
        raise ValueError(f"{where}: not UTF-8 text ({place})") from error


def _json_lines(path: Path) -> Records:
    with _open(path) as file:
        start = 0  # of this line, in bytes
        for number, encoded in enumerate(file, 1):
            where = f"{path}:{number}"
            mark = len(BOM_UTF8) if number == 1 and encoded.startswith(BOM_UTF8) else 0
            line = _decoded(encoded[mark:] if mark else encoded, where, start + mark)
            start += len(encoded)
            if line.isspace() or not line:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
                if number == 1 and line.lstrip().startswith("["):
                    raise ValueError(f"{path}: {NO_ARRAY} (name it .json)") from error
                reason = _json_problem(error)
                problem = f"expected a JSON object on one line ({reason})"
                record = BadRow("not JSON", where, problem)
            yield where, record


def _json_array(path: Path) -> Records:
    """Read a JSON array: the text as a whole, then one object at a time."""
    with _open(path) as file:
        encoded = file.read()
    mark = len(BOM_UTF8) if encoded.startswith(BOM_UTF8) else 0
    text = _decoded(encoded[mark:], str(path), mark)
    del encoded
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
    at, index = space.match(text, text.index("[") + 1).end(), 0
    while text[at : at + 1] != "]" or index:
        where = f"{path}[{index}]"
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, getattr(error, "pos", at)) + 1
            problem = f"not JSON from here on ({_json_problem(error)}, line {line})"
            raise ValueError(f"{where}: {problem}") from error
        yield where, record
        at, index = space.match(text, at).end(), index + 1
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}:{line}: expected a comma or the end of the JSON array")
        at = space.match(text, at + 1).end()
    if text[at + 1 :].strip():
        line = text.count("\n", 0, at + 1) + 1
        raise ValueError(f"{path}:{line}: expected nothing behind the JSON array")


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", one_line(error))


def _parquet(path: Path) -> Records:
    import pyarrow  # slow to import, and needed only here
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield f"{path}[{index}]", _plain_record(record)
                    index += 1
    except pyarrow.ArrowException as error:
        reason = one_line(error)
        raise ValueError(f"{path}: damaged, or not Parquet ({reason})") from error


def _csv(path: Path, delimiter: str) -> Records:
    """Read a table with names in the first line; every value is a `Cell`."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, line = None, 1
        while True:
            where = f"{path}:{line}"
            try:
                cells = next(reader, None)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text (near line {line})") from error
            except csv.Error as error:
                raise ValueError(f"{where}: not CSV ({one_line(error)})") from error
            line = reader.line_num + 1
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                if len(set(cells)) < len(cells):
                    raise ValueError(f"{where}: two columns have one name, expected a name each")
                header = cells
            elif len(cells) != len(header):
                problem = f"expected {len(header)} cells, found {len(cells)}"
                yield where, BadRow("unequal lengths", where, problem)
            else:
                yield where, dict(zip(header, map(Cell, cells), strict=True))


def _saved(path: Path, parts: list[str], source: str) -> Records:
    """Read what `save_to_disk` wrote: a dataset or a dict of splits."""
    import datasets  # slow to import, and needed only here

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` and pyarrow raise a dozen types
        reason = one_line(error)
        raise ValueError(f"{source}: a saved dataset that cannot be loaded ({reason})") from error
    if len(parts) > 1:
        raise ValueError(f"{source}: a saved dataset has no configurations (expected name:split)")
    if isinstance(saved, datasets.DatasetDict):
        split = _named_split(parts, saved)
        if split not in saved:
            raise ValueError(f"{source}: no split {split!r}, only {', '.join(saved)}")
        saved = saved[split]
    elif parts and parts[0] != str(saved.split):
        what = f"only {saved.split}" if saved.split else "the dataset was saved without splits"
        raise ValueError(f"{source}: no split {parts[0]!r}, {what}")
    yield from _of_dataset(saved, str(path))


def _hub(name: str, parts: list[str], source: str) -> Records:
    """Read a dataset that `datasets` finds by name, or in a folder."""
    import datasets  # slow to import, and needed only here

    if len(parts) > 2 or not all(parts):
        expected = "expected name, name:split or name:config:split"
        raise ValueError(f"{source}: no source of rows ({expected})")
    *config, split = parts or ["train"]
    try:
        dataset = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # `datasets` raises a dozen types for "there is no such dataset"
        reason = one_line(error)
        problem = f"neither a file nor a dataset that could be loaded ({reason})"
        raise ValueError(f"{source}: {problem}") from error
    yield from _of_dataset(dataset, name)


def _of_dataset(dataset, name: str) -> Records:
    index = 0
    try:
        for record in dataset:
            yield f"{name}[{index}]", _plain_record(record)
            index += 1
    except Exception as error:  # damaged files, images that cannot be decoded, ...
        reason = one_line(error)
        raise ValueError(f"{name}[{index}]: cannot be read ({reason})") from error


def _plain_record(record: dict) -> dict:
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: object) -> object:
    """Convert a value to JSON types. Arrow gives all objects of a list the same fields, so fields
    that are None are dropped again, except a message's content."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        items = value.items()
        return {k: _plain(item) for k, item in items if item is not None or k == "content"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Decimal):
        return float(value)
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
