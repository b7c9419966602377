"""A disk that takes no more: one line, exit code 1, nothing lost; with space, the same command ends
with the same files."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
from types import SimpleNamespace

import pytest

from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.train.__main__ import main as train_command
from rrhf_fast.train.profile import _export
from tests.hostile.test_kills import kill

REWARD = "rrhf_fast.demo.reward:score"


@pytest.fixture
def rows(tmp_path):
    """A file of four rows."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(demo.TRAIN_FILE.read_text().splitlines(keepends=True)[:4]))
    return str(path)


@pytest.fixture
def mounted(tmp_path):
    """A folder with a file system of its own, and a way to mount it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount")
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    again = ["mount", str(folder), "-o"]
    yield folder, lambda how: subprocess.run([*again, f"remount,{how}"], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_limit_on_the_size_of_files(tmp_path):
    kill(tmp_path, ["sample", "evaluate", "train"], "--how", "fill", "--points", "1")


def test_a_full_file_system(tmp_path, mounted):
    kill(tmp_path, ["score", "export"], "--how", "fill_disk", "--points", "1")


def refused(main, arguments, capsys):
    """The line of a command that ends with exit code 1."""
    assert main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    return errors[0].partition("error: ")[2]


def test_a_read_only_file_system(rows, mounted, capsys):
    folder, remount = mounted
    files = ["--data", rows, "--output", str(folder / "out.jsonl"), "--reward_fn", REWARD]
    remount("ro")
    problem = f"output: {folder}/out.jsonl.journal could not be written (Read-only file system)"
    again = "what is done is kept: run the same command again"
    assert refused(score, files, capsys) == f"{problem}; {again}"
    options = ["--train_data", rows, "--output_dir", str(folder / "out")]
    line = refused(train_command, [*options, "--model_name_or_path", str(demo.MODEL_DIR)], capsys)
    assert line.startswith(f"output_dir: {folder}/out") and "(Read-only file system); " in line
    remount("rw")
    assert score(files) == 0


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_while_syncing(code, rows, tmp_path, monkeypatch, capsys):
    """An earlier output survives it, and no half line remains."""
    output, sync, synced = tmp_path / "out.jsonl", os.fsync, []
    output.write_text("earlier")

    def fail(file):
        if stat.S_ISREG(os.fstat(file).st_mode):
            synced.append(file)
        if len(synced) == limit:
            raise OSError(code, os.strerror(code))
        sync(file)

    arguments = ["--data", rows, "--output", str(output), "--reward_fn", REWARD]
    arguments += ["--batch_size", "8"]
    # The first line, then each of three batches, after the one that failed before, then the rows.
    for number, count in enumerate((1, 2, 2, 2, 2, 1)):
        limit = count
        synced.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            options = ["--overwrite", "true"] if number < 2 else []
            line = refused(score, arguments + options, capsys)
        assert "out.jsonl" in line and os.strerror(code) in line
        assert output.read_text() == "earlier"
    assert score(arguments) == 0
    assert len(json.loads(output.read_text().splitlines()[0])["scores"]) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.jsonl"}


def test_too_many_open_files(rows, tmp_path, capsys):
    """Wherever the limit strikes, it is one line or the file of an undisturbed run."""
    arguments = ["--data", rows, "--reward_fn", REWARD, "--output"]
    assert score([*arguments, str(tmp_path / "whole.jsonl")]) == 0
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = max(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 64
    codes = []
    for more in range(-1, 5):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + more, limits[1]))
        try:
            codes.append(score([*arguments, str(tmp_path / "out.jsonl")]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        errors = capsys.readouterr().err
        assert codes[-1] in (0, 1, 2) and "Traceback" not in errors
        if codes[-1] == 0:
            break
        assert "Too many open files" in errors
    assert codes[-1] == 0
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_full_disk_under_tensorboard(rows, tmp_path, monkeypatch, capsys):
    """Its thread fails, maybe at the very last record, and the run says so in one line."""
    gfile = pytest.importorskip("tensorboard.compat.tensorflow_stub.io.gfile")
    write, calls = gfile.LocalFileSystem._write, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", fail)
    arguments = ["--train_data", rows, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    arguments += ["--model_name_or_path", str(demo.MODEL_DIR), "--report_to", "[tensorboard]"]
    assert train_command(arguments) == 1
    errors = capsys.readouterr().err
    problem = f"output_dir: {tmp_path / 'out'} could not be written (No space left on device)"
    assert f"rrhf_fast.train: error: {problem}" in errors and "Traceback" not in errors
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_trace_that_was_not_written(tmp_path):
    """PyTorch says nothing and leaves part of a file."""
    trace = tmp_path / "trace.json.gz"

    def export(path):
        (tmp_path / f"{path}.tmp").write_text("[")

    with pytest.raises(OSError, match=f"Input/output error: '{trace}'"):
        _export(SimpleNamespace(export_chrome_trace=export), trace)
    assert not list(tmp_path.iterdir())


def test_training_goes_on_from_a_checkpoint_after_a_full_disk(rows, tmp_path, monkeypatch, capsys):
    """The samples of an evaluation find no space; those written before are whole."""
    options = {
        "train_data": rows, "eval_data": rows, "model_name_or_path": str(demo.MODEL_DIR),
        "train_batch_size": 2, "max_steps": 2, "eval_steps": 1, "save_steps": 1,
        "eval_reward_fn": REWARD, "eval_max_new_tokens": 4, "eval_samples": 1,
        "resume_from_checkpoint": "latest",
    }  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(TrainConfig(output_dir=str(whole), **options))
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    size = (whole / "samples.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    from rrhf_fast.train import trainer  # once torch is there

    append = trainer.append

    def limited(file, data):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 9, limits[1]))
        try:
            append(file, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "append", limited)
        line = refused(train_command, [*arguments, "--output_dir", str(part)], capsys)
    problem = f"output_dir: {part}/samples.jsonl could not be written (File too large)"
    assert line == f"{problem}; what is done is kept: run the same command again"
    assert (whole / "samples.jsonl").read_bytes().startswith((part / "samples.jsonl").read_bytes())
    assert train_command([*arguments, "--output_dir", str(part)]) == 0
    for name in ("samples.jsonl", "model.safetensors"):
        assert (whole / name).read_bytes() == (part / name).read_bytes()
