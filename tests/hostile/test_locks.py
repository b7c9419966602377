"""Two runs never write into one folder; a dead one keeps nobody out."""

import contextlib
import errno
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rrhf_fast import RRHFTrainer, TrainConfig, demo, train
from rrhf_fast.stages import lock
from rrhf_fast.stages.lock import locked
from tests.hostile.processes import Run, head, holder

ROOT = Path(__file__).parents[2]
OPTIONS = {"max_steps": 2, "save_steps": 1, "train_batch_size": 2}
EVALUATE = (
    "--model_name_or_path", str(demo.MODEL_DIR), "--reward_fn", "rrhf_fast.demo.reward:score",
    "--num_samples", "1", "--max_new_tokens", "8",
)  # fmt: skip


def files(folder):
    """Everything in a folder, and whether it was touched."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_ino, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return head(tmp_path_factory.mktemp("rows"), 4)


@pytest.fixture(scope="module")
def options(rows):
    """Of a run of two steps."""
    data = {"model_name_or_path": str(demo.MODEL_DIR), "train_data": str(rows / "train.jsonl")}
    return OPTIONS | data


@pytest.fixture(scope="module")
def done(tmp_path_factory, options):
    """A finished run with checkpoints."""
    folder = tmp_path_factory.mktemp("done")
    train(TrainConfig(output_dir=str(folder / "out"), **options))
    return folder / "out"


@pytest.fixture
def commands(rows, options, done):
    train = ("train", *(text for name in options for text in (f"--{name}", options[name])))
    evaluate = (*EVALUATE, "--data", rows / "eval.jsonl")
    return {
        "train": train,
        "train latest": (*train, "--resume_from_checkpoint", "latest"),
        "train overwrite": (*train, "--overwrite_output_dir", "true"),
        "export": ("export", "--checkpoint", done / "checkpoint-2"),
        "evaluate": ("evaluate", *evaluate),
        "iterate": ("iterate", *evaluate, "--eval_data", rows / "eval.jsonl", "--rounds", 1),
    }


REFUSED = "rrhf_fast.{}: error: output_dir: {} is being written by process {} on host {} since "
NAMES = ["train", "train latest", "train overwrite", "export", "evaluate", "iterate"]


@pytest.mark.parametrize("name", NAMES)
def test_the_second_run_is_refused_and_touches_nothing(name, tmp_path, commands, done):
    if name in ("train latest", "train overwrite"):
        shutil.copytree(done, tmp_path / "out")
    first = Run(tmp_path, *commands[name])
    first.stop()
    before = files(first.out)
    code, (line,) = Run(tmp_path, *commands[name]).end()
    assert code == 2 and files(first.out) == before
    command, pid = commands[name][0], first.process.pid
    assert line.startswith(REFUSED.format(command, first.out, pid, socket.gethostname()))
    assert line.endswith("(wait for it, or choose another)")
    if command in ("train", "export"):
        assert first.end()[0] == 0
        assert not list(first.out.glob(".*")) and (first.out / "model.safetensors").exists()
    first.kill()


@pytest.mark.parametrize("name", ["train latest", "export", "iterate"])
def test_after_a_kill_the_same_command_works_at_once(name, tmp_path, commands):
    killed = Run(tmp_path, *commands[name])
    killed.stop()
    killed.kill()
    assert (killed.out / ".lock").exists()
    again = Run(tmp_path, *commands[name])
    if name == "iterate":
        again.stop()  # it has the lock
        again.kill()
    else:
        assert again.end()[0] == 0 and not (again.out / ".lock").exists()


@pytest.mark.slow
def test_two_commands_started_at_once(tmp_path, commands):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rrhf_fast.train", "--output_dir", tmp_path / "out"]
    command += [str(text) for text in commands["train"][1:]]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]
    errors = {run.communicate(timeout=120)[1] and run.returncode: run.pid for run in runs}
    assert sorted(run.returncode for run in runs) == [0, 2], errors
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert steps == [1, 2]


def test_a_process_takes_its_lock_again(tmp_path, options):
    """As a notebook whose cell is run again, while the trainer before is still there."""
    out = tmp_path / "out"
    config = TrainConfig(output_dir=str(out), **options)
    before, now = RRHFTrainer(args=config), RRHFTrainer(args=config)
    now.train()
    assert holder(out) == os.getpid()  # of the one before
    before.close()
    assert not (out / ".lock").exists()
    (out / "model.safetensors").unlink()
    now.save_model()
    assert (out / "model.safetensors").exists() and not (out / ".lock").exists()
    with pytest.raises(ValueError, match="already holds metrics"):
        RRHFTrainer(args=config)
    assert not (out / ".lock").exists()


def test_a_forgotten_trainer_unlocks(tmp_path, options):
    """Whose folder had not been there."""
    RRHFTrainer(args=TrainConfig(output_dir=str(tmp_path / "out"), **options))
    gc.collect()
    assert not (tmp_path / "out").exists()


def test_a_mistake_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="eval_fraction"):
        train(TrainConfig(output_dir=str(tmp_path / "new" / "out"), eval_fraction=1e-4))
    assert not list(tmp_path.iterdir())


def test_threads_and_paths_of_one_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with locked(tmp_path / "link"), locked(tmp_path / "out" / ".." / "out"):
        threads = [threading.Thread(target=_often, args=(tmp_path / "out",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert holder(tmp_path / "out") == os.getpid()
    assert not (tmp_path / "out").exists()


def _often(folder):
    for _ in range(100):
        with locked(folder):
            pass


def test_a_forked_child_neither_has_nor_releases_the_lock(tmp_path):
    with locked(tmp_path):
        pid = os.fork()
        if not pid:
            with contextlib.suppress(ValueError), locked(tmp_path):
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0 and holder(tmp_path) == os.getpid()
    assert not (tmp_path / ".lock").exists()


def contenders(folder, log, rounds):
    """Take the lock again and again, and note when."""
    for _ in range(rounds):
        try:
            with locked(folder), open(log, "a") as file:
                file.write(f"{os.getpid()} in\n")
                file.flush()
                (folder / "here").touch(exist_ok=False)
                (folder / "here").unlink()
                file.write(f"{os.getpid()} out\n")
        except ValueError:
            pass
    os._exit(0)


def test_never_two_at_once(tmp_path):
    """Also while the file and the folder come and go."""
    log = tmp_path / "log"
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            try:
                contenders(tmp_path / "new" / "out", log, 300)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    lines = log.read_text().splitlines()
    assert len(lines) > 8
    for one, other in zip(lines[::2], lines[1::2], strict=True):
        assert one.split() == [other.split()[0], "in"] and other.endswith("out")
    assert not [path for path in tmp_path.rglob("new/**/*") if not path.is_dir()]


def left(folder, *, host, pid=1, age=0):
    """A lock file that nobody holds here."""
    path = folder / ".lock"
    path.write_text(json.dumps({"host": host, "pid": pid, "started": "2026-01-02 03:04:05"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def dead_process():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture(params=["flock", "no flock", "no fcntl"])
def system(request, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "no flock":
        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    elif request.param == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    return request.param


def test_a_run_on_another_host(system, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "_WATCH", 1.5)
    path = left(tmp_path, host="far.away", pid=77, age=130)
    text = path.read_bytes()
    beat = threading.Timer(0.7, os.utime, [path])
    beat.start()
    with pytest.raises(ValueError) as refused, locked(tmp_path):
        pass
    beat.join()
    assert str(refused.value) == (
        f"output_dir: {tmp_path} is being written by process 77 on host far.away, which shows "
        f"signs of life (wait for it, or choose another; if that run is dead, remove {path})"
    )
    assert path.read_bytes() == text
    note = capsys.readouterr().out
    assert "process 77 on host far.away's last sign of life is 2 minutes old" in note
    assert note.endswith("if that run is dead, remove the file\n") and str(path) in note


@pytest.mark.parametrize("age", [0, 1000])
def test_a_dead_run_of_another_host(age, system, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "_WATCH", 0.2)
    path = left(tmp_path, host="far.away", age=age)
    with locked(tmp_path):
        assert holder(tmp_path) == os.getpid()
    note = f"note: {path} of process 1 on host far.away is taken over: no sign of life"
    assert note in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.parametrize("text", ['{"ho', '{"host": "here", "pi'])
def test_a_lock_whose_holder_was_killed_while_it_wrote(text, tmp_path):
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path):
        assert holder(tmp_path) == os.getpid()


def test_a_dead_process_of_this_host(system, tmp_path, capsys):
    left(tmp_path, host=socket.gethostname(), pid=dead_process(), age=1000)
    with locked(tmp_path):
        assert holder(tmp_path) == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_two_processes_without_flock(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    left(tmp_path, host=socket.gethostname(), pid=os.getppid(), age=1000)
    with pytest.raises(ValueError, match="is being written by process .*is dead, remove"):
        locked(tmp_path).__enter__()
    (tmp_path / ".lock").unlink()
    test_a_forked_child_neither_has_nor_releases_the_lock(tmp_path)
    test_never_two_at_once(tmp_path)


def test_a_lock_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        give_up = time.monotonic() + 60
        while not (tmp_path / ".lock").stat().st_mtime:
            assert time.monotonic() < give_up
            time.sleep(0.01)


def test_files_of_others_are_neither_followed_nor_removed(tmp_path):
    folder, other = tmp_path / "out", tmp_path / "precious"
    other.write_text("precious")
    folder.mkdir()
    path = folder / ".lock"
    cases = [
        lambda: path.symlink_to(other),
        lambda: path.symlink_to(tmp_path / "nowhere"),
        lambda: path.write_text("my own"),
        lambda: path.write_text("[" * 100_000),
        lambda: path.write_text('{"host": 1, "pid": 2, "started": 3}'),
        path.mkdir,
        lambda: os.mkfifo(path),
    ]
    for make in cases:
        make()
        with pytest.raises(ValueError, match=r"^output_dir: .*\.lock .*remove it") as refused:
            locked(folder).__enter__()
        assert "\n" not in str(refused.value) and os.path.lexists(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert other.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_names_in_a_lock_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "_WATCH", 0.1)
    left(tmp_path, host="a\nb\x1b[31m" + "c" * 1000)
    with locked(tmp_path):
        pass
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 2
    assert all(note.isprintable() and len(note) < 600 for note in notes)
