"""The journal loses no finished unit, wherever its process is killed."""

import errno
import fcntl
import json
import multiprocessing
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.stages.files import write_rows
from rrhf_fast.stages.journal import Journal, fingerprint, is_finished

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def work(output, results):
    """Do the missing units; returns the keys done in this call."""
    done = []
    with Journal(output, "f") as journal:
        for key, result in results.items():
            if key not in journal.done:
                journal.write(key, result)
                done.append(key)
        journal.finish([{"result": journal.done[key]} for key in results])
    return done


def test_a_resumed_run_says_so(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    with Journal(output, "f") as journal:
        journal.write("a", 1)
    assert capsys.readouterr().out == ""
    work(output, {"a": 1, "b": 2})
    said = f"resuming: {output}.journal holds 1 finished part of the work\n"
    assert capsys.readouterr().out == said


@given(st.dictionaries(st.text(), JSON, max_size=6), st.lists(st.floats(0, 1), max_size=3))
def test_a_cut_anywhere_ends_with_the_same_file(results, cuts):
    with TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole.jsonl"), Path(folder, "cut.jsonl")
        work(whole, results)
        kept = -1  # lines after the first
        for where in cuts:
            with Journal(cut, "f") as journal:
                assert len(journal.done) == max(kept, 0)
                for key in results.keys() - journal.done.keys():
                    journal.write(key, results[key])
            written = journal.path.read_bytes()
            journal.path.write_bytes(written[: round(where * len(written))])
            kept = written[: round(where * len(written))].count(b"\n") - 1
        assert len(work(cut, results)) == len(results) - max(kept, 0)
        assert cut.read_bytes() == whole.read_bytes()
        assert sorted(path.name for path in Path(folder).iterdir()) == ["cut.jsonl", "whole.jsonl"]


@given(
    st.dictionaries(st.text(), JSON, max_size=8),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.integers(0, 3),
)
def test_what_killed_ranks_left_is_continued(results, ranks, cuts, moved):
    """The lines of each rank are cut anywhere, and some of a shard were moved before it went."""
    with TemporaryDirectory() as folder:
        output, whole = Path(folder, "rows.jsonl"), Path(folder, "whole.jsonl")
        lines = {rank: [b'{"fingerprint": "f"}\n'] for rank in range(4)}
        for (key, result), rank in zip(results.items(), ranks, strict=False):
            lines[rank].append(json.dumps({"key": key, "result": result}).encode() + b"\n")
        lines[0] += lines[3][1 : 1 + moved]
        kept = {}
        for rank, cut in enumerate(cuts):
            written = b"".join(lines[rank])
            written = written[: round(cut * len(written))] if rank else written
            Path(f"{output}.journal" + f".{rank}" * (rank > 0)).write_bytes(written)
            for line in written.splitlines(keepends=True)[1:]:
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    kept[record["key"]] = record["result"]
        for _ in range(2):  # the second time from one file
            with Journal(output, "f") as journal:
                assert journal.done == kept
            assert [path.name for path in Path(folder).iterdir()] == ["rows.jsonl.journal"]
        work(whole, results)
        assert len(work(output, results)) == len(results) - len(kept)
        assert output.read_bytes() == whole.read_bytes()
        assert not list(Path(folder).glob("*.journal*"))


def test_a_journal_of_another_rank_that_cannot_be_continued_is_named(tmp_path):
    output, shard = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.journal.1"
    for content, problem in (
        (FIRST + LINE + b"{}\n" + LINE, "journal.1 is damaged at line 3 "),
        (FIRST + LINE.replace(b"1", b"2"), "journal.1 is damaged at line 2 .a second result for a"),
        (FIRST.replace(b"f", b"g", 1) + LINE, "journal.1 is damaged at line 1 "),
        (b'{"fingerprint": "g"}\n' + LINE.replace(b"a", b"b"), "journal.1 .*other options"),
    ):
        (tmp_path / "rows.jsonl.journal").write_bytes(FIRST + LINE)
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            Journal(output, "f")
        assert shard.read_bytes() == content
        assert (tmp_path / "rows.jsonl.journal").read_bytes() == FIRST + LINE
    with shard.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # a rank of a run whose first rank died lives on
        with pytest.raises(ValueError, match="another process is writing"):
            Journal(output, "f", overwrite=True)
    with Journal(output, "f", overwrite=True) as journal:
        assert journal.done == {} and not shard.exists()


def test_a_crash_before_the_journal_is_deleted_is_harmless(tmp_path):
    output = tmp_path / "rows.jsonl"
    with Journal(output, "f") as journal:
        journal.write("a", 1)
        write_rows(output, [{"result": 1}])  # finish() without deleting the journal
    assert work(output, {"a": 1}) == []
    assert output.read_text() == '{"result": 1}\n' and not journal.path.exists()


def test_files_of_other_runs_are_refused(tmp_path):
    output = tmp_path / "rows.jsonl"
    with Journal(output, "f") as journal:
        journal.write("a", 1)
        with pytest.raises(ValueError, match="another process is writing"):
            Journal(output, "f")
    with pytest.raises(ValueError, match="other options"):
        Journal(output, "g")
    assert Journal(output, "f").done == {"a": 1}
    with Journal(output, "g", overwrite=True) as journal:
        assert journal.done == {}
        journal.finish([])
    with pytest.raises(ValueError, match="exists already"):
        Journal(output, "g")
    journal.path.write_text("[]\n{}\n")
    with pytest.raises(ValueError, match="damaged"):
        Journal(output, "g")
    with pytest.raises(ValueError, match="cannot be written"):
        Journal(output / "below.jsonl", "g")


def test_overwrite_discards_the_journal_of_the_same_options(tmp_path):
    with Journal(tmp_path / "rows.jsonl", "f") as journal:
        journal.write("a", 1)
    with Journal(tmp_path / "rows.jsonl", "f", overwrite=True) as journal:
        assert journal.done == {}
        journal.write("a", 2)
    assert Journal(tmp_path / "rows.jsonl", "f").done == {"a": 2}


def test_forgotten_units_can_be_redone(tmp_path):
    with Journal(tmp_path / "rows.jsonl", "f") as journal:
        for key in "abc":
            journal.write(key, 1)
        journal.forget(["a", "c"])
        journal.write("a", 2)
    with Journal(tmp_path / "rows.jsonl", "f") as journal:
        assert journal.done == {"b": 1, "a": 2}
        journal.forget(["a", "b"])
    Journal(tmp_path / "rows.jsonl", "g").__exit__(None)  # no results recorded


def test_a_run_without_results_blocks_no_other(tmp_path):
    output = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError), Journal(output, "f"):
        raise ValueError
    assert not list(tmp_path.iterdir())
    Journal(output, "f").__exit__(None)  # killed
    write_rows(output, [])
    with pytest.raises(ValueError, match="exists already"):  # not this run's output
        Journal(output, "g")
    output.unlink()
    with Journal(output, "g") as journal:
        assert journal.done == {}


def test_threads_write_complete_lines(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with Journal(tmp_path / "rows.jsonl", "f") as journal, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: journal.write(str(i), "x" * 5000), range(50)))
    assert len([json.loads(line) for line in journal.path.read_text().splitlines()]) == 51


def test_different_values_have_different_fingerprints():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(1), fingerprint(2), fingerprint("1"), fingerprint(1, 2)}) == 4
    rows = [[], [1], [1, 2], ["1\n2"], [[1, 2]]]
    assert len({fingerprint(1, rows=iter(some)) for some in rows}) == len(rows)
    assert fingerprint(1, rows=[{"a": 1, "b": 2}]) == fingerprint(1, rows=[{"b": 2, "a": 1}])


def _hold_lock(path, ready, leave):
    with Journal(path, "f"):
        ready.set()
        leave.wait()


def test_a_killed_process_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=_hold_lock, args=(tmp_path / "rows.jsonl", ready, leave))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match="another process is writing"):
        Journal(tmp_path / "rows.jsonl", "f")
    process.kill()
    process.join()
    Journal(tmp_path / "rows.jsonl", "f").__exit__(None)


FIRST, LINE = b'{"fingerprint": "f"}\n', b'{"key": "a", "result": 1}\n'
DAMAGED = {
    "a line in the middle": (FIRST + LINE[:9] + b"\n" + LINE, 2, "not JSON"),
    "a doubled key": (FIRST + LINE + LINE, 3, "a second result for a"),
    "a repeated name": (FIRST + b'{"key": "a", "key": "b", "result": 1}\n', 2, "a repeated name"),
    "a foreign line": (FIRST + b'{"prompt": "Why?"}\n' + LINE, 2, "not a record of a journal"),
    "a list": (FIRST + b"[1]\n", 2, "not a JSON object"),
    "an empty line": (FIRST + b"\n" + LINE, 2, "not JSON"),
    "NULs in the middle": (FIRST + b"\0" * 30 + b"\n" + LINE, 2, "not JSON"),
    "NaN": (FIRST + b'{"key": "a", "result": NaN}\n', 2, "NaN, which JSON lacks"),
    "another encoding": (FIRST + LINE.decode().encode("utf-16") + b"\n" + LINE, 2, "not JSON"),
    "deep nesting": (
        FIRST + b'{"key": "a", "result": ' + b"[" * 10**5 + b"\n" + LINE,
        2,
        "not JSON",
    ),
    "a long integer": (FIRST + b'{"key": "a", "result": ' + b"9" * 5000 + b"}\n", 2, "not JSON"),
    "an odd key": (FIRST + b'{"key": 1, "result": 1}\n', 2, "not a record of a journal"),
    "an odd result": (
        FIRST + b'{"key": "a", "result": "x"}\n',
        2,
        "that this stage does not write",
    ),
    "forgotten twice": (FIRST + b'{"forgotten": ["a"]}\n', 2, "forgets what it does not hold"),
    "forgotten oddly": (FIRST + b'{"forgotten": [[]]}\n', 2, "forgets what it does not hold"),
    "another first line": (b'{"step": 1}\n' + LINE, 1, "no journal of rrhf_fast begins so"),
    "a file of someone else": (b"precious", 1, "not JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_journal_is_refused_and_kept(name, tmp_path):
    content, line, problem = DAMAGED[name]
    output, path = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.journal"
    path.write_bytes(content)
    expected = f"output: {path} is damaged at line {line} \\(.*{problem}"
    with pytest.raises(ValueError, match=expected):
        Journal(output, "f", accepts=lambda key, result: type(result) is int)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("end", [LINE[:-1], LINE[:5], b"\0" * 4096, LINE[:9] + b"\0" * 20 + b"\n"])
@pytest.mark.parametrize("whole", [b"", FIRST, FIRST + b'{"key": "b", "result": 2}\n'])
def test_what_a_loss_of_power_leaves_at_the_end_is_dropped(whole, end, tmp_path):
    if not whole:
        end = end.replace(LINE[:5], FIRST[:5])
        end = FIRST[:9] if end.startswith(b'{"') else end
    output = tmp_path / "rows.jsonl"
    (tmp_path / "rows.jsonl.journal").write_bytes(whole + end)
    with Journal(output, "f") as journal:
        assert journal.done == ({"b": 2} if whole.count(b"\n") > 1 else {})
        journal.write("a", 1)
    assert Journal(output, "f").done.get("a") == 1


def test_an_output_of_someone_else_survives_a_torn_journal(tmp_path):
    """A journal killed before its first line says nothing about whose the output is."""
    output = tmp_path / "rows.jsonl"
    output.write_text("precious")
    (tmp_path / "rows.jsonl.journal").write_bytes(FIRST[:9])
    with pytest.raises(ValueError, match="exists already"):
        Journal(output, "f")
    assert output.read_text() == "precious"


def test_a_journal_is_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "rows.jsonl.journal").symlink_to(victim)
    with pytest.raises(ValueError, match="output: .*cannot be written .its journal is a link"):
        Journal(tmp_path / "rows.jsonl", "f")
    assert victim.read_text() == "precious"
    os.mkfifo(tmp_path / "pipe.journal")
    with pytest.raises(ValueError, match="output: .*cannot be written"):
        Journal(tmp_path / "pipe", "f")


def test_a_result_that_json_lacks_is_an_error_and_leaves_no_line(tmp_path):
    with Journal(tmp_path / "rows.jsonl", "f") as journal:
        journal.write("a", 1)
        with pytest.raises(ValueError, match="not JSON compliant"):
            journal.write("b", float("nan"))
        journal.write("b", 2)
    assert Journal(tmp_path / "rows.jsonl", "f").done == {"a": 1, "b": 2}


def test_a_refused_write_leaves_no_half_line(tmp_path, monkeypatch):
    """Other threads go on to write once there is space again."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(tmp_path / "rows.jsonl", "f") as journal:
        journal.write("a", 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left on device: .*rows.jsonl.journal"):
                journal.write("b", 2)
        journal.write("c", 3)
    assert Journal(tmp_path / "rows.jsonl", "f").done == {"a": 1, "c": 3}


def test_a_file_is_finished_once_its_journal_is_gone(tmp_path):
    output = tmp_path / "rows.jsonl"
    assert not is_finished(output)
    with Journal(output, "f") as journal:
        write_rows(output, [])
        assert not is_finished(output)
        journal.finish([])
    assert is_finished(output)


def test_a_journal_that_its_holder_removed_is_not_written_on(tmp_path, monkeypatch):
    """The other process finished between this one's opening of the journal and its lock."""
    output, lock = tmp_path / "rows.jsonl", fcntl.flock
    first = Journal(output, "f")

    def late(file, how):
        monkeypatch.undo()
        first.finish([{"a": 1}])
        first.__exit__(None)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="exists already"):
        Journal(output, "f")
    assert list(tmp_path.iterdir()) == [output]
