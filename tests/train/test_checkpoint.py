"""Checkpoints: a resumed run equals an uninterrupted one, whatever stopped it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.model.save import SaveFailed
from rrhf_fast.stages.run_folder import complete_checkpoints
from rrhf_fast.train import adamw_bf16, trainer
from rrhf_fast.train.checkpoint import Checkpoints, Stager
from rrhf_fast.train.distributed import World
from rrhf_fast.train.metrics import MetricsLog
from rrhf_fast.train.optimizer import build_optimizer
from rrhf_fast.train.prepare import prepare
from rrhf_fast.train.progress import Progress

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# 12 rows in steps of 5: a checkpoint in mid-epoch, and steps of different sizes.
OPTIONS = {
    "model_name_or_path": str(demo.MODEL_DIR), "train_batch_size": 5, "learning_rate": 1e-3,
    "max_steps": 7, "save_steps": 2, "eval_steps": 3, "eval_max_new_tokens": 8,
    "eval_reward_fn": "rrhf_fast.demo.reward:score",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for source, count in ((demo.TRAIN_FILE, 12), (demo.EVAL_FILE, 4)):
        lines = source.read_text().splitlines(keepends=True)[:count]
        (folder / source.name).write_text("".join(lines))
    return {
        "train_data": str(folder / demo.TRAIN_FILE.name),
        "eval_data": str(folder / demo.EVAL_FILE.name),
    }


def run(output_dir, data, **options):
    return train(TrainConfig(output_dir=str(output_dir), **(OPTIONS | data | options)))


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, data):
    """A run from its first step to its last."""
    folder = tmp_path_factory.mktemp("unharmed") / "out"
    run(folder, data)
    return folder


def metrics(folder):
    """The records, without those that depend on the machine's speed."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    for name in ("samples.jsonl", "model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def stopped_at(step, unharmed, target):
    """The run as if killed after its checkpoint of this step."""
    shutil.copytree(unharmed, target)
    (target / "model.safetensors").unlink()
    for path in complete_checkpoints(target):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, data, unharmed, step):
    stopped_at(step, unharmed, tmp_path / "out")
    # Left by a kill in the middle of a save.
    shutil.copytree(tmp_path / f"out/checkpoint-{step}", tmp_path / "out/checkpoint-50")
    for name in ("checksums.json", ".metadata"):
        (tmp_path / "out/checkpoint-50" / name).unlink()
    (tmp_path / "out/.checkpoint-50").mkdir()
    result = run(tmp_path / "out", data, resume_from_checkpoint="latest")
    assert_same_run(unharmed, tmp_path / "out")
    assert result.steps == 7 and result.before["loss"] == metrics(unharmed)[0]["eval/loss"]
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6",
    ]  # fmt: skip
    assert not list((tmp_path / "out").glob("*checkpoint-50"))


def assert_resumes(folder, data, weights, **options):
    """A run resumed from its first checkpoint ends with the metrics and weights of a whole run."""
    torch.manual_seed(1)
    run(folder / "whole", data, eval_reward_fn=None, **options)
    shutil.copytree(folder / "whole", folder / "part")
    shutil.rmtree(folder / "part/checkpoint-6")
    torch.manual_seed(2)  # the checkpoint's state takes precedence
    run(folder / "part", data, eval_reward_fn=None, resume_from_checkpoint="latest", **options)
    assert metrics(folder / "whole") == metrics(folder / "part")
    assert (folder / "whole" / weights).read_bytes() == (folder / "part" / weights).read_bytes()


@pytest.mark.parametrize("way", ["eager", "kernel"])
def test_stochastically_rounded_moments_resume_too(tmp_path, data, way, monkeypatch):
    if way == "kernel":
        pytest.importorskip("triton", reason="the kernel needs triton")
        monkeypatch.setattr(adamw_bf16, "_kernel_takes", lambda *tensors: True)
    assert_resumes(tmp_path, data, "model.safetensors", optimizer_state_dtype="bfloat16")


def test_adapters_resume_too(tmp_path, data):
    assert_resumes(tmp_path, data, "adapter_model.safetensors", use_peft=True, lora_r=4)
    # Only adapters and their moments: the model is not in the checkpoint.
    stored = FileSystemReader(tmp_path / "whole/checkpoint-6").read_metadata().state_dict_metadata
    weights = [key for key in stored if key.endswith(("weight", "exp_avg"))]
    assert weights and all("lora_" in key for key in weights)


def test_auto_resumes_with_the_packs_of_its_checkpoint(tmp_path, data, capsys):
    options = {"eval_reward_fn": None}
    run(tmp_path / "whole", data, max_tokens_per_pack=250, **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoint-6")
    capsys.readouterr()
    options |= {"resume_from_checkpoint": "latest", "max_tokens_per_pack": "auto"}
    run(tmp_path / "part", data, **options)
    printed = capsys.readouterr().out
    assert "packs of 250 tokens" in printed and "with changes" not in printed
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")


@pytest.mark.parametrize("reuses_memory", [False, True])
def test_what_is_written_is_what_was_saved(tmp_path, data, reuses_memory, monkeypatch):
    """However late it is written; memory for the copies is reused only with CUDA."""
    changed, write = threading.Event(), FileSystemWriter.write_data

    def late(*arguments):
        assert changed.wait(60)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", late)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs no GPU then
    config = TrainConfig(output_dir=str(tmp_path), **OPTIONS | data)
    run = prepare(config, World(torch.device("cpu")))
    optimizer, schedule = build_optimizer(run.model, config, run.num_steps)
    log = MetricsLog(run.output_dir, run.config)
    checkpoints = Checkpoints(run, optimizer, schedule, log)
    checkpoints._stager.cache_staged_state_dict = reuses_memory

    def tensors():
        moments = [m for state in optimizer.state.values() for m in state.values()]
        return [*run.model.parameters(), *moments]

    def fill(value):
        with torch.no_grad():
            for tensor in tensors():
                tensor.fill_(value)

    checkpoints._tensors()  # makes the moments
    for step in (1, 2):
        changed.clear()
        fill(step)
        checkpoints.save(Progress(step=step))
        fill(7)
        changed.set()
        checkpoints.finish()
    for step in (1, 2):
        checkpoints.resume(tmp_path / f"checkpoint-{step}")
        assert len(tensors()) == 4 * len(list(run.model.parameters()))
        assert all((tensor == step).all() for tensor in tensors())


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, script, tmp_path, "0", "20"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=500)
    log = tmp_path / "log.txt"
    assert done.returncode == 0, done.stderr + log.read_text() if log.exists() else done.stderr
    chains = list(tmp_path.glob("chain-*"))
    assert chains and int(done.stdout.split()[0]) > 0
    for chain in chains:
        assert_same_run(tmp_path / "unharmed", chain)


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_75(tmp_path, data, unharmed, name):
    options = (
        OPTIONS | data | {"output_dir": tmp_path / "out", "max_steps": 5000, "save_steps": 9999}
    )
    command = [sys.executable, "-m", "rrhf_fast.train"]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 120
    while not (tmp_path / "out/metrics.jsonl").exists():
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.02)
    process.send_signal(name)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (saved,) = complete_checkpoints(tmp_path / "out")
    assert f"{saved.name} to resume from is in" in out.decode()
    assert metrics(tmp_path / "out")[-1]["step"] == int(saved.name.removeprefix("checkpoint-"))


def signal_in_step(monkeypatch, number, name=signal.SIGTERM):
    """Send this process a signal in the given step's backward."""
    step = trainer.take_step

    def signalled(run, batch, optimizer, now, *rest):
        if now == number:
            signal.raise_signal(name)
        return step(run, batch, optimizer, now, *rest)

    monkeypatch.setattr(trainer, "take_step", signalled)


def test_an_evaluation_skipped_for_a_signal_is_made_up_for(tmp_path, data, unharmed, monkeypatch):
    signal_in_step(monkeypatch, 3)
    assert run(tmp_path / "out", data).preempted
    last = metrics(tmp_path / "out")[-1]
    assert last["step"] == 3 and "eval/loss" not in last
    monkeypatch.undo()
    run(tmp_path / "out", data, resume_from_checkpoint="latest")
    assert_same_run(unharmed, tmp_path / "out")


def test_a_resumed_run_has_the_options_it_announces(tmp_path, data, unharmed, monkeypatch, capsys):
    stopped_at(4, unharmed, tmp_path / "out")
    build, optimizers = trainer.build_optimizer, []

    def keep(*arguments):
        optimizer, schedule = build(*arguments)
        optimizers.append(optimizer)
        return optimizer, schedule

    monkeypatch.setattr(trainer, "build_optimizer", keep)
    options = {"learning_rate": 1e-12, "weight_decay": 0.5, "adam_beta1": 0.5, "max_steps": 6}
    run(tmp_path / "out", data, resume_from_checkpoint="latest", eval_reward_fn=None, **options)
    out = capsys.readouterr().out
    assert "learning_rate 0.001 -> 1e-12" in out and "weight_decay 0.0 -> 0.5" in out
    rates = [r["learning_rate"] for r in metrics(tmp_path / "out") if "learning_rate" in r]
    assert rates[4:] == pytest.approx([2e-12 / 6, 1e-12 / 6])  # linear, to 0 after the last step
    first, second = optimizers[0].param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0.0)
    assert first["betas"] == (0.5, 0.999)


def test_latest_starts_afresh_where_there_is_none(tmp_path, data, unharmed, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 0}\n')  # killed before its first save
    run(tmp_path / "out", data, resume_from_checkpoint="latest")
    assert "no checkpoint in" in capsys.readouterr().out
    assert_same_run(unharmed, tmp_path / "out")


def test_the_oldest_checkpoints_are_removed(tmp_path, data):
    run(tmp_path, data, save_steps=1, save_total_limit=2)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-6", "checkpoint-7"]


def test_a_finished_run_without_checkpoints_is_not_resumed(tmp_path, data):
    run(tmp_path, data, max_steps=1)
    with pytest.raises(ValueError, match="holds a model, and no checkpoint to resume from"):
        run(tmp_path, data, resume_from_checkpoint="latest")


def test_a_resumed_run_keeps_its_batches(tmp_path, data, unharmed):
    """Its place in the rows is a number of steps."""
    stopped_at(4, unharmed, tmp_path / "out")
    problem = r"train_batch_size: expected 5, as in .*checkpoint-4, found 3 \(a resumed run keeps"
    with pytest.raises(ValueError, match=problem):
        run(tmp_path / "out", data, resume_from_checkpoint="latest", train_batch_size=3)
    assert complete_checkpoints(tmp_path / "out")


def test_what_a_resume_refuses(tmp_path, data, unharmed, capsys):
    stopped_at(4, unharmed, tmp_path / "out")
    checkpoint = str(tmp_path / "out/checkpoint-4")
    fewer = Path(data["train_data"]).read_text().splitlines(keepends=True)[:-1]
    (tmp_path / "fewer.jsonl").write_text("".join(fewer))
    other = data | {"train_data": str(tmp_path / "fewer.jsonl")}
    with pytest.raises(ValueError, match="checkpoint-4 is from a run on other rows"):
        run(tmp_path / "out", other, resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match="resume_from_checkpoint: .*checkpoint-5 is not a complete"
    ):
        run(tmp_path / "new", data, resume_from_checkpoint=str(tmp_path / "out/checkpoint-5"))
    for name in ("metrics.jsonl", "samples.jsonl", "config.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(ValueError, match="already holds checkpoint-. of another run"):
        run(tmp_path / "out", data)
    # A folder of another run is refused, whatever the checkpoint.
    with pytest.raises(ValueError, match="already holds metrics.jsonl of another run"):
        run(unharmed, data, resume_from_checkpoint=checkpoint)
    for moments, problem in (
        (checkpoint, "output_dir, which --over"),
        ("latest", "not a complete"),
    ):
        with pytest.raises(ValueError, match=f"init_optimizer_from: .*{problem}"):
            run(tmp_path / "out", data, overwrite_output_dir=True, init_optimizer_from=moments)
    assert complete_checkpoints(tmp_path / "out")[-1] == Path(checkpoint)
    capsys.readouterr()
    run(tmp_path / "new", data, resume_from_checkpoint=checkpoint, max_steps=5, margin=0.5)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "with changes" in line]
    assert set(line.partition("with changes: ")[2].split(", ")) == {
        "margin 0.0 -> 0.5",
        "max_steps 7 -> 5",
    }
    assert metrics(tmp_path / "new")[0]["step"] == 5


def test_checkpoints_of_another_program_are_left_alone(tmp_path, data, unharmed):
    stopped_at(2, unharmed, tmp_path / "out")
    foreign = tmp_path / "out/checkpoint-500"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("precious")
    for state in (None, '{"global_step": 500, "log_history": []}', "[1]", "1", "{"):
        if state is not None:  # transformers' Trainer also writes a file of this name
            (foreign / "trainer_state.json").write_text(state)
        for options in ({"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
            with pytest.raises(ValueError, match="checkpoint-500 is not a checkpoint of rrhf_fast"):
                run(tmp_path / "out", data, **options)
    assert (foreign / "model.safetensors").read_text() == "precious"


def test_a_new_run_with_the_moments_of_another(tmp_path, data, unharmed):
    once = {"save_steps": None, "max_steps": 1, "warmup_steps": 0}
    moments = {"init_optimizer_from": str(unharmed / "checkpoint-6")}
    plain = run(tmp_path / "plain", data, **once)
    result = run(tmp_path / "moments", data, **once, **moments)
    assert (
        result.steps == 1
        and result.metrics[1]["learning_rate"] == (plain.metrics[1]["learning_rate"])
    )
    # The first loss is that of the initial weights, the first step differs.
    assert result.metrics[1]["loss"] == plain.metrics[1]["loss"]
    assert result.after["loss"] != plain.after["loss"]
    # The rate is not the other run's.
    slow = run(tmp_path / "slow", data, learning_rate=1e-12, **once, **moments)
    assert slow.after["loss"] == pytest.approx(slow.before["loss"], rel=1e-6)


@contextmanager
def small_files():
    """Limit files to 200 kB, which fails saves like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_earlier_saves_intact(tmp_path, data, unharmed):
    stopped_at(4, unharmed, tmp_path / "out")
    message = "could not be written .*File too large"
    with small_files(), pytest.raises(SaveFailed, match=message) as failed:
        run(tmp_path / "out", data, resume_from_checkpoint="latest")
    first = failed.value.__context__  # the disk is full for the model too
    assert isinstance(first, SaveFailed) and "checkpoint-6 could not be written" in str(first)
    assert complete_checkpoints(tmp_path / "out")[-1].name == "checkpoint-4"
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_folder_that_cannot_be_written(tmp_path, data, unharmed, monkeypatch):
    stopped_at(4, unharmed, tmp_path / "out")
    (tmp_path / "out/checkpoint-6").write_text("in the way")
    with pytest.raises(SaveFailed, match="checkpoint-6 could not be written"):
        run(tmp_path / "out", data, resume_from_checkpoint="latest")
    assert complete_checkpoints(tmp_path / "out")[-1].name == "checkpoint-4"
    # The weights of the complete steps are saved anyway.
    assert load_file(tmp_path / "out/model.safetensors")
    (tmp_path / "out/model.safetensors").unlink()
    signal_in_step(monkeypatch, 6)  # whatever the reason for the checkpoint
    with pytest.raises(SaveFailed, match="checkpoint-6 could not be written"):
        run(tmp_path / "out", data, resume_from_checkpoint="latest")
    assert load_file(tmp_path / "out/model.safetensors")


def test_ctrl_c_waits_for_the_update_and_reports_a_failed_write(tmp_path, data, monkeypatch):
    step, save = torch.optim.AdamW.step, Checkpoints.save

    def interrupted(optimizer, *arguments):
        signal.raise_signal(signal.SIGINT)
        return step(optimizer, *arguments)

    def save_fails(checkpoints, progress, **options):
        with small_files():
            save(checkpoints, progress, **options)
            assert checkpoints._pending[1].exception() is not None
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupted)
        result = run(tmp_path / "out", data)
    assert result.interrupted and result.steps == metrics(tmp_path / "out")[-1]["step"] == 1
    assert load_file(tmp_path / "out/model.safetensors")
    monkeypatch.setattr(Checkpoints, "save", save_fails)
    with pytest.raises(SaveFailed, match="checkpoint-2 could not be written .*too large"):
        run(tmp_path / "failed", data)
    assert load_file(tmp_path / "failed/model.safetensors")


@pytest.mark.slow  # torchao compiles its step
def test_a_signal_saves_the_model_if_checkpoints_are_unsupported(
    tmp_path, data, monkeypatch, capsys
):
    pytest.importorskip("torchao")
    signal_in_step(monkeypatch, 1)
    result = run(tmp_path / "out", data, optim="adamw_8bit", save_steps=None)
    assert result.interrupted and not result.preempted and result.steps == 1
    assert "stopped early after 1 steps; model and metrics are in" in capsys.readouterr().out
    assert load_file(tmp_path / "out/model.safetensors")
    assert not list((tmp_path / "out").glob("*checkpoint*"))


def test_state_is_staged_without_pinned_memory(monkeypatch):
    def fail(tensor):
        raise RuntimeError("no memory to be locked")

    monkeypatch.setattr(torch.Tensor, "pin_memory", fail)
    stager = Stager(cache_staged_state_dict=True)
    for value in (1.0, 2.0):
        state = {"weight": torch.full((3,), value), "step": 7}
        staged = stager.stage(state)
        state["weight"].zero_()
        assert staged["step"] == 7 and staged["weight"].tolist() == [value] * 3


def test_state_of_other_keys_is_staged(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    stager = Stager(cache_staged_state_dict=True)
    for names in (["a"], ["a"], ["a", "b"], ["b"]):
        state = {name: torch.full((3,), float(i)) for i, name in enumerate(names)}
        staged = stager.stage(state)
        assert {name: t.tolist() for name, t in staged.items()} == {
            name: t.tolist() for name, t in state.items()
        }
    assert stager.state_dict_cache is None  # useless pinned memory is freed
