"""Tokenised rows on disk, found again by everything they depend on.

<cache folder>/tokenised/<address>/
  rows.arrow   the queries (data/corpus.py)
  summary      what became of the rows, in JSON

The address is a hash of the sources' content, the tokenizer, the options and the code. One process
fills an entry in a hidden folder, which it renames at the end; others wait for it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from rrhf_fast.data.corpus import Corpus
from rrhf_fast.data.encode import encode
from rrhf_fast.data.fill import Findings, Recipe, fill, writes_date
from rrhf_fast.data.load import RowReport
from rrhf_fast.data.sources import InMemory, content_of
from rrhf_fast.data.tokenise import TokenCounts
from rrhf_fast.stages.files import disk_problem, write_text
from rrhf_fast.stages.lock import flock
from rrhf_fast.stages.outlet import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, SUMMARY = "rows.arrow", "summary"
# Whose versions decide how texts are rendered and split.
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "jmespath")
# Seconds between looks at an entry that another process fills, after which the wait is announced,
# and without any sign of work, after which it ends.
_LOOK, _ANNOUNCE, _SILENCE = 0.2, 2.0, 1800.0
# Seconds after which entries that no run used, and what killed processes left, are removed.
_UNUSED, _LEFT = 30 * 86400, 86400
_ENTRY = re.compile("[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.([0-9a-f]{32}|temporary)-[0-9a-f]{8}(\.old)?")
_CODE = Path(__file__).parents[1] / "data"
_PROBE = "  Why? \n\tThe 1st\u2019s na\u00efve."


@dataclass(frozen=True)
class Entry:
    """A folder with tokenised rows."""

    folder: Path
    seconds: float | None  # that it took to fill; None if it was there
    is_temporary: bool = False  # nothing identifies its rows, so no run finds it again

    def close(self) -> None:
        """Remove a temporary entry. Corpora that were opened from it remain usable."""
        if self.is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_entry(folder: Path) -> tuple[Corpus, Findings]:
    """The queries of an entry, and what became of the rows."""
    summary = json.loads((folder / SUMMARY).read_text())
    cut = TokenCounts(Counter(summary["cut"]))
    findings = Findings(RowReport.of_json(summary["report"]), cut, summary["max_id"])
    return Corpus(folder / ROWS), findings


def tokenised(
    sources: Sequence[str | InMemory],
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    *,
    folder: str | None = None,
    num_proc: int | None = None,
) -> Entry:
    """Find the entry of these rows, or fill it; waits while another process does.

    Args:
        folder: the cache folder; default $RRHF_FAST_CACHE, else rrhf_fast in the user's cache
            folder.
        num_proc: worker processes, see `fill`.

    Raises:
        ValueError: as `fill`; or the cache folder cannot be used, or the process that fills the
            entry has shown no sign of work for half an hour.
    """
    root, contents = _root(folder), [content_of(source) for source in sources]
    job = _Job(sources, contents, tokenizer, recipe, num_proc)
    address = None if root is None else _address(job)
    started = time.monotonic()
    if address is None:
        own = _new_folder(root or Path(tempfile.gettempdir()), "temporary")
        job.fill(own)
        return Entry(own, time.monotonic() - started, is_temporary=True)
    place, is_announced = root / address, False
    while not _is_whole(place):
        with _locked(root / f"{address}.lock") as is_locked:
            if is_locked is not False:
                if not _is_whole(place):
                    _renew(place, job, alone=bool(is_locked))
                return Entry(place, time.monotonic() - started)
        if not is_announced and time.monotonic() - started > _ANNOUNCE:
            say("waiting for another run, which tokenises the same rows")
            is_announced = True
        _wait(root, address, started)
    with contextlib.suppress(OSError):  # another user's
        os.utime(place)  # used today
    return Entry(place, None)


def _address(job: "_Job") -> str | None:
    """What an entry depends on, as the name of its folder; None if that cannot be known."""
    marks = _marks(job.tokenizer)
    if marks is None or None in job.contents:
        return None
    parts = {
        "code": [_hash(file) for file in sorted(_CODE.glob("*.py"))],
        "versions": [version(name) for name in _LIBRARIES],
        "sources": list(zip(map(str, job.sources), job.contents, strict=True)),
        "tokenizer": marks,
        "recipe": dataclasses.asdict(job.recipe),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _marks(tokenizer: "PreTrainedTokenizerBase") -> list | None:
    """Everything that decides how this tokenizer splits a text and renders messages; None for one
    with code of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    places = ("name_or_path", "vocab_file", "tokenizer_file", "tokenizer_object")
    options = {k: v for k, v in tokenizer.init_kwargs.items() if k not in places}
    own = [type(tokenizer).__name__, tokenizer.chat_template, options]
    # What was set after loading shows in what it does to a text.
    probe = _PROBE + "".join(tokenizer.all_special_tokens)
    tokens = [encode(tokenizer, [probe]), list(tokenizer(probe, verbose=False)["input_ids"])]
    # Earlier calls leave their cuts and padding in the backend, which each call sets anew.
    definition = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    flags = [tokenizer.split_special_tokens, tokenizer.special_tokens_map]
    return [*own, *flags, tokens, definition]


def cache_folder() -> Path:
    """The cache folder where no option names one. Raises RuntimeError if this user has no home."""
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/rrhf_fast"
    return Path(os.environ.get("RRHF_FAST_CACHE") or default).expanduser()


def _root(folder: str | None) -> Path | None:
    """The folder of all entries, without outdated ones; None where there is no place for it by
    default. Raises ValueError if a folder that was asked for cannot be used."""
    asked, name = folder, "data_cache_dir"
    if asked is None:
        asked, name = os.environ.get("RRHF_FAST_CACHE"), "RRHF_FAST_CACHE"
    try:
        root = (Path(folder).expanduser() if folder else cache_folder()) / "tokenised"
        root.mkdir(parents=True, exist_ok=True)
        _new_folder(root, "temporary").rmdir()
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        if not asked:
            return None
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name}: {asked} cannot be used ({reason})") from error
    for path in root.iterdir():
        age = _UNUSED if _ENTRY.fullmatch(path.name) else _LEFT
        is_ours = _ENTRY.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)
        if is_ours and time.time() - _last_change(path) > age:
            shutil.rmtree(path, ignore_errors=True)
    return root


def _last_change(folder: Path) -> float:
    """When anything in a folder was last written; now, if it vanishes meanwhile."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return time.time()


def _new_folder(root: Path, name: str) -> Path:
    folder = root / f".{name}-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


@contextmanager
def _locked(file: Path) -> Iterator[bool | None]:
    """Inside, this process has locked the file, which is there only meanwhile. Yields whether it
    has, or None where the file system has no locks. The lock ends with the process."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        is_locked = flock(handle)
        if is_locked:  # its former owner may have removed it in between
            try:
                is_locked = os.path.samestat(os.fstat(handle), file.stat())
            except FileNotFoundError:
                is_locked = False
        yield is_locked
    finally:
        if is_locked:
            file.unlink(missing_ok=True)
        os.close(handle)


def _is_whole(place: Path) -> bool:
    """Whether this is an undamaged entry that still holds today. Raises ValueError if it cannot be
    read."""
    try:
        summary = json.loads((place / SUMMARY).read_text())
        check = summary.pop("check")
        if summary["date"] not in (None, date.today().isoformat()):
            return False
        return check == _check(summary) and summary["hash"] == _hash(place / ROWS)
    except PermissionError as error:
        raise ValueError(f"data_cache_dir: {place} cannot be read ({error.strerror})") from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def _renew(place: Path, job: "_Job", *, alone: bool) -> None:
    """Fill an entry, in the place of a damaged or outdated one if there is one. `alone`: what
    others began is of killed processes."""
    if alone:
        for left in place.parent.glob(f".{place.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
    staging = _new_folder(place.parent, place.name)
    try:
        job.fill(staging)
        try:
            if place.exists():
                place.rename(staging.with_name(f"{staging.name}.old"))
            staging.rename(place)
        except OSError as error:  # where there are no locks, another process may have been first
            if not _is_whole(place):
                raise ValueError(f"data_cache_dir: {place}: {error.strerror}") from error
    finally:
        for left in place.parent.glob(f"{staging.name}*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _wait(root: Path, address: str, started: float) -> None:
    """Wait a moment for the process that fills an entry. Raises ValueError if it seems dead."""
    latest = max(map(_last_change, root.glob(f".{address}-*")), default=time.time())
    if time.monotonic() - started > _SILENCE and time.time() - latest > _SILENCE:
        problem = f"a process that holds {address}.lock has written nothing for half an hour"
        raise ValueError(f"data_cache_dir: {root}: {problem} (end it, or choose another folder)")
    time.sleep(_LOOK)


@dataclass(frozen=True)
class _Job:
    """What is to be tokenised, and how."""

    sources: Sequence[str | InMemory]
    contents: list
    tokenizer: "PreTrainedTokenizerBase"
    recipe: Recipe
    num_proc: int | None

    def fill(self, folder: Path) -> None:
        """Write an entry's files; removes the folder if that fails."""
        today = date.today().isoformat()
        try:
            options = self.sources, self.tokenizer, self.recipe
            findings = fill(folder / ROWS, *options, num_proc=self.num_proc)
            if [content_of(source) for source in self.sources] != self.contents:
                names = ", ".join(map(str, self.sources))
                raise ValueError(f"{names}: changed while it was read")
            templates = [self.tokenizer.chat_template, self.recipe.chat_template_kwargs]
            is_dated = findings.is_dated or writes_date(templates)
            summary = {
                "hash": _hash(folder / ROWS),
                "date": today if is_dated else None,
                "report": findings.report.as_json(),
                "cut": findings.counts.cut,
                "max_id": findings.max_id,
            }
            write_text(folder / SUMMARY, json.dumps(summary | {"check": _check(summary)}))
        except BaseException as error:
            was_there = folder.exists()
            shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            problem = disk_problem(error) or f"{folder}: {error.strerror}"
            if not was_there:
                problem = f"{folder} was removed while it was written"
            raise ValueError(f"data_cache_dir: {problem}") from error


def _check(summary: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(summary, sort_keys=True).encode())


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()
