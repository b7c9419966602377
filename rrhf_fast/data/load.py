"""Sources -> rows: read the records, convert and check each of them, count what is left out."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from rrhf_fast.data.canonical import Canonical
from rrhf_fast.data.checks import BadRow, check_object, one_line
from rrhf_fast.data.columns import Columns
from rrhf_fast.data.files import Records
from rrhf_fast.data.grouped import grouped
from rrhf_fast.data.rows import Draft, Row, complete, draft_of, row_of, unused_fields
from rrhf_fast.data.sources import InMemory, read_records

T = TypeVar("T")

HINT = "--on_bad_rows skip leaves out bad responses, and rows with fewer than 2 good ones"


@dataclass
class RowReport:
    """How many rows were read, kept and left out."""

    read: int = 0
    kept: int = 0
    bad: Counter = field(default_factory=Counter)  # skipped rows, by kind of error
    bad_responses: Counter = field(default_factory=Counter)  # left out of kept rows, by kind
    unused: Counter = field(default_factory=Counter)  # rows per unused field
    first: dict[tuple[str, str], BadRow] = field(default_factory=dict)  # error of each kind

    def skip(self, error: BadRow, on_bad_rows: str) -> None:
        """Count a bad row. If `on_bad_rows` is "error", raise `error` with what to do instead."""
        if on_bad_rows == "error":
            raise _with_hint(error)
        self.bad[error.kind] += 1
        self.first.setdefault(("row", error.kind), error)

    def leave_out(self, errors: Iterable[BadRow]) -> None:
        """Count bad responses."""
        for error in errors:
            self.bad_responses[error.kind] += 1
            self.first.setdefault(("response", error.kind), error)

    def left_out(self) -> dict[str, int]:
        """Return the non-zero totals of skipped rows and bad responses, for a stage's summary."""
        counts = {"skipped": self.bad.total(), "bad_responses": self.bad_responses.total()}
        return {name: count for name, count in counts.items() if count}

    def by_kind(self) -> dict[str, int]:
        """Return the totals of `left_out` by kind, such as {"skipped: wrong type": 2}."""
        parts = (("skipped", self.bad), ("bad_responses", self.bad_responses))
        return {f"{name}: {kind}": count for name, kinds in parts for kind, count in kinds.items()}

    def lines(self, name: str) -> list[str]:
        """Say what was left out of the source `name`: how many of each kind, and the first one."""
        lines = []
        for what, kinds in (("row", self.bad), ("response", self.bad_responses)):
            parts = [
                f"{count} {kind} (first: {one_line(self.first[what, kind])})"
                for kind, count in kinds.most_common()
            ]
            if parts:
                plural = "s" if kinds.total() > 1 else ""
                lines.append(f"{name}: {kinds.total()} {what}{plural} skipped: {'; '.join(parts)}")
        return lines

    def add(self, other: "RowReport") -> None:
        """Add the counts of another report, except `kept`."""
        self.read += other.read
        for name in ("bad", "bad_responses", "unused"):
            getattr(self, name).update(getattr(other, name))
        self.first = other.first | self.first


def _with_hint(error: BadRow) -> BadRow:
    kind, where, problem = error.args
    return BadRow(kind, where, f"{problem} ({HINT})")


def load_rows(
    sources: str | InMemory | list[str],
    *,
    on_bad_rows: str = "error",
    use_responses: str = "all",
    stop_strings: list[str] | None = None,
    columns: dict[str, str] | None = None,
    group_by: str | None = None,
    apply_chat_template: bool = False,
) -> tuple[list[Row], RowReport]:
    """Read and check rows from files, folders and Hugging Face datasets, in order.

    Args:
        sources: names as in sources.py, or rows in memory.
        on_bad_rows: "error" stops at the first bad row; "skip" leaves out bad responses, and rows
            with fewer than two good ones, and counts both by kind.
        use_responses: "all"; "provided" keeps the responses whose source starts with "provided",
            "chosen" or "rejected" (rows without `sources`: the last two, as in the released
            format); "sampled" keeps the others.
        stop_strings: each response is cut at the first of these strings that it contains.
        columns: JMESPath expressions by the field of a row that they fill.
        group_by: join rows of one response each that are equal in this field.
        apply_chat_template: turn string prompts into user messages.

    Returns:
        The rows, and a report of how many were read, kept and skipped.

    Raises:
        ValueError: a source cannot be read or holds no usable row, or a path is not JMESPath.
        BadRow: (a ValueError) a row is bad and `on_bad_rows` is "error"; names file, line, field
            and what was expected.
    """
    report = RowReport()
    drop = on_bad_rows == "skip"
    parse = partial(row_of, drop=drop, use_responses=use_responses, stop_strings=stop_strings or [])
    reading = on_bad_rows, columns, group_by, apply_chat_template
    return _load(sources, report, parse, *reading, unused=report.unused), report


def load_drafts(
    sources: str | InMemory | list[str],
    *,
    on_bad_rows: str = "error",
    columns: dict[str, str] | None = None,
    group_by: str | None = None,
    apply_chat_template: bool = False,
    needs_responses: bool = False,
) -> tuple[list[Draft], RowReport]:
    """Read prompts, with or without responses, from the same sources as `load_rows`; raises the
    same errors. If `needs_responses`, a row without the field is bad."""
    report = RowReport()
    parse = partial(draft_of, drop=on_bad_rows == "skip", needs_responses=needs_responses)
    reading = on_bad_rows, columns, group_by, apply_chat_template
    return _load(sources, report, parse, *reading, unused=None), report


def _load(
    sources: str | InMemory | list[str],
    report: RowReport,
    parse: Callable[[Canonical, dict, str], tuple[T, list[BadRow]]],
    on_bad_rows: str,
    columns: dict[str, str] | None,
    group_by: str | None,
    apply_chat_template: bool,
    unused: Counter | None,
) -> list[T]:
    """Read, complete and parse all records. `unused` counts unused fields, as in `grouped`."""
    paths = Columns(columns) if columns else None
    sources = sources if isinstance(sources, list) else [sources]
    records = _counted((item for source in sources for item in read_records(source)), report)
    if group_by is not None:

        def on_bad(error: BadRow) -> None:
            if on_bad_rows == "error":
                raise _with_hint(error)
            report.leave_out([error])

        mapped = _mapped(records, paths, group_by, on_bad)
        records, paths = grouped(mapped, group_by, on_bad, unused=unused), None
    rows = []
    for where, record in records:
        try:
            canon = complete(record, where, paths, apply_chat_template)
            if unused is not None:
                unused.update(unused_fields(canon, record))
            row, bad = parse(canon, record, where)
        except BadRow as error:
            report.skip(error, on_bad_rows)
            continue
        rows.append(row)
        report.leave_out(bad)
    if not rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.bad.most_common())
        problem = f"no usable row among the {report.read} read" + (f" ({kinds})" if kinds else "")
        raise ValueError(f"{', '.join(map(str, sources))}: {problem}")
    report.kept = len(rows)
    return rows


def _counted(records: Iterable[tuple[str, object]], report: RowReport) -> Records:
    for item in records:
        report.read += 1
        yield item


def _mapped(
    records: Records, paths: Columns | None, group_by: str, on_bad: Callable[[BadRow], None]
) -> Records:
    """Apply `--columns` to records of one response, before `--group_by` joins them."""
    moved = paths.fields - {group_by} if paths else set()
    for where, record in records:
        try:
            record = check_object(record, where)
            if paths:
                rest = {name: value for name, value in record.items() if name not in moved}
                record = rest | paths.find(record, where)
        except BadRow as error:
            on_bad(error)
        else:
            yield where, record
