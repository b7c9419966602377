"""Files are replaced in one step, through names that nobody else can use."""

import errno
import json
import math
import os
import threading

import pytest

from rrhf_fast.stages.files import disk_problem, naming, replacing, to_json, write_rows, write_text


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_text(file, "earlier")
    with pytest.raises(OSError), replacing(file) as staging:
        staging.write_text("half")
        raise OSError
    assert file.read_text() == "earlier"
    with pytest.raises(TypeError):
        write_rows(file, [{"a": 1}, {"a": object()}])
    assert file.read_text() == "earlier"
    write_rows(file, [{"a": "é"}])
    assert file.read_text() == '{"a": "\\u00e9"}\n' and list(tmp_path.iterdir()) == [file]


def test_a_link_in_the_way_is_not_followed(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "rows.jsonl"
    victim.write_text("precious")
    (tmp_path / "rows.jsonl.saving").symlink_to(victim)
    write_text(file, "new")
    assert victim.read_text() == "precious" and file.read_text() == "new"


def test_two_writers_share_no_file(tmp_path):
    """Whoever ends last wins, and the other's start removes nothing of a living writer."""
    file = tmp_path / "rows.jsonl"
    with replacing(file) as one, replacing(file) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one" and list(tmp_path.iterdir()) == [file]

    def write(text):
        for _ in range(50):
            write_text(file, text * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert file.read_text() in ("a" * 1000, "b" * 1000) and list(tmp_path.iterdir()) == [file]


def test_what_a_dead_writer_left_is_removed_by_the_next(tmp_path):
    file = tmp_path / "rows.jsonl"
    if (pid := os.fork()) == 0:
        with replacing(file) as staging:
            staging.write_text("half")
            os._exit(0)
    os.waitpid(pid, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".rows.jsonl.") and left.name.endswith(".saving")
    others = tmp_path / ".other.jsonl.01234567.saving"
    others.write_text("not ours")
    write_text(file, "new")
    assert sorted(tmp_path.iterdir()) == sorted([others, file])


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    file = tmp_path / ("é" * 123 + ".jsonl")  # 252 bytes
    write_rows(file, [{"a": 1}])
    assert list(tmp_path.iterdir()) == [file]


def test_json_has_no_nan():
    record = {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf}}
    assert json.loads(to_json(record)) == {"a": [None, 1.5, [None]], "b": {"c": None}}


@pytest.mark.parametrize(
    "code, problem",
    [
        (errno.ENOSPC, "rows could not be written (No space left on device)"),
        (errno.EDQUOT, "rows could not be written (Disk quota exceeded)"),
        (errno.EROFS, "rows could not be written (Read-only file system)"),
        (errno.EFBIG, "rows could not be written (File too large)"),
        (errno.EIO, "rows could not be read or written (Input/output error)"),
        (errno.EMFILE, "rows could not be read or written (Too many open files)"),
        (errno.ENOENT, None),
        (errno.EACCES, None),
        (errno.EPIPE, None),
    ],
)
def test_a_disk_problem_names_the_file(code, problem, tmp_path):
    def fail():
        with naming("rows"):
            raise OSError(code, os.strerror(code))

    with pytest.raises(OSError) as raised:
        fail()
    assert disk_problem(raised.value) == problem
    with pytest.raises(RuntimeError) as raised:
        try:
            fail()
        except OSError as error:
            raise RuntimeError("torch") from error
    assert disk_problem(raised.value) == problem


def test_a_quoted_disk_problem_counts_unless_it_is_a_mistake():
    text = "I/O error: No space left on device (os error 28)"
    problem = "a file could not be written (No space left on device)"
    assert disk_problem(RuntimeError(text)) == problem
    assert disk_problem(ValueError(f"rows.jsonl:1: prompt: {text}")) is None
