"""Runs on 1, 2 and 4 processes over gloo equal the run on one: losses, gradient norms, weights."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rrhf_fast import ExportConfig, TrainConfig, export
from rrhf_fast.stages.run_folder import complete_checkpoints
from rrhf_fast.train.distributed import join_world

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cases.py")
SPEC = importlib.util.spec_from_file_location("cases", SCRIPT)
cases = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cases)


def start(num_ranks, *arguments):
    """Start a process on the CPU, under torchrun unless `num_ranks` is 0."""
    command = [sys.executable]
    if num_ranks:
        options = ["--standalone", "--nproc_per_node", str(num_ranks)]
        command += ["-m", "torch.distributed.run", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [str(text) for text in arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def launch(num_ranks, *arguments, timeout=300):
    """Exit code, standard output and standard error of `start`."""
    process = start(num_ranks, *arguments)
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, errors


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_run(expected, actual, *, first_step=0):
    """Losses, gradient norms, held-out measures and weights, to 1e-5. Samples, since each rank has
    its own seed, and times depend on the number of ranks."""
    free = {"tokens_per_second", "eval/reward", "eval/reward_ci95", "eval/response_length"}
    free |= {"compiled_graphs"}  # absent without compilation
    before = [record for record in metrics(expected) if record["step"] >= first_step]
    after = metrics(actual)
    assert [record["step"] for record in after] == [record["step"] for record in before]
    for one, other in zip(before, after, strict=True):
        assert one.keys() - free == other.keys() - free
        # Relative to the initial model no pair is ahead before the first step, but for rounding.
        is_tied = actual.name.startswith("reference") and one["step"] < 2
        tied = {"rewards/accuracies", "eval/rewards/accuracies"} if is_tied else set()
        for key in one.keys() - free - tied:
            # The dealing of rows decides how much of a padded batch is padding; forests for
            # compiled layers are padded too.
            if key != "num_tokens" or actual.name not in ("padding", *cases.COMPILED):
                assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), (actual, key)
    one, other = weights(expected), weights(actual)
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key] - other[key]).abs().max() < 1e-5, (actual, key)


@pytest.mark.slow
def test_ranks_change_nothing(tmp_path):
    # One test, so that pytest-xdist does not launch everything in every worker.
    for num_ranks in (0, 2, 1, 4):  # 1 and 4 resume what 2 saved
        code, out, errors = launch(num_ranks, SCRIPT, tmp_path)
        assert code == 0, errors
        # A resumed run has them from the checkpoint, whatever the number of ranks that saved it.
        kept = f"log-probs of 186 responses from {tmp_path}/2/reference/checkpoint-3"
        assert (kept in out) == (num_ranks in (1, 4))
        for name in cases.of_ranks(num_ranks, tmp_path):
            expected = tmp_path / "0" / cases.SAME_AS.get(name, name)
            first_step = 4 if name.endswith("resumed") else 0
            assert_same_run(expected, tmp_path / str(num_ranks) / name, first_step=first_step)
    # The checkpoint of the first step is the best one's, and its model is what was saved.
    folder = tmp_path / "2" / "the best of three"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    export(ExportConfig(str(folder / "checkpoint-1"), str(tmp_path / "exported"), dtype="float32"))
    assert all(x.equal(weights(folder)[name]) for name, x in weights(tmp_path / "exported").items())
    for num_ranks in (2, 4):
        page = (tmp_path / str(num_ranks) / "accumulation/profile/breakdown.md").read_text()
        assert "| communication |" in page and "| attention |" in page
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "eval.jsonl").open()]
    for num_ranks in (0, 2, 4):
        path = tmp_path / str(num_ranks) / "samples/samples.jsonl"
        assert [json.loads(line)["prompt"] for line in path.open()] == prompts * 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_change_nothing(backend, tmp_path):
    names = [name for name in cases.COMPILED if name.startswith(backend)]
    for num_ranks, chosen in ((0, ["tied"]), (2, names)):
        code, _, errors = launch(num_ranks, SCRIPT, tmp_path, *chosen)
        assert code == 0, errors
    for name in names:
        assert metrics(tmp_path / "2" / name)[1]["compiled_graphs"] > 0
        assert_same_run(tmp_path / "0/tied", tmp_path / "2" / name)


@pytest.mark.slow
def test_a_rank_that_fails_takes_the_others_along(tmp_path):
    cases.make_inputs(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/checkpoint-1").write_text("in the way")
    code, out, errors = launch(2, SCRIPT.with_name("failing.py"), tmp_path, timeout=240)
    # A failure on all ranks loses no complete step.
    for rank in (0, 1):
        assert f"rank {rank} is told: eval_reward_fn: __main__:reward raised IndexError" in out
        assert f"rank {rank} is told: output_dir: {tmp_path}/checkpoint/checkpoint-1 could" in out
    assert weights(tmp_path / "reward") and weights(tmp_path / "checkpoint")
    # In the third step, the first rank waits for the second, which has failed.
    assert code != 0 and "RuntimeError: rank 1 fails" in errors
    assert "survived" not in out


@pytest.mark.slow
def test_a_mistake_is_one_line_however_many_ranks_made_it(tmp_path):
    arguments = ("-m", "rrhf_fast.train", "--output_dir", tmp_path, "--eval_fraction", "0.0001")
    code, _, errors = launch(2, *arguments, timeout=120)
    assert code != 0 and errors.count("rrhf_fast.train: error: eval_fraction: ") == 1


def test_a_mesh_that_does_not_fit(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = TrainConfig(data_parallel_shard=3)
    with pytest.raises(ValueError, match="found 3 x 1 for 4 processes"), join_world(config):
        pass
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="cpu_offload"), join_world(TrainConfig(cpu_offload=True)):
        pass


@pytest.mark.slow
def test_sigterm_saves_on_all_ranks(tmp_path):
    out = tmp_path / "out"
    process = start(2, "-m", "rrhf_fast.train", "--output_dir", out, "--max_steps", 9999)
    give_up = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists():
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun forwards it
    printed, errors = process.communicate(timeout=120)
    assert "to resume from is in" in printed, errors
    assert process.returncode == 1  # torchrun's exit code
    (saved,) = complete_checkpoints(out)
    assert len(list(saved.glob("*.distcp"))) == 2
