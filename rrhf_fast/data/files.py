"""A file -> records, one at a time: JSON, Parquet or CSV, also compressed."""

import csv
import gzip
import io
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

from rrhf_fast.data.checks import NO_ARRAY, BadRow, Cell, one_line

KINDS = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")
PACKED = (".gz", ".zst")

Records = Iterator[tuple[str, object]]  # ("file:line" or "file[index]", record)


def kind_of(path: Path) -> str:
    """Return the suffix that names the format, ignoring compression."""
    return Path(path.stem if path.suffix in PACKED else path.name).suffix


def read_file(path: Path) -> Records:
    """Yield (where, record) for each record. For a line that is not JSON, the record is a BadRow.

    Raises:
        ValueError: the file cannot be read, is damaged, or is not of the format its name says.
    """
    kind = kind_of(path)
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
    """Turn any error in reading a file into a ValueError of one line."""
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
    import pyarrow  # slow to import and needed only here

    if not pyarrow.Codec.is_available("zstd"):
        raise ValueError(f"{path}: .zst needs a pyarrow built with zstd")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        return file.read(4096).removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def _decoded(encoded: bytes, where: str, start: int) -> str:
    """Decode bytes whose first one is byte `start` of the file."""
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise ValueError(f"{where}: not UTF-8 text (byte {at} of the file)") from error


def _json_lines(path: Path) -> Records:
    with _open(path) as file:
        start = 0  # of this line, in bytes
        for number, encoded in enumerate(file, 1):
            where = f"{path}:{number}"
            bom = len(BOM_UTF8) if number == 1 and encoded.startswith(BOM_UTF8) else 0
            line = _decoded(encoded[bom:] if bom else encoded, where, start + bom)
            start += len(encoded)
            if line.isspace() or not line:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: also a number too long
                if number == 1 and line.lstrip().startswith("["):
                    raise ValueError(f"{path}: {NO_ARRAY} (name it .json)") from error
                problem = f"expected a JSON object on one line ({_json_problem(error)})"
                record = BadRow("not JSON", where, problem)
            yield where, record


def _json_array(path: Path) -> Records:
    """Read the whole text, then decode one object of the array at a time."""
    with _open(path) as file:
        encoded = file.read()
    bom = len(BOM_UTF8) if encoded.startswith(BOM_UTF8) else 0
    text = _decoded(encoded[bom:], str(path), bom)
    del encoded
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
    at, index = space.match(text, text.index("[") + 1).end(), 0
    while text[at : at + 1] != "]" or index:  # only an empty array may end here
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
        raise ValueError(f"{path}:{line}: expected nothing after the JSON array")


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", one_line(error))


def _parquet(path: Path) -> Records:
    import pyarrow  # slow to import and needed only here
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield f"{path}[{index}]", plain_record(record)
                    index += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged, or not Parquet ({one_line(error)})") from error


def _csv(path: Path, delimiter: str) -> Records:
    """Read a table with column names in the first line; every value is a `Cell`."""
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
                    raise ValueError(f"{where}: two columns have the same name")
                header = cells
            elif len(cells) != len(header):
                problem = f"expected {len(header)} cells, found {len(cells)}"
                yield where, BadRow("unequal lengths", where, problem)
            else:
                yield where, dict(zip(header, map(Cell, cells), strict=True))


def plain_record(record: dict) -> dict:
    """Convert the values of an Arrow record to JSON types."""
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: object) -> object:
    """Convert a value to JSON types. Arrow gives all objects in a list the same fields, so those
    that are None are dropped, except a message's content."""
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
