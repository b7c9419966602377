"""Hostile inputs through the commands, and what must hold whatever they hold.

python -m tests.hostile.fuzz --seed 7                    # print one input and its outcome
python -m tests.hostile.fuzz --start 0 --count 50000     # a table of outcomes, and failing seeds

    a  a command returns 0 or 2, and raises nothing
    b  2: one line of error that names an option, or the file and the line of a damaged row
    c  0: every intact row is used, with its own scores; what was read was used or is counted
    d  what was written is strict JSON of valid Unicode, and our own reader reads it
    e  2: no output is left, nor a journal without results
    f  nothing printed can move the cursor of a terminal
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints
from unittest import mock

import yaml

from rrhf_fast.data.checks import visible
from tests.hostile.files import Written, write
from tests.hostile.inputs import TEMPLATE, Case, draw, value_of

# Seconds that an input may take; the slowest, a training step, takes one.
LIMIT = 60
MEMORY = Path("/dev/shm")
# Control characters and those that reorder text; a progress bar may return and move up.
UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
BARS = re.compile(r"[^\n]*\r|\x1b\[A|^(Loading weights|.*it/s|.*s/it).*$", re.MULTILINE)


class Failure(Exception):
    """Something that must hold does not."""


class TooLong(BaseException):
    """The input took longer than LIMIT; no handler of errors may take it for one."""


@dataclass
class Outcome:
    """What a command did: its exit code and what it printed."""

    code: int | None
    out: str
    err: str
    problem: str | None = None  # the traceback of an exception
    kind: str = ""  # for the table

    @property
    def errors(self) -> list[str]:
        lines = BARS.sub("", self.err).splitlines()
        return [line for line in lines if re.match(r"rrhf_fast\.\w+: error: ", line)]

    @property
    def message(self) -> str:
        return self.errors[0].partition(": error: ")[2] if self.errors else ""


# --- Running a command


_REPLACED = []


@functools.cache
def commands() -> dict:
    """The main functions. What loads the same model again and again is cached."""
    from rrhf_fast.model import decoder, sharded

    for module, name in ((decoder, "load_tokenizer"), (sharded, "empty_model")):
        _cache_everywhere(module, name)
    names = {"step": "train"}
    kinds = ("sample", "score", "train", "step", "evaluate", "iterate", "export")
    modules = {kind: import_module(f"rrhf_fast.{names.get(kind, kind)}.__main__") for kind in kinds}
    return {kind: module.main for kind, module in modules.items()}


def _cache_everywhere(module, name: str) -> None:
    """Cache a function that loads the demo's model or tokenizer, under all its imported names,
    until `forget`."""
    for stage in ("sample.run", "score.run", "evaluate.run", "train.trainer", "iterate.run"):
        import_module(f"rrhf_fast.{stage}")
    function = getattr(module, name)
    cached = functools.lru_cache(8)(function)
    _replace(name, function, cached)
    _REPLACED.append((name, cached, function))


def _replace(name: str, old, new) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, name, None) is old:
            setattr(module, name, new)


def forget() -> None:
    """Load models again from now on: other tests change what they loaded."""
    while _REPLACED:
        _replace(*_REPLACED.pop())
    commands.cache_clear()


def arguments(case: Case, written: Written | None, folder: Path) -> list[str]:
    """The command line of a case."""
    from rrhf_fast import demo

    model, options = str(demo.MODEL_DIR), {}
    if case.command == "export":
        options = {"checkpoint": str(folder), "output_dir": str(folder / "out")}
    elif case.command in ("sample", "score"):
        options = {"data": written.source, "output": str(folder / "out.jsonl")}
    elif case.command in ("train", "step"):
        options = {"train_data": written.source, "model_name_or_path": model}
        if case.command == "step":
            options |= {"output_dir": str(folder / "out"), "train_batch_size": "1"}
    else:
        options = {"data": written.source, "model_name_or_path": model}
        options |= {"output_dir": str(folder / "out"), "num_samples": "1", "num_bootstrap": "2"}
        options |= {"max_new_tokens": "3", "batch_size": "2"}
    if case.command == "iterate":
        options |= {"eval_data": written.source, "rounds": "1", "train.max_steps": "1"}
        options |= {"policies": "[{method: provided}]", "train.train_batch_size": "1"}
    if case.command in ("evaluate", "iterate"):
        # The demo's tokenizer has no template.
        options["chat_template_kwargs"] = json.dumps({"chat_template": TEMPLATE})
    options |= case.options
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def call(case: Case, words: list[str]) -> Outcome:
    """Run the command; stdout encodes as strictly as a terminal's."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")
    )
    code = problem = None
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    main, parse = commands()[case.command], import_module("rrhf_fast.stages.command").parse_config
    is_plain = case.absurd is None and case.seed % 16 and case.command not in ("iterate", "export")
    parse = quick_config if is_plain else parse
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch("rrhf_fast.stages.command.parse_config", parse),
        ):
            code = main(words)
    except (Exception, SystemExit, TooLong):
        problem = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Outcome(code, *texts, problem)


def quick_config(config_class: type, words: list[str], *_) -> object:
    """What `parse_config` makes of valid options, in a hundredth of its time."""
    kinds, options = get_type_hints(config_class), {}
    for word, value in zip(words[::2], words[1::2], strict=True):
        name = word.removeprefix("--")
        kind = kinds[name]
        is_text = str in (kind, *get_args(kind)) and get_origin(kind) is not list
        is_text = is_text and name != "columns"
        options[name] = value if is_text or get_origin(kind) is Literal else yaml.safe_load(value)
    return config_class(**options)


def _stop(*_) -> None:
    raise TooLong


def run(case: Case, folder: Path) -> Outcome:
    """Run a case in an empty folder and check all that must hold; raises Failure."""
    written = None if case.command == "export" else write(case, folder)
    outcome = call(case, arguments(case, written, folder))
    check(case, written, folder, outcome)
    return outcome


# --- What must hold


def check(case: Case, written: Written | None, folder: Path, outcome: Outcome) -> None:
    """Raise Failure if any of a to f does not hold."""
    if outcome.problem:
        raise Failure(f"a: {outcome.problem.strip().splitlines()[-1]}\n{outcome.problem}")
    if outcome.code not in (0, 2):
        raise Failure(f"a: exit code {outcome.code}: {outcome.err}")
    texts = outcome.out + BARS.sub("", outcome.err)
    if match := UNSAFE.search(texts):
        raise Failure(f"f: printed {match[0]!r} in {texts[max(0, match.start() - 80) :][:120]!r}")
    for path in folder.rglob("*"):
        if path.suffix in (".jsonl", ".json", ".journal") and path != (written and written.path):
            _check_json(path)
    left = [path.name for path in folder.rglob("*.saving")]
    if left:
        raise Failure(f"e: left {left}")
    if outcome.code == 2:
        _check_error(case, written, folder, outcome)
        return
    if outcome.errors:
        raise Failure(f"b: exit code 0 and {outcome.errors[0]}")
    outcome.kind = "used"
    if case.command in ("sample", "score"):
        _check_output(case, written, folder / "out.jsonl", outcome)
    elif case.command == "train" and case.absurd is None:
        _check_shown(case, written, outcome)


def _check_json(path: Path) -> None:
    def refuse(name: str):
        raise Failure(f"d: {path.name} holds {name}")

    for line in path.read_bytes().split(b"\n") if path.suffix != ".json" else [path.read_bytes()]:
        if line.strip():
            try:
                value = json.loads(line.decode(), parse_constant=refuse)
                json.dumps(value, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise Failure(f"d: {path.name}: {error}") from error


def _check_error(case: Case, written: Written | None, folder: Path, outcome: Outcome) -> None:
    """b and e: one line, which blames an option or a damaged row, and no output."""
    if len(outcome.errors) != 1:
        raise Failure(f"b: {len(outcome.errors)} lines of error: {outcome.err}")
    message = outcome.message
    outcome.kind = f"exit 2: {_kind_of(message, str(folder))}"
    if len(message) > 3000:
        raise Failure(f"b: a message of {len(message)} characters")
    output, journal = folder / "out.jsonl", folder / "out.jsonl.journal"
    if output.exists() or (journal.exists() and journal.read_bytes().count(b"\n") < 2):
        raise Failure("e: exit code 2 and an output, or a journal without results")
    if case.command == "export" or case.absurd:
        value = case.options.get(case.absurd or "", "") or "\n"
        named = (str(folder), value, f'key "{case.absurd}"')
        is_named = any(name in message for name in (*named, visible(value), f"--{case.absurd}"))
        if not re.match(r"[a-z_, ]+(\[\d+\])?[.a-z_]*: ", message) and not is_named:
            raise Failure(f"b: names neither option nor file: {message}")
        return
    if all(item.intact for item in case.items) and not case.damage_of_file:
        raise Failure(f"c: every row is intact, but: {message}")
    if str(written.path.parent) not in message:
        raise Failure(f"b: names no file: {message}")
    place = re.search(re.escape(str(written.path)) + r"(?::\d+|\[\d+\])", message)
    if place is None or case.is_broken:
        whole = "no usable row among the" in message or case.is_broken
        whole = whole or "no response could be scored" in message
        if not whole:
            raise Failure(f"b: names no line: {message}")
        if "no usable row" in message and not case.is_broken and _surely_used(case):
            raise Failure(f"c: intact rows, but: {message}")
        return
    damaged = {p for i, item in enumerate(case.items) if not item.intact for p in written.places[i]}
    if case.layout == "grouped":  # named by its first row
        groups = {item.group for item in case.items if not item.intact}
        damaged = {
            p
            for i, item in enumerate(case.items)
            if item.group in groups
            for p in written.places[i]
        }
    if place[0] not in damaged:
        raise Failure(f"c: blames the intact row {place[0]}: {message}")
    if case.skip and _surely_used(case):
        raise Failure(f"c: does not skip: {message}")


def _kind_of(message: str, folder: str) -> str:
    """A message without what differs from input to input."""
    text = message.replace(folder, "")
    text = re.sub(r"^/\S*: |^\[[^ ]*: ", "row: ", text)
    text = re.sub(r"found .*|\(.*|'.*'|\".*\"", "", text)
    return re.sub(r"\[\d+\]|\d+", "#", text)[:60].strip()


def _surely_used(case: Case) -> list[int]:
    """The items that must be used, whatever becomes of the others."""
    if case.is_broken or case.absurd:
        return []
    good = [i for i, item in enumerate(case.items) if item.intact]
    if case.layout == "grouped" and case.command in ("train", "step"):
        spoilt = {item.group for item in case.items if not item.intact}
        good = [i for i in good if case.items[i].group not in spoilt]
    return good


def counts_of(text: str) -> dict[str, int]:
    """Numbers by name in the line of counts that a stage prints."""
    lines = [line for line in text.splitlines() if re.match(r"\d+ rows\b", line)]
    if not lines:
        raise Failure(f"c: printed no counts: {text}")
    pairs = re.findall(r"(\d+) ([a-z_]+)(?=,|$)", lines[-1])
    return {name: int(count) for count, name in pairs}


def skipped_by_kind(text: str) -> tuple[int, int]:
    """Rows that were skipped, in all and as the sum of their kinds; likewise must be equal."""
    match = re.search(r"^\S.*?: (\d+) rows? skipped: (.*)$", text, re.MULTILINE)
    if match is None:
        return 0, 0
    return int(match[1]), sum(int(n) for n in re.findall(r"(?:^|; )(\d+) ", match[2]))


def _check_output(case: Case, written: Written, path: Path, outcome: Outcome) -> None:
    """c and d for sample and score."""
    from rrhf_fast.data.load import load_drafts

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = counts_of(outcome.out)
    skipped = counts.get("skipped", 0)
    if skipped:
        outcome.kind = "used and skipped"
    if counts["rows"] != len(rows):
        raise Failure(f"c: {counts['rows']} rows counted, {len(rows)} written")
    name = "responses" if case.command == "sample" else "scored"
    if counts.get(name, 0) != sum(len(row["responses"]) for row in rows):
        raise Failure(f"c: {counts.get(name, 0)} {name} counted")
    if skipped_by_kind(outcome.out) != (skipped, skipped):
        raise Failure(f"c: {skipped} rows skipped, {skipped_by_kind(outcome.out)} by kind")
    if not case.skip and (skipped or counts.get("bad_responses")) and not case.absurd:
        raise Failure(f"c: skipped without being told to: {counts}")
    known = case.layout != "grouped" and case.absurd not in ("data", "group_by", "columns")
    if known and written.rows is not None and len(rows) + skipped != written.rows:
        raise Failure(f"c: {written.rows} rows read, {len(rows)} used, {skipped} skipped")
    for number in _surely_used(case):
        _check_row(case, number, rows)
    if rows:
        try:
            drafts, _ = load_drafts(str(path))
        except ValueError as error:
            raise Failure(f"d: the output cannot be read: {error}") from error
        for draft, row in zip(drafts, rows, strict=True):
            if (draft.prompt, draft.responses) != (row["prompt"], row["responses"]):
                raise Failure(f"d: the output reads differently: {draft}")


def _check_row(case: Case, number: int, rows: list[dict]) -> None:
    """An intact row is there, whole, with its own scores."""
    item = case.items[number]
    if case.layout == "transcripts" and case.options.get("apply_chat_template") == "true":
        text = item.prompt.removeprefix("\n\nHuman:").removesuffix("\n\nAssistant:").strip()
        item = replace(item, prompt=text, responses=[text.strip() for text in item.responses])
    if case.layout == "grouped":
        found = [row for row in rows if item.responses[0] in row["responses"]]
    else:
        found = [row for row in rows if row.get("uid") in (number, str(number))]  # a float, too
        found = [row for row in found if row["responses"] == item.responses]
    if not found:
        raise Failure(f"c: lost the intact row {number}")
    row = found[0]
    prompts = (item.prompt, [{"role": "user", "content": item.prompt}], None)
    if item.prompt is not None and row["prompt"] not in prompts:
        raise Failure(f"c: row {number} has the prompt {row['prompt']!r}")
    if case.command == "score":
        for text, score in zip(row["responses"], row["scores"], strict=True):
            if score != value_of(text):
                raise Failure(f"c: {text!r} has the score {score}")


def _check_shown(case: Case, written: Written, outcome: Outcome) -> None:
    """c for the rows that `train` shows: where they are, and the scores of their responses."""
    shown: dict[str, list[str]] = {}
    for line in outcome.out.split("\n"):
        if match := re.match(r"(\S.*): prompt, \d+ tokens, not learned$", line):
            scores = shown.setdefault(match[1], [])
        elif match := re.match(r"responses\[\d+\], score (\S+), \d+ tokens, learned$", line):
            scores.append(match[1])
    skipped, by_kind = skipped_by_kind(outcome.out)
    if skipped:
        outcome.kind = "used and skipped"
    if skipped != by_kind:
        raise Failure(f"c: {skipped} rows skipped, {by_kind} by kind")
    if case.layout != "grouped" and written.rows not in (None, len(shown) + skipped):
        raise Failure(f"c: {written.rows} rows read, {len(shown)} shown, {skipped} skipped")
    for number in _surely_used(case):
        item = case.items[number]
        of_group = [i for i, other in enumerate(case.items) if other.group == item.group]
        expected = [f"{score:g}" for i in of_group for score in case.items[i].scores]
        if shown.get(written.places[of_group[0]][0]) != expected:
            raise Failure(f"c: lost the intact row {number}, or its scores {expected}: {shown}")


# --- Many inputs


def try_seed(seed: int) -> tuple[str, str, str | None]:
    """Command, outcome, and the failure if there is one, of a seed."""
    case = draw(seed)
    outcome, failure = attempt(case)
    return case.command, outcome, failure


def attempt(case: Case) -> tuple[str, str | None]:
    """Run a case in a folder of its own; returns its outcome, and its failure or None."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    try:
        return run(case, folder).kind, None
    except Failure as failure:
        return "FAILED", str(failure).replace(str(folder), "")
    finally:
        shutil.rmtree(folder)


def shrink(case: Case, failure: str) -> Case:
    """Drop rows and damage while the case still fails in the same way."""
    kind, at = failure[:12], 0
    while at < len(case.items) and len(case.items) > 1:
        fewer = replace(case, items=case.items[:at] + case.items[at + 1 :])
        case, at = (fewer, at) if (attempt(fewer)[1] or "")[:12] == kind else (case, at + 1)
    for name in case.damage:
        less = replace(case, damage=[other for other in case.damage if other != name])
        case = less if (attempt(less)[1] or "")[:12] == kind else case
    return case


def try_range(seeds: range) -> tuple[Counter, dict[int, str]]:
    """Outcomes by command, and failures by seed."""
    table, failures = Counter(), {}
    for seed in seeds:
        command, outcome, failure = try_seed(seed)
        table[command, outcome] += 1
        if failure:
            failures[seed] = failure
    return table, failures


def _in_processes(seeds: range, jobs: int) -> Iterator[tuple[Counter, dict[int, str]]]:
    parts = [seeds[i : i + 250] for i in range(0, len(seeds), 250)]
    if jobs == 1:
        yield from map(try_range, parts)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(try_range, parts)


def show_table(table: Counter) -> str:
    lines = [
        f"{count:7}  {command:9} {outcome}" for (command, outcome), count in table.most_common()
    ]
    return "\n".join(lines)


def show(seed: int) -> int:
    """Print the input of a seed, what became of it and, if it fails, the smallest that does."""
    case = draw(seed)
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    written = None if case.command == "export" else write(case, folder)
    print(f"{case.command}, {case.layout}, {case.kind}, damage {case.damage}")
    print(" ".join(map(repr, arguments(case, written, folder))))
    for item in case.items:
        print(f"  {'intact' if item.intact else 'spoilt'} {item.text or item.record!r:.600}")
    outcome = call(case, arguments(case, written, folder))
    print(f"exit code {outcome.code}\n{outcome.out}{outcome.err!r}\n{outcome.problem or ''}")
    shutil.rmtree(folder)
    kind, failure = attempt(case)
    print(f"FAILED {failure}" if failure else kind)
    if failure:
        small = shrink(case, failure)
        rows = [item.text or item.record for item in small.items]
        print(f"with {len(rows)} rows: {rows!r:.3000}")
    return int(failure is not None)


def main() -> int:
    """Run one seed, or a range of them; returns 1 if any fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="only this one, and print it")
    parser.add_argument(
        "--start", type=int, default=int(time.time()) * 1000, help="default: the time"
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    if options.seed is not None:
        return show(options.seed)
    seeds, began = range(options.start, options.start + options.count), time.monotonic()
    table, failures, done = Counter(), {}, 0
    for counts, failed in _in_processes(seeds, options.jobs):
        table, failures, done = table + counts, failures | failed, done + counts.total()
        rate = done / (time.monotonic() - began)
        print(
            f"up to {seeds[done - 1]}: {rate:.0f} inputs/s, {len(failures)} failed", file=sys.stderr
        )
    print(show_table(table))
    for seed, failure in failures.items():
        print(f"{seed}: {failure.splitlines()[0][:300]}")
    return int(bool(failures))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.exit(main())
