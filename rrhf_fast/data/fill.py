"""Sources -> a file of tokenised queries, by worker processes, in the order of the rows.

This process reads chunks of records; workers decode, check and tokenise them, and this process
writes what they return. So memory holds a few chunks per worker, whatever the number of rows.
"""

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from rrhf_fast.data.corpus import SCHEMA, as_batch
from rrhf_fast.data.files import Chunk, chunked
from rrhf_fast.data.load import RowReport, counted, joined, parsed, row_parser
from rrhf_fast.data.sources import InMemory, read_chunks, read_records
from rrhf_fast.data.tokenise import TokenCounts, tokenise_some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Chunks that are done here, before processes are started for the others.
_CHUNKS_HERE = 3
# Seconds without a bar: small files need none.
_BAR_DELAY = 2.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Recipe:
    """How rows become tokens: arguments of `load_rows` and `tokenise_rows`."""

    on_bad_rows: str = "error"
    use_responses: str = "all"
    stop_strings: list[str] = field(default_factory=list)
    columns: dict[str, str] | None = None
    group_by: str | None = None
    apply_chat_template: bool = False
    max_length: int = 2048
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Findings:
    """What became of the rows of some chunks."""

    report: RowReport = field(default_factory=RowReport)
    counts: TokenCounts = field(default_factory=TokenCounts)
    max_id: int = 0  # the largest token
    is_dated: bool = False  # a row brings a chat template that writes the date

    def add(self, other: "Findings") -> None:
        """Add the findings of later chunks."""
        self.report.add(other.report)
        self.counts.cut.update(other.counts.cut)
        self.max_id = max(self.max_id, other.max_id)
        self.is_dated |= other.is_dated


def writes_date(templates: object) -> bool:
    """Whether any of these chat templates calls the function that gives the date."""
    return "strftime_now" in json.dumps(templates, default=str)


def fill(
    file: Path,
    sources: Sequence[str | InMemory],
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    *,
    num_proc: int | None = None,
) -> Findings:
    """Tokenise the rows of `sources` into an Arrow file.

    Args:
        num_proc: worker processes; default one per core that this process may use.

    Raises:
        ValueError: a source cannot be read or no row is usable, or the tokenizer does not serve.
        BadRow: a row is bad and `recipe.on_bad_rows` is "error".
        OSError: the file cannot be written.
    """
    tokeniser, findings = _Tokeniser(tokenizer, recipe), Findings()
    chunks = _chunks(sources, recipe, findings.report)
    options = {"unit": "row", "desc": "tokenising", "disable": None, "delay": _BAR_DELAY}
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
        tqdm(**options) as progress,
        # An error here ends the workers at once.
        contextlib.closing(_in_order(tokeniser, chunks, num_proc or len(_cores()))) as parts,
    ):
        for part, batch in parts:
            findings.add(part)
            if batch is not None:
                writer.write_batch(batch)
            progress.update(part.report.read)
    findings.report.check_kept(sources)
    return findings


def _chunks(
    sources: Sequence[str | InMemory], recipe: Recipe, report: RowReport
) -> Iterator[Chunk]:
    """The chunks of all sources. Rows joined by `group_by` are read, and reported, here."""
    if recipe.group_by is None:
        for source in sources:
            yield from read_chunks(source)
        return
    records = counted((item for source in sources for item in read_records(source)), report)
    options = recipe.on_bad_rows, recipe.columns, recipe.group_by
    yield from chunked(joined(records, report, *options, report.unused))


@dataclass
class _Tokeniser:
    """A chunk -> what its rows are in tokens. Runs in worker processes."""

    tokenizer: "PreTrainedTokenizerBase"
    recipe: Recipe

    def __call__(self, chunk: Chunk) -> tuple[Findings, pa.RecordBatch | None]:
        recipe, findings = self.recipe, Findings()
        is_joined = recipe.group_by is not None
        rows = parsed(
            chunk.records() if is_joined else counted(chunk.records(), findings.report),
            findings.report,
            row_parser(recipe.on_bad_rows, recipe.use_responses, recipe.stop_strings),
            recipe.on_bad_rows,
            None if is_joined else recipe.columns,
            recipe.apply_chat_template,
            unused=findings.report.unused,
        )
        rows = list(rows)
        queries, findings.counts = tokenise_some(
            rows,
            self.tokenizer,
            findings.report,
            max_length=recipe.max_length,
            max_prompt_length=recipe.max_prompt_length,
            max_response_length=recipe.max_response_length,
            chat_template_kwargs=recipe.chat_template_kwargs,
            on_bad_rows=recipe.on_bad_rows,
        )
        if not queries:
            return findings, None
        findings.report.kept = len(queries)
        findings.is_dated = writes_date([row.chat_template_kwargs for row in rows])
        findings.max_id = max(
            int(ids.max()) for query in queries for ids in (query.prompt_ids, *query.response_ids)
        )
        return findings, as_batch(queries)


def _in_order(
    work: Callable[[Chunk], Any], chunks: Iterable[Chunk], num_proc: int
) -> Generator[Any]:
    """Yield work(chunk) in the order of the chunks; the first ones are done in this process, and
    all where processes cannot be forked."""
    chunks = iter(chunks)
    few = None if num_proc == 1 or not sys.platform.startswith("linux") else _CHUNKS_HERE
    yield from map(work, itertools.islice(chunks, few))
    if (following := next(chunks, None)) is None:
        return
    # Forked, so that a user's script needs no `if __name__ == "__main__"` and nothing is imported
    # or sent again.
    context, others = multiprocessing.get_context("fork"), set(multiprocessing.active_children())
    options = {"initializer": _begin, "initargs": (work, os.getpid(), _cores())}
    with ProcessPoolExecutor(num_proc, context, **options) as pool:
        waiting, is_done = deque(), False
        try:
            for chunk in itertools.chain([following], chunks):
                with _signals_held():
                    waiting.append(pool.submit(_work, chunk))  # the first one forks
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            is_done = True
        except BrokenProcessPool as error:
            problem = "a process that tokenises was killed; lower --dataset_num_proc"
            raise MemoryError(problem) from error
        finally:
            if not is_done:  # something failed, and what the processes do is of no use
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that arrive inside are handled at the end. What a handler raises while a process is
    forked, in Python's own hooks of os.fork, is dropped, and Ctrl-C would do nothing; what it
    raises while a queue takes an item may leave the queue's lock taken."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main one
        numbers = []
    handlers = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    arrived: list[int] = []
    is_held = True

    def hold(number: int, frame: object) -> None:
        if is_held:
            arrived.append(number)
        else:
            handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        is_held = False
        with contextlib.ExitStack() as last:  # each is done, whatever others raise
            for number in reversed(arrived):
                last.callback(signal.raise_signal, number)
            for number, handler in handlers.items():  # before those above
                last.callback(signal.signal, number, handler)


_job: Callable[[Chunk], Any] | None = None  # of a worker process


def _begin(work: Callable[[Chunk], Any], parent: int, cores: set[int]) -> None:
    """Start a worker."""
    global _job
    _job = work
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)
    # Ctrl-C and its like reach this process's parent, too, which ends it, by SIGTERM if need be.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent killed ends it as well
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker per core


def _work(chunk: Chunk) -> Any:
    return _job(chunk)


def _cores() -> set[int]:
    """The cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    cores = os.sched_getaffinity(0)
    if os.environ.get("OMP_PROC_BIND", "false").lower() != "false":
        cores |= os.sched_getaffinity(os.getppid())  # OpenMP has bound this thread to one of them
    return cores
