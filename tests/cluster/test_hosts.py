"""Two hosts under torchrun, one of them cut off in mid-run: the other ends, the next start resumes.

The cut is silent: no connection is closed or reset, as when a switch fails or a machine freezes.
"""

import json

import pytest

from rrhf_fast import demo
from rrhf_fast.stages.links import SILENCE
from tests.cluster.hosts import TwoHosts, missing, wait

MISSING = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"two hosts: {MISSING}")]
ERROR = "rrhf_fast.train: error: "
STEPS = 150


@pytest.fixture
def hosts(tmp_path):
    with TwoHosts(tmp_path) as hosts:
        yield hosts


def torchrun(rendezvous, host, folder, ranks):
    """The command for one of two hosts."""
    if rendezvous == "c10d":
        where = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{TwoHosts.address(1)}:29400"]
        where += ["--rdzv_id", "7", "--local_addr", TwoHosts.address(host)]
    else:
        where = ["--node_rank", str(host - 1), "--master_addr", "node1", "--master_port", "29400"]
    options = {
        "model_name_or_path": demo.MODEL_DIR, "train_data": demo.TRAIN_FILE, "learning_rate": 1e-3,
        "train_batch_size": 2, "max_steps": STEPS, "save_steps": 5, "save_total_limit": 2,
        "output_dir": folder / "out", "resume_from_checkpoint": "latest",
    }  # fmt: skip
    return [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(ranks), *where,
        "-m", "rrhf_fast.train", *(f"--{name}={value}" for name, value in options.items()),
    ]  # fmt: skip


def steps_of(folder):
    file = folder / "out" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


# With c10d the store is on host 1, and a torchrun that cannot reach it waits for TCP to give up.
@pytest.mark.parametrize(
    ("rendezvous", "cut", "ranks"), [("c10d", 2, 1), ("static", 1, 1), ("c10d", 2, 2)]
)
def test_a_host_that_is_cut_off(hosts, tmp_path, rendezvous, cut, ranks):
    def start():
        return [
            hosts.start(i, tmp_path / f"log{i}", *torchrun(rendezvous, i, tmp_path, ranks))
            for i in (1, 2)
        ]

    log, other_log = (tmp_path / f"log{i}" for i in (3 - cut, cut))
    torchruns = start()
    saved = (tmp_path / "out").glob
    wait(lambda: any(saved("checkpoint-*/.metadata")), 240, log.read_text)
    hosts.cut(cut)
    survivor, lost = torchruns[2 - cut], torchruns[cut - 1]
    assert survivor.wait(timeout=4 * SILENCE) == 1  # torchrun's exit code
    text = log.read_text()
    assert text.count(ERROR) == 1
    line = f"{ERROR}nothing has come from host {hosts.address(cut)} for {SILENCE} seconds; what is "
    assert line + "done is kept: run the same command again\n" in text
    # The ranks that were cut off end too, and so write nothing to a folder that both hosts see.
    wait(lambda: other_log.read_text().count(ERROR) == 1, 60, other_log.read_text)
    assert len(steps_of(tmp_path)) < STEPS
    hosts.power_off(lost)

    hosts.mend(cut)
    for process in start():
        assert process.wait(timeout=400) == 0, log.read_text()
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "resume     " in log.read_text() + other_log.read_text()


def test_a_rank_that_is_killed(hosts, tmp_path):
    logs = [tmp_path / "log1", tmp_path / "log2"]
    first, second = (hosts.start(i, logs[i - 1], *torchrun("c10d", i, tmp_path, 1)) for i in (1, 2))
    wait(lambda: len(steps_of(tmp_path)) > 2, 240, logs[0].read_text)
    hosts.power_off(second)  # its kernel closes its connections
    assert first.wait(timeout=120) == 1
    text = logs[0].read_text()
    assert text.count(ERROR) == 1
    assert f"{ERROR}another rank has ended (" in text
