"""Stages on several ranks write the bytes that one process writes, whatever is killed meanwhile."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_ranks import ROOT, launch

FOLDER = Path(__file__).parent
# The files of iterate that training does not change.
UNTRAINED = ("round-0/evaluation", "round-1/samples.jsonl", "round-1/scored.jsonl")


def contents(folder, names=("",)):
    """The bytes of all files, apart from pictures and the options, which hold times."""
    found = [path for name in names for path in [folder / name, *(folder / name).rglob("*")]]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in found
        if path.is_file() and path.name not in ("options.json", "report.html")
        and path.suffix != ".png"
    }  # fmt: skip


@pytest.mark.slow
def test_ranks_write_the_files_of_one_process(tmp_path, openai_server):
    for num_ranks in (0, 2, 4):
        code, out, errors = launch(num_ranks, FOLDER / "stages.py", tmp_path, openai_server.url)
        assert code == 0, out + errors
        assert out.count("rows are in") == 9 and out.count("report.html is in") == 1
        folder = tmp_path / str(num_ranks)
        assert not list(folder.rglob("*.journal*")) and not list(folder.rglob(".lock"))
        for name in [path.name for path in (tmp_path / "0").iterdir()]:
            names = UNTRAINED if name == "iterate" else ("",)
            if name.endswith(".jsonl"):
                assert (folder / name).read_bytes() == (tmp_path / "0" / name).read_bytes(), name
            else:
                expected = contents(tmp_path / "0" / name, names)
                assert len(expected) > 3 and contents(folder / name, names) == expected, name
        assert (folder / "iterate/report.html").exists()
        assert (folder / "iterate/round-1/evaluation/report.html").exists()


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    """Arguments of a slow run of 60 batches, without its output."""
    (tmp_path / "traces").mkdir()
    monkeypatch.setenv("TRACES", str(tmp_path / "traces"))
    rows = [{"prompt": f"{i}?", "responses": [f"{i}{'!' * (i % 7)}", "no"]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--batch_size", "1", "--reward_fn", "tests.distributed.rewards:slow"]
    return ["-m", "rrhf_fast.score", "--data", tmp_path / "rows.jsonl", *options]


def start(num_ranks, arguments, **variables):
    command = [sys.executable]
    if num_ranks:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(num_ranks)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command + list(map(str, arguments)), env=env, **pipes)


def wait_for_results(traces, num_ranks, calls=3):
    """Until each rank of a run has called the function so often; returns process ids by rank."""
    give_up = time.monotonic() + 180
    while True:
        found = [path for path in traces.iterdir() if path.read_text().count("\n") >= calls]
        if len(found) == num_ranks:
            return {path.name.partition(".")[0]: int(path.suffix[1:]) for path in found}
        assert time.monotonic() < give_up
        time.sleep(0.05)


def kill_and_continue(scoring, tmp_path, output, *, killed, last):
    """Runs of (number of ranks, rank to kill) each, then one to the end."""
    traces, calls = tmp_path / "traces", 0
    for num_ranks, rank in killed:
        process = start(num_ranks, [*scoring, "--output", output])
        os.kill(wait_for_results(traces, num_ranks)[str(rank)], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)  # well before the work would be done
        assert process.returncode != 0 and not output.exists(), errors
        calls += sum(path.read_text().count("\n") for path in traces.iterdir())
        calls -= num_ranks  # those under way
        for path in traces.iterdir():
            path.unlink()
    code, _, errors = launch(last, *scoring, "--output", output)
    assert code == 0, errors
    assert calls + sum(path.read_text().count("\n") for path in traces.iterdir()) <= 60
    assert not list(tmp_path.glob("*.journal*"))


@pytest.mark.slow
def test_after_a_killed_rank_any_number_of_ranks_continues(scoring, tmp_path):
    assert launch(0, *scoring, "--output", tmp_path / "whole.jsonl")[0] == 0
    for path in (tmp_path / "traces").iterdir():
        path.unlink()
    kill_and_continue(
        scoring, tmp_path, tmp_path / "a.jsonl", killed=[(3, 2), (2, 0), (2, 1)], last=2
    )
    for path in (tmp_path / "traces").iterdir():
        path.unlink()
    kill_and_continue(scoring, tmp_path, tmp_path / "b.jsonl", killed=[(2, 1)], last=0)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").read_bytes() == whole == (tmp_path / "b.jsonl").read_bytes()


def tasks_of_srun(arguments, count=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        start(0, arguments, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(count)
    ]


@pytest.mark.slow
def test_tasks_of_srun_end_with_75_at_the_time_limit_and_continue(scoring, tmp_path):
    output = tmp_path / "scored.jsonl"
    arguments = [*scoring, "--output", output]
    tasks = tasks_of_srun(arguments)
    wait_for_results(tmp_path / "traces", 2)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    assert [task.wait(timeout=60) for task in tasks] == [75, 75]
    assert len(list(tmp_path.glob("*.journal*"))) == 2
    tasks = tasks_of_srun(arguments)
    printed = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert "60 scored" in printed[0][0] and printed[1][0] == ""
    assert output.read_text().count("\n") == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, problem",
    [(["--batch_size", "0"], "batch_size: "),
     (["--data", "missing.jsonl"], "missing.jsonl: "),
     (["--reward_fn", "tests.distributed.rewards:fails_on_rank_1"], "raised KeyError: 'oops'")],
)  # fmt: skip
def test_a_mistake_is_one_line(change, problem, scoring, tmp_path):
    code, _, errors = launch(2, *scoring, "--output", tmp_path / "out.jsonl", *change)
    lines = [line for line in errors.splitlines() if "rrhf_fast.score: error: " in line]
    lost = "another rank has ended"
    assert code != 0 and problem in "".join(lines), errors
    assert len([line for line in lines if lost not in line]) == 1
    assert not (tmp_path / "out.jsonl").exists()


APART = """
import os, sys
from rrhf_fast.score.__main__ import main
from rrhf_fast.stages import journal
from rrhf_fast.stages.command import leave
journal._UNSEEN = 1.0
os.chdir(os.environ["RANK"])  # as if each host had a disk of its own
leave(lambda: main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_that_do_not_share_the_folder_are_told(scoring, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    (tmp_path / "apart.py").write_text(APART)
    code, _, errors = launch(2, tmp_path / "apart.py", *scoring[2:], "--output", "out.jsonl")
    host = socket.gethostname()
    expected = f"output: out.jsonl is in another folder for rank 1 on host {host} than for rank 0"
    assert code != 0 and errors.count(expected) == 1
    assert not list((tmp_path / "1").iterdir())  # nothing is left
    code, _, errors = launch(2, tmp_path / "apart.py", *scoring[2:], "--output", "below/out.jsonl")
    assert code != 0
    assert errors.count(f"output: below/out.jsonl cannot be written by rank 1 on host {host}") == 1


JOINS = """
from rrhf_fast.stages.ranks import join_ranks

def refuse():
    raise ValueError("no")

for number in range(10):
    with join_ranks("score", None) as ranks, join_ranks("score", None) as inner:
        assert inner.group is ranks.group
        assert ranks.gather((number, ranks.rank)) == [(number, 0), (number, 1)]
        assert ranks.once(lambda: ranks.rank) == 0
        assert ranks.first(lambda: "here") == ("here" if ranks.is_first else None)
        assert list(ranks.share(range(5))) == [[0, 2, 4], [1, 3]][ranks.rank]
        for call in (ranks.first, ranks.once):
            try:
                call(refuse)
            except ValueError as error:
                assert error.on_all_ranks
            else:
                raise AssertionError
print("joined and left")
"""


@pytest.mark.slow
def test_a_run_is_joined_and_left_repeatedly(tmp_path):
    (tmp_path / "joins.py").write_text(JOINS)
    code, out, errors = launch(2, tmp_path / "joins.py", timeout=120)
    assert code == 0, errors
    assert out.count("joined and left") == 2
