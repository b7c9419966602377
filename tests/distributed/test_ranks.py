"""Runs on 1, 2 and 4 processes over gloo are the run on one: losses, gradient norms, weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cases.py")
SPEC = importlib.util.spec_from_file_location("cases", SCRIPT)
cases = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cases)

pytestmark = pytest.mark.slow


def launch(num_ranks, *arguments, timeout=300):
    """Run on the CPU, under torchrun if `num_ranks` is not 0."""
    command = [sys.executable]
    if num_ranks:
        options = ["--standalone", "--nproc_per_node", str(num_ranks)]
        command += ["-m", "torch.distributed.run", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command + [str(text) for text in arguments],
        env=env, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds each case as it comes out alone, on 1, 2 and 4 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for num_ranks in (0, 1, 2, 4):
        done = launch(num_ranks, SCRIPT, folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", [*cases.CASES, "replicated", "resumed"])
def test_ranks_change_nothing(folder, name, num_ranks):
    if name not in cases.CASES and num_ranks < 4:
        pytest.skip("a case of 4 ranks")
    expected = folder / "alone" / cases.SAME_AS.get(name, name)
    found = folder / str(num_ranks) / name
    first_step = 4 if name == "resumed" else 0
    before = [record for record in metrics(expected) if record["step"] >= first_step]
    after = metrics(found)
    assert [record["step"] for record in after] == [record["step"] for record in before]
    exact = set() if name == "padding" else {"num_tokens"}
    sampled = {"eval/reward", "eval/reward_ci95", "eval/response_length"}  # each rank has a seed
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"tokens_per_second", "num_tokens"} - sampled:
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), (one["step"], key)
        assert all(one[key] == other[key] for key in exact & one.keys())
    one, other = weights(expected), weights(found)
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key] - other[key]).abs().max() < 1e-5, key


def test_samples_of_all_prompts(folder):
    for ranks in ("alone", "2", "4"):
        samples = [json.loads(line) for line in (folder / ranks / "samples/samples.jsonl").open()]
        assert len(samples) == 2 * 7
        prompts = [json.loads(line)["prompt"] for line in (folder / "eval.jsonl").open()]
        assert [sample["prompt"] for sample in samples] == prompts * 2


def test_a_rank_that_fails_takes_the_others_along(folder):
    # The second rank alone finds no room for its output; the first waits for it in the step.
    done = launch(2, SCRIPT.with_name("failing.py"), folder, timeout=120)
    assert done.returncode != 0
    assert "rank 1 fails" in done.stderr
    assert "rank 0 survived" not in done.stdout


def test_mistakes_are_one_line_and_exit_code_2(folder, tmp_path):
    arguments = [
        "-m",
        "rrhf_fast.train",
        "--data_parallel_shard",
        3,
        "--output_dir",
        tmp_path / "o",
    ]
    done = launch(2, *arguments)
    assert "data_parallel_replicate: expected their product" in done.stderr
    assert "exitcode  : 2" in done.stderr and not (tmp_path / "o").exists()
