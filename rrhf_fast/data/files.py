"""A file -> chunks of records: JSON, Parquet or CSV, also compressed."""

import csv
import gzip
import io
import json
import math
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from rrhf_fast.data.checks import NO_ARRAY, BadRow, Cell, is_unicode, one_line

KINDS = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")
PACKED = (".gz", ".zst")
# What files of rows are called whose kind is not read.
_UNREAD = (".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".feather", ".pkl")
_UNREAD += (".pickle", ".npy", ".npz", ".xls", ".xlsx")


class _Twice(ValueError):
    """A name that stands twice in an object: which value was meant?"""


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON. Raises _Twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"the name {one_line(twice, 40)!r} stands twice")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
# What ends a value: strings may hold brackets that do not count.
_INTEGER = re.compile(r"-?\d+")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
# Bits of the largest integer that Python prints; larger ones are read as infinite.
_MAX_BITS = 14_000

# Bytes of lines, and records of other kinds, that are handed on together.
_CHUNK_BYTES, _CHUNK_RECORDS = 2**21, 1024

Records = Iterator[tuple[str, object]]  # ("file:line" or "file[index]", record)


@dataclass(frozen=True)
class Lines:
    """Some lines of a JSON Lines file, not decoded yet: `first` is the number of the first one,
    `start` its place in the file in bytes."""

    path: Path
    first: int
    start: int
    lines: list[bytes]

    def records(self) -> Records:
        """Decode the lines."""
        start = self.start
        for number, encoded in enumerate(self.lines, self.first):
            where = f"{self.path}:{number}"
            bom = len(BOM_UTF8) if number == 1 and encoded.startswith(BOM_UTF8) else 0
            start, before = start + len(encoded), start
            try:
                line = encoded[bom:].decode()
                if line.isspace() or not line:
                    continue
                record = _DECODER.decode(line)
            except UnicodeDecodeError as error:
                record = _not_utf8(where, before + bom + error.start)
            except (ValueError, RecursionError) as error:  # ValueError: also a number too long
                problem = f"expected a JSON object on one line ({_json_problem(error)})"
                if number == 1 and line.lstrip().startswith("["):
                    problem = f"{NO_ARRAY} (name it .json)"
                record = BadRow("not JSON", where, problem)
            yield where, record


@dataclass(frozen=True)
class Decoded:
    """Some records."""

    items: list[tuple[str, object]]

    def records(self) -> Records:
        """The records."""
        yield from self.items


Chunk = Lines | Decoded


def chunked(records: Records) -> Iterator[Chunk]:
    """Yield records in chunks."""
    while items := list(islice(records, _CHUNK_RECORDS)):
        yield Decoded(items)


def kind_of(path: Path) -> str:
    """Return the suffix that names the format, ignoring compression."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def may_hold_rows(path: Path) -> bool:
    """Return whether a file in a folder of rows is one of them, by its name: it is read, or refused
    if it is packed in a way that is not."""
    return kind_of(path) in KINDS or (
        path.suffix.lower() in _UNREAD and kind_of(Path(path.stem)) in KINDS
    )


def read_file(path: Path) -> Iterator[Chunk]:
    """Yield the records of a file in chunks. A record that cannot be read, as a line that is not
    JSON, is a BadRow.

    Raises:
        ValueError: the file cannot be read, is damaged, or is not of the format its name says.
    """
    kind = kind_of(path)
    if path.is_char_device() or path.is_block_device():
        raise ValueError(f"{path}: expected a file, found a device")  # which may have no end
    if path.suffix.lower() in _UNREAD:
        read = f"{', '.join(KINDS)}, also as {' or '.join(PACKED)}"
        raise ValueError(f"{path}: files of this kind are not read (expected {read})")
    with _readable(path):
        if kind == ".parquet":
            yield from chunked(_parquet(path))
        elif kind in (".csv", ".tsv"):
            yield from chunked(_csv(path, "\t" if kind == ".tsv" else ","))
        elif kind == ".json" and _is_array(path):
            yield from chunked(_json_array(path))
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
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() != ".zst":
        return path.open("rb")
    import pyarrow  # slow to import and needed only here

    if not pyarrow.Codec.is_available("zstd"):
        raise ValueError(f"{path}: .zst needs a pyarrow built with zstd")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        return file.read(4096).removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def _json_lines(path: Path) -> Iterator[Lines]:
    with _open(path) as file:
        first, start = 1, 0
        while lines := file.readlines(_CHUNK_BYTES):
            yield Lines(path, first, start, lines)
            first, start = first + len(lines), start + sum(map(len, lines))


def _json_array(path: Path) -> Records:
    """Read the whole text, then decode one object of the array at a time."""
    with _open(path) as file:
        encoded = file.read()
    bom = len(BOM_UTF8) if encoded.startswith(BOM_UTF8) else 0
    text = encoded[bom:].decode(errors="surrogateescape")
    del encoded
    space = re.compile(r"[ \t\n\r]*")
    at, index = space.match(text, text.index("[") + 1).end(), 0
    counted, start = 0, bom  # a place in the text, and the same in the file, in bytes
    while text[at : at + 1] != "]" or index:  # only an empty array may end here
        where = f"{path}[{index}]"
        try:
            record, end = _next_value(text, at, where)
        except json.JSONDecodeError as error:
            line = text.count("\n", 0, error.pos) + 1
            problem = f"not JSON from here on ({_json_problem(error)}, line {line})"
            raise ValueError(f"{where}: {problem}") from error
        if not is_unicode(text[at:end]):  # bytes that are not UTF-8 became surrogates
            start += len(text[counted:at].encode(errors="surrogateescape"))
            counted = at
            record = _not_utf8(where, start + _first_bad_byte(text[at:end]))
        yield where, record
        at, index = space.match(text, end).end(), index + 1
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}:{line}: expected a comma or the end of the JSON array")
        at = space.match(text, at + 1).end()
    if text[at + 1 :].strip():
        line = text.count("\n", 0, at + 1) + 1
        raise ValueError(f"{path}:{line}: expected nothing after the JSON array")


def _next_value(text: str, at: int, where: str) -> tuple[object, int]:
    """Decode a value of an array; returns it and its end. It is a BadRow if it is nested too deeply
    or an integer is too long. Raises JSONDecodeError."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        problem = f"expected a JSON object ({_json_problem(error)})"
        return BadRow("not JSON", where, problem), _end_of(text, at)


def _end_of(text: str, at: int) -> int:
    """Return the end of the value that begins at `at`. Raises JSONDecodeError if it has none."""
    if number := _INTEGER.match(text, at):
        return number.end()
    depth = 0
    for match in _BRACKETS.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth <= 0:
            return match.end()
    raise json.JSONDecodeError("no end", text, at)


def _not_utf8(where: str, at: int) -> BadRow:
    return BadRow("not UTF-8", where, f"not UTF-8 text (byte {at} of the file)")


def _first_bad_byte(text: str) -> int:
    """Return the place of the first byte that is not UTF-8 in bytes decoded with surrogates."""
    return len(re.match("[^\udc80-\udcff]*", text)[0].encode())


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, _Twice):
        return str(error)
    return getattr(error, "msg", "an integer of too many digits")


def _parquet(path: Path) -> Records:
    import pyarrow  # slow to import and needed only here
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if len(set(names := file.schema_arrow.names)) < len(names):
                raise ValueError(f"{path}: two columns have the same name")
            for batch in file.iter_batches(batch_size=1024):
                for record in _records_of(batch):
                    where = f"{path}[{index}]"
                    bad = BadRow("not UTF-8", where, "not UTF-8 text")
                    yield where, bad if record is None else plain_record(record)
                    index += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged, or not Parquet ({one_line(error)})") from error


def _records_of(batch) -> Iterator[dict | None]:
    """Yield the records of a batch of Parquet, None for one that holds text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(len(batch)):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def _csv(path: Path, delimiter: str) -> Records:
    """Read a table with column names in the first line; every value is a `Cell`."""
    csv.field_size_limit(2**31 - 1)
    encoding = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with _open(path) as binary, io.TextIOWrapper(binary, **encoding) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, line = None, 1
        while True:
            where = f"{path}:{line}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{where}: not CSV ({one_line(error)})") from error
            line = reader.line_num + 1
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                if not is_unicode("".join(cells)):
                    raise ValueError(f"{where}: not UTF-8 text")
                if len(set(cells)) < len(cells):
                    raise ValueError(f"{where}: two columns have the same name")
                header = cells
            elif len(cells) != len(header):
                problem = f"expected {len(header)} cells, found {len(cells)}"
                yield where, BadRow("unequal lengths", where, problem)
            elif not is_unicode("".join(cells)):
                yield where, BadRow("not UTF-8", where, "not UTF-8 text")
            else:
                yield where, dict(zip(header, map(Cell, cells), strict=True))


def plain_record(record: dict) -> dict:
    """Convert the values of an Arrow record, or of one in memory, to JSON types; bytes that are no
    text stay bytes."""
    return {str(name): _plain(value) for name, value in record.items()}


def _plain(value: object) -> object:
    """Convert a value to JSON types. Arrow gives all objects in a list the same fields, so those
    that are None are dropped, except a message's content."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return math.copysign(math.inf, value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):  # text from writers that do not mark it as such
        return value.decode() if _is_utf8(value) else value
    if isinstance(value, dict):
        items = value.items()
        return {str(k): _plain(item) for k, item in items if item is not None or k == "content"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Decimal):
        return float(value)
    if type(value).__name__ in ("NAType", "NaTType"):  # what pandas writes for a missing value
        return None
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _is_utf8(encoded: bytes) -> bool:
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return False
    return True
