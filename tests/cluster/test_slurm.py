"""The Slurm recipe on a real cluster of two virtual nodes: its end, its time limit, a lost node."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from rrhf_fast import demo
from rrhf_fast.stages.launcher import _first_host, launched
from tests.cluster.slurm import Cluster, missing

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "slurm.sh"
needs_slurm = pytest.mark.skipif(missing() is not None, reason=f"Slurm: {missing()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def recipe(tmp_path):
    """Write the recipe's script for two small nodes, with `steps` of the demo."""

    def write(steps: int) -> Path:
        run = {
            "model_name_or_path": str(demo.MODEL_DIR), "train_data": str(demo.TRAIN_FILE),
            "train_batch_size": 2, "max_steps": steps, "learning_rate": 1e-3,
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(json.dumps(run))
        python = Path(sys.executable).parent
        text = RECIPE.read_text()
        changes = {
            "--nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --time 4:00:00":
                "--nodes 2 --ntasks-per-node 1",
            "USR1@300": "USR1@50",
            "--data_parallel_replicate 4": "--data_parallel_replicate 2",
            "--save_steps 200": "--save_steps 5",
            "srun ": f"export PATH={python}:$PATH PYTHONPATH={ROOT} OMP_NUM_THREADS=1\n"
                     f"export CUDA_VISIBLE_DEVICES=\nsrun ",
        }  # fmt: skip
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        script = tmp_path / "job.sh"
        script.write_text(text)
        return script

    return write


def steps_of(folder: Path) -> list[int]:
    """The steps that were logged."""
    file = folder / "out" / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line)["step"] for line in file.read_text().splitlines() if '"loss"' in line]


@needs_slurm
def test_a_job_that_succeeds_is_completed(cluster, recipe, tmp_path):
    job = cluster.submit(recipe(6), cwd=tmp_path)
    log = tmp_path / "job.log"
    assert cluster.state(job) == "COMPLETED", log.read_text()
    assert cluster.job(job)["ExitCode"] == "0:0"
    assert steps_of(tmp_path) == list(range(1, 7))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert log.read_text().count("held out") <= 1  # one run, not one per task


@needs_slurm
def test_a_mistake_fails_and_is_not_queued_again(cluster, recipe, tmp_path):
    script = recipe(6)
    (tmp_path / "run.yaml").write_text("learning_rat: 1")
    job = cluster.submit(script, cwd=tmp_path)
    assert cluster.state(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0" and cluster.job(job)["Restarts"] == "0"
    assert "learning_rat" in (tmp_path / "job.log").read_text()


@needs_slurm
def test_at_the_time_limit_it_is_queued_again_and_resumes_to_its_end(cluster, recipe, tmp_path):
    job = cluster.submit(recipe(600), "--time", "20", cwd=tmp_path)
    cluster.wait(lambda: len(steps_of(tmp_path)) > 5)
    # Signalled 50 seconds before the end of this minute, or at once.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    cluster.restart(job)
    assert cluster.state(job) == "COMPLETED", (tmp_path / "job.log").read_text()
    assert steps_of(tmp_path) == list(range(1, 601))


@needs_slurm
def test_after_the_loss_of_a_node_it_is_queued_again_and_resumes(cluster, recipe, tmp_path):
    job = cluster.submit(recipe(200), cwd=tmp_path)
    cluster.wait(lambda: any((tmp_path / "out").glob("checkpoint-*/.metadata")))
    cluster.kill("n2")
    for process in Path("/proc").glob("[0-9]*"):  # its tasks
        try:
            env = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"SLURMD_NODENAME=n2" in env and f"SLURM_JOB_ID={job}".encode() in env:
            os.kill(int(process.name), signal.SIGKILL)
    cluster.restart(job, lost="n2")
    assert cluster.state(job) == "COMPLETED", (tmp_path / "job.log").read_text()
    assert steps_of(tmp_path) == list(range(1, 201))
    assert "resume     " in (tmp_path / "job.log").read_text()


def test_tasks_of_srun_become_ranks(monkeypatch):
    step = {
        "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]",
    }  # fmt: skip
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in names:  # set, so that they are removed after the test, then absent
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert launched() == (9, 16, 1, True)
    assert [os.environ[name] for name in names] == ["9", "16", "1", "gpu07", "20712"]
    for name in names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # `srun --pty bash`
    assert launched() == (0, 1, 0, False)
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a[1,3]-ib[2-3],b", "a1-ib2"),
        ("rack3-n[003]", "rack3-n003"),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    assert _first_host(hosts) == first
