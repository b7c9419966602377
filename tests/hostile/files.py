"""The file of a case: its rows as JSON, CSV or Parquet, and damage to all of it."""

import csv
import gzip
import io
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from tests.hostile.inputs import Case, dumps


@dataclass
class Written:
    """A file of rows on disk: where its items are, as errors name them."""

    source: str  # what the option names
    path: Path
    places: list[list[str]]  # of each item; bytes of a damaged one may span several lines
    rows: int | None  # records that a reader sees, if that is known


def write(case: Case, folder: Path) -> Written:
    """Write the case's file of rows."""
    suffix = {"array": ".json"}.get(case.kind, f".{case.kind}")
    folder = folder / "rows" if {"folder", "pattern"} & {*case.damage} else folder
    folder.mkdir(exist_ok=True)
    packed = "".join(name for name in case.damage if name in (".gz", ".zst"))
    path = folder / f"rows{suffix}{packed if case.kind != 'parquet' else ''}"
    encoded, places, rows = ENCODERS[case.kind](case)
    rng = Random(case.seed + 1)
    if "bom" in case.damage and case.kind != "parquet":
        encoded = b"\xef\xbb\xbf" + encoded
    if "utf-16" in case.damage and case.kind != "parquet":
        encoded = encoded.decode(errors="replace").encode("utf-16")
    if "empty" in case.damage:
        encoded = b""
    if path.suffix == ".gz":
        encoded = gzip.compress(encoded, 1, mtime=0)
    if path.suffix == ".zst":
        encoded = pyarrow.compress(encoded, codec="zstd", asbytes=True)
    if "torn" in case.damage:
        encoded = encoded[: rng.randrange(len(encoded) + 1)]
    if "flipped" in case.damage and encoded:
        encoded = bytearray(encoded)
        encoded[rng.randrange(len(encoded))] ^= 1 << rng.randrange(8)
    path.write_bytes(encoded)
    source = str(path)
    if "folder" in case.damage:
        source = str(folder)
    elif "pattern" in case.damage:
        source = f"{folder}/*{path.suffix}"
    form = "{}[{}]" if case.kind in ("array", "parquet") else "{}:{}"
    named = [[form.format(path, number) for number in numbers] for numbers in places]
    return Written(source, path, named, None if case.is_broken else rows)


def _lines(case: Case) -> tuple[bytes, list[list[int]], int]:
    end = b"\r\n" if "crlf" in case.damage else b"\n"
    encoded, places = b"", []
    for item in case.items:
        text = item.text
        if text is None:
            text = dumps(item.record, case.ascii).encode(errors="surrogatepass")
        first = encoded.count(b"\n") + 1
        encoded += text
        places.append(list(range(first, encoded.count(b"\n") + 2)))
        encoded += end + (b"\n \t\n" if "blank" in case.damage else b"")
    if "no end" in case.damage:
        encoded = encoded.rstrip(b"\r\n \t")
    rows = sum(not _is_blank(line) for line in encoded.split(b"\n"))
    return encoded, places, rows


def _is_blank(line: bytes) -> bool:
    try:
        return not line.decode().strip()
    except UnicodeDecodeError:
        return False


def _array(case: Case) -> tuple[bytes, list[list[int]], int]:
    texts = [
        dumps(item.record, case.ascii).encode(errors="surrogatepass")
        if item.text is None
        else item.text
        for item in case.items
    ]
    return b"[" + b",\n".join(texts) + b"]", [[i] for i in range(len(texts))], len(texts)


def _table(case: Case) -> tuple[bytes, list[list[int]], int]:
    names = list(dict.fromkeys(name for item in case.items for name in item.record))
    text, places = io.StringIO(), []
    writer = csv.writer(text, delimiter="\t" if case.kind == "tsv" else ",", lineterminator="\r\n")
    writer.writerow(names)
    for item in case.items:
        first = _count_lines(text) + 1
        cells = [item.record.get(name) for name in names]
        writer.writerow(["" if cell is None else _cell(cell) for cell in cells])
        places.append(list(range(first, _count_lines(text) + 1)))
    encoded = text.getvalue().encode(errors="surrogatepass")
    if "crlf" not in case.damage:
        encoded = encoded.replace(b"\r\n", b"\n")
    return encoded, places, len(places)


def _count_lines(text: io.StringIO) -> int:
    return len(re.findall("\r\n|\r|\n", text.getvalue()))


def _cell(value: object) -> str:
    text = (
        value if isinstance(value, str) else dumps(value, False) if _is_json(value) else str(value)
    )
    return re.sub("^@@(.*)@@$", r"\1", text, flags=re.DOTALL)


def _is_json(value: object) -> bool:
    return isinstance(value, list | dict | int | float) and "b'" not in repr(value)


def _parquet(case: Case) -> tuple[bytes, list[list[int]], int]:
    names = list(dict.fromkeys(name for item in case.items for name in item.record))
    columns = {}
    for name in names:
        values = [item.record.get(name) for item in case.items]
        try:
            columns[name] = pyarrow.array(values)
            pyarrow.parquet.write_table(pyarrow.table({name: columns[name]}), io.BytesIO())
        except (pyarrow.ArrowException, UnicodeError, OverflowError, RecursionError, ValueError):
            # Values of several types: all as JSON text, and no row is as it was.
            texts = [_cell(value).encode(errors="replace").decode() for value in values]
            columns[name] = pyarrow.array(texts)
            for item in case.items:
                item.intact = False
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue(), [[i] for i in range(len(case.items))], len(case.items)


ENCODERS = {"jsonl": _lines, "array": _array, "csv": _table, "tsv": _table, "parquet": _parquet}
