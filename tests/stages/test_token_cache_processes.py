"""Several processes that fill the cache of rows in tokens: none is left over, none waits for one
that was killed, and no signal is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rrhf_fast import demo
from rrhf_fast.data import fill

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes are forked on Linux"
)

# Tokenises a file, slowly enough to be met.
SLOW = """
import os, signal, sys, time
from rrhf_fast import demo
from rrhf_fast.data import files, fill
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.stages import token_cache

files._CHUNK_BYTES = 4096
work, own = fill._Tokeniser.__call__, os.getpid()
def slow(self, chunk):
    if os.getpid() != own:
        time.sleep(float(sys.argv[3]))
    return work(self, chunk)
fill._Tokeniser.__call__ = slow
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
number = int(sys.argv[4])
if number:
    os.register_at_fork(after_in_parent=lambda: os.kill(own, number))
tokenizer = load_tokenizer(str(demo.MODEL_DIR))
print("ready", flush=True)
options = {"folder": sys.argv[2], "num_proc": 2}
entry = token_cache.tokenised([sys.argv[1]], tokenizer, fill.Recipe(), **options)
print("new" if entry.seconds is not None else "found", entry.folder.name)
"""


def write(tmp_path):
    """80 rows in a file."""
    lines = demo.TRAIN_FILE.read_text().splitlines(keepends=True)[:80]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return str(tmp_path / "rows.jsonl")


def entries(folder):
    """What is in the cache folder."""
    return sorted(path.name for path in Path(folder, "tokenised").iterdir())


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "cache")


STARTED = []  # processes, by the test that runs


def start_slow(source, folder, seconds, signal_in_fork=0):
    options = [source, folder, str(seconds), str(int(signal_in_fork))]
    command = [sys.executable, "-c", SLOW, *options]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # its workers end with it
        process.wait()


def until(condition):
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def children_of(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_one_process_fills_while_others_wait(tmp_path, folder):
    source = write(tmp_path)
    processes = [start_slow(source, folder, 0.1) for _ in range(3)]
    words = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(text[-2] for text in words) == ["found", "found", "new"]
    assert len({text[-1] for text in words}) == 1
    assert entries(folder) == [words[0][-1]]


def test_a_killed_filler_leaves_no_process_and_another_takes_over(tmp_path, folder):
    source = write(tmp_path)
    first = start_slow(source, folder, 99)
    workers = until(lambda: len(found := children_of(first.pid)) == 2 and found)
    second = start_slow(source, folder, 0)
    assert second.stdout.readline() == "ready\n"
    time.sleep(0.5)
    assert second.poll() is None  # waits
    first.kill()
    first.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert second.communicate(timeout=60)[0].split()[-2] == "new"
    assert len(entries(folder)) == 1


def test_a_killed_worker_ends_the_run(tmp_path, folder):
    source = write(tmp_path)
    process = start_slow(source, folder, 99)
    os.kill(until(lambda: len(c := children_of(process.pid)) == 2 and c)[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert not entries(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_workers_at_once(tmp_path, folder, number):
    source = write(tmp_path)
    process = start_slow(source, folder, 999)
    workers = until(lambda: len(found := children_of(process.pid)) == 2 and found)
    process.send_signal(number)
    process.communicate(timeout=60)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert not entries(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_is_forked_is_not_lost(tmp_path, folder, number):
    # Python drops what a handler raises there.
    source = write(tmp_path)
    process = start_slow(source, folder, 999, signal_in_fork=number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[number]
    assert not entries(folder)


def test_each_held_signal_is_handled_though_another_raises():
    got = []

    def stop(number, _):
        got.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGHUP, signal.SIGUSR1)}
    try:
        with pytest.raises(KeyboardInterrupt), fill._signals_held():
            for number in before:
                signal.raise_signal(number)
            assert not got
        assert got == list(before)
        assert all(signal.getsignal(number) is stop for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
