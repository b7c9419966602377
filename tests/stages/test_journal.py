"""The journal loses no finished unit, wherever its process is killed."""

import json
import multiprocessing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast.stages.files import write_rows
from rrhf_fast.stages.journal import Journal, fingerprint

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
