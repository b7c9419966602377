"""Sources -> rows: read the records, convert and check each of them, count what is left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
# (record in canonical form, record, where) -> what it holds, and its bad responses.
Parser = Callable[[Canonical, dict, str], tuple[T, list[BadRow]]]

# What reports count.
COUNTS = ("bad", "bad_responses", "unused", "noted")
HINT = "--on_bad_rows skip leaves out bad responses, and rows with fewer than 2 good ones"


@dataclass
class RowReport:
    """How many rows were read, kept and left out."""

    read: int = 0
    kept: int = 0
    bad: Counter = field(default_factory=Counter)  # skipped rows, by kind of error
    bad_responses: Counter = field(default_factory=Counter)  # left out of kept rows, by kind
    unused: Counter = field(default_factory=Counter)  # rows per unused field
    noted: Counter = field(default_factory=Counter)  # what is used and is worth a warning
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
        """Say what was left out of the source `name`: how many of each kind, and the first one;
        and what the chat template does not render as it should."""
        lines = []
        for what, kinds in (("row", self.bad), ("response", self.bad_responses)):
            parts = [
                f"{count} {kind} (first: {one_line(self.first[what, kind])})"
                for kind, count in kinds.most_common()
            ]
            if parts:
                plural = "s" if kinds.total() > 1 else ""
                lines.append(f"{name}: {kinds.total()} {what}{plural} skipped: {'; '.join(parts)}")
        return lines + [f"{name}: {text}" for text in self.warnings().values()]

    def warnings(self) -> dict[str, str]:
        """Lines by name about prompts that the chat template does not render, or renders twice, and
        about those that end with a space, or with an answer, which is continued."""
        lines = {}
        if texts := self.noted["text"]:
            which = "all" if texts == self.kept else f"{texts} of {self.kept}"
            lines["prompts"] = (
                f"warning: {which} are text, which bypasses the model's chat template; "
                "--apply_chat_template true turns them into messages"
            )
        if twice := self.noted["rendered twice"]:
            lines["messages"] = (
                f"warning: {twice} of {self.kept} prompts hold what the chat template renders, and "
                "it renders them again (texts that are rendered need no --apply_chat_template)"
            )
        if spaces := self.noted["ends with a space"]:
            lines["spaces"] = (
                f"warning: {spaces} of {self.kept} prompts end with a space, which the tokenizer "
                "else joins with the word that follows; let the response begin with it"
            )
        if continued := self.noted["continued"]:
            lines["continued"] = (
                f"note: {continued} of {self.kept} prompts end with a message of the assistant, "
                "which responses continue; to leave it out say --columns '{prompt: FIELD[:-1]}'"
            )
        return lines

    def check_kept(self, sources: Sequence[str | InMemory]) -> None:
        """Raise ValueError if no row is left."""
        if not self.kept:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.bad.most_common())
            first = next((f"; first: {one_line(error)}" for error in self.first.values()), "")
            problem = "no rows" if not self.read else f"no usable row among the {self.read} read"
            problem += f" ({kinds}{first})" if kinds else ""
            raise ValueError(f"{', '.join(map(str, sources))}: {problem}")

    def as_json(self) -> dict:
        """This report in JSON, from which `of_json` makes it again."""
        first = [[*key, *error.args] for key, error in self.first.items()]
        return vars(self) | {"first": first}

    @classmethod
    def of_json(cls, record: dict) -> "RowReport":
        """The report that `as_json` described."""
        counts = {name: Counter(record[name]) for name in COUNTS}
        first = {(what, kind): BadRow(*args) for what, kind, *args in record["first"]}
        return cls(record["read"], record["kept"], **counts, first=first)

    def add(self, other: "RowReport") -> None:
        """Add the counts of another report."""
        self.read += other.read
        self.kept += other.kept
        for name in COUNTS:
            getattr(self, name).update(getattr(other, name))
        for key, error in other.first.items():
            self.first.setdefault(key, error)


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
    parse = row_parser(on_bad_rows, use_responses, stop_strings)
    reading = on_bad_rows, columns, group_by, apply_chat_template
    return _load(sources, report, parse, *reading, unused=report.unused), report


def row_parser(on_bad_rows: str, use_responses: str, stop_strings: list[str] | None) -> Parser[Row]:
    """The parser of `load_rows`, whose arguments these are."""
    drop = on_bad_rows == "skip"
    return partial(row_of, drop=drop, use_responses=use_responses, stop_strings=stop_strings or [])


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
    parse: Parser[T],
    on_bad_rows: str,
    columns: dict[str, str] | None,
    group_by: str | None,
    apply_chat_template: bool,
    unused: Counter | None,
) -> list[T]:
    """Read, complete and parse all records. `unused` counts unused fields, as in `grouped`."""
    sources = sources if isinstance(sources, list) else [sources]
    records = counted((item for source in sources for item in read_records(source)), report)
    if group_by is not None:
        records, columns = joined(records, report, on_bad_rows, columns, group_by, unused), None
    reading = on_bad_rows, columns, apply_chat_template
    rows = list(parsed(records, report, parse, *reading, unused=unused))
    report.kept = len(rows)
    report.check_kept(sources)
    return rows


def parsed(
    records: Records,
    report: RowReport,
    parse: Parser[T],
    on_bad_rows: str,
    columns: dict[str, str] | None,
    apply_chat_template: bool,
    unused: Counter | None,
) -> Iterator[T]:
    """Complete and parse records, and report the bad ones."""
    paths = Columns(columns) if columns else None
    for where, record in records:
        try:
            canon = complete(record, where, paths, apply_chat_template)
            if unused is not None:
                unused.update(unused_fields(canon, record))
            row, bad = parse(canon, record, where)
            report.noted.update(canon.noted)
        except BadRow as error:
            report.skip(error, on_bad_rows)
            continue
        report.leave_out(bad)
        yield row


def joined(
    records: Records,
    report: RowReport,
    on_bad_rows: str,
    columns: dict[str, str] | None,
    group_by: str,
    unused: Counter | None,
) -> Records:
    """Apply `--columns` to records of one response each and join them by `--group_by`."""

    def on_bad(error: BadRow) -> None:
        if on_bad_rows == "error":
            raise _with_hint(error)
        report.leave_out([error])

    mapped = _mapped(records, Columns(columns) if columns else None, group_by, on_bad)
    return grouped(mapped, group_by, on_bad, unused=unused)


def counted(records: Iterable[tuple[str, object]], report: RowReport) -> Records:
    """Count records as read."""
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
