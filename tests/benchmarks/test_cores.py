"""Threads bound to cores, and what other programs use of them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cores, loss, run
from benchmarks.markdown import command
from benchmarks.points import isolated

ROOT = Path(__file__).parents[2]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity and /proc are Linux's")
several_cores = pytest.mark.skipif(len(cores.CORES) < 2, reason="one core is all there is")

# Cores allowed to the first thread, to all threads after a product on several, and to a child.
SEEN = """
import json, os, subprocess, sys
from pathlib import Path
from benchmarks import cores, run
device = run._device("cpu", sys.argv[1])
import torch
a = torch.randn(600, 600)
a @ a
tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
child = "import os; print(len(os.sched_getaffinity(0)))"
child = int(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
print(json.dumps({
    "first": sorted(os.sched_getaffinity(0)),
    "all": sorted(sorted(os.sched_getaffinity(task)) for task in tasks),
    "child": child,
    "binding": cores.binding(),
}))
"""


def seen_by(case, **environment):
    """What a process that runs this case sees."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    result = subprocess.run(
        [sys.executable, "-c", SEEN, case],
        capture_output=True, text=True, cwd=ROOT, env=own | environment, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


@on_linux
@several_cores
def test_threads_of_a_case_in_one_process_are_bound():
    seen = seen_by("step", OMP_NUM_THREADS="2")
    assert len(seen["first"]) < len(cores.CORES)
    assert [core for core in seen["all"] if core != seen["first"]], "both share the same core"
    assert seen["binding"]["OMP_PROC_BIND"] == "true"
    assert seen["binding"]["cores_of_first_thread"] < seen["binding"]["cores"]


@on_linux
@pytest.mark.parametrize("case, by_user", [("rows", {}), ("memory", {"OMP_PROC_BIND": "true"})])
def test_processes_of_other_cases_may_use_all_cores(case, by_user):
    assert seen_by(case, **by_user)["child"] == len(cores.CORES)


@on_linux
def test_a_users_own_binding_stays():
    seen = seen_by("step", OMP_PROC_BIND="false")
    assert seen["first"] == sorted(cores.CORES)
    assert seen["binding"]["OMP_PROC_BIND"] == "false"


def affinities():
    a = torch.randn(600, 600)
    a @ a
    tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    return [sorted(os.sched_getaffinity(task)) for task in tasks]


@on_linux
@several_cores
def test_threads_of_a_process_whose_memory_is_measured_are_bound(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # Started by another test, the server may have another environment.
    script = "from tests.benchmarks import test_cores as t\nprint(t.in_isolation())"
    environment = {n: v for n, v in os.environ.items() if not n.startswith("OMP_")}
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=True,
    )  # fmt: skip
    allowed = json.loads(result.stdout)
    assert len({core for core in map(tuple, allowed) if len(core) < len(cores.CORES)}) > 1


def in_isolation():
    with isolated() as process:
        return json.dumps(process.submit(affinities).result())


@on_linux
def test_the_work_of_descendants_is_own_while_they_run_and_afterwards():
    work = "import time\nwhile time.process_time() < 0.5: pass\nprint(1, flush=True); input()"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    before, per_second = cores._own_ticks(), os.sysconf("SC_CLK_TCK")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", inner], **pipes) as child:
        child.stdout.readline()
        assert cores._own_ticks() - before >= 0.45 * per_second
        child.communicate("\n")
    assert cores._own_ticks() - before >= 0.45 * per_second


@on_linux
def test_the_work_of_others_is_found(monkeypatch):
    """This process's own work, if it were another's."""
    ticks = cores._own_ticks()
    monkeypatch.setattr(cores, "_own_ticks", lambda: ticks)
    others, start = cores.Others(), time.process_time()
    while time.process_time() - start < 0.5:
        pass
    assert cores.is_disturbed(others.cores())


def test_a_system_that_does_not_say_is_no_disturbance(monkeypatch):
    monkeypatch.setattr(cores, "_used_by_others", lambda: None)
    assert cores.Others().cores() is None and not cores.is_disturbed(None)
    found = cores.check_load(refuse=True, seconds=0)
    assert found == {"cores_used_by_others": None, "disturbed": False}
    said = cores.remarks({"environment": {"load": found}})
    assert said == ["load of other programs is unknown here"]


@pytest.mark.parametrize(
    "text, cores_left",
    [("max 100000", 4), ("150000 100000", 1.5), ("900000 100000", 4), ("", 4), (None, 4)],
)
def test_a_containers_limit_is_read(monkeypatch, tmp_path, text, cores_left):
    monkeypatch.setattr(cores, "CORES", {0, 1, 2, 3})
    monkeypatch.setattr(cores, "_CPU_MAX", tmp_path / "cpu.max")
    if text is not None:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert cores.num_cores() == cores_left
    assert cores.binding()["quota"] == {"150000 100000": 1.5, "900000 100000": 9.0}.get(text)
    assert cores.is_disturbed(0.1) == (cores_left == 1.5)


def test_what_is_published_says_what_disturbed_it():
    idle = {"cores_used_by_others": 0.0, "disturbed": False}
    rounds = {"counted": 3, "disturbed_counted": 0}
    figures = {"environment": {"load": idle}, "cases": [{"rounds": rounds}, {"rounds": rounds}]}
    about = {"case": "step", "options": {"preset": "paper"}}
    assert cores.remarks(figures) == [] and "Note" not in command(figures | about)
    figures["cases"][1] = {"rounds": rounds | {"disturbed_counted": 2}}
    expected = "other programs disturbed 2 of 6 rounds that count"
    assert cores.remarks(figures) == [expected]
    assert command(figures | about).endswith(f"```\n\nNote: {expected}.")


class Busy:
    """Others that use one core."""

    def cores(self):
        return 1.0


def test_a_busy_machine_is_refused_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cores, "Others", Busy)
    monkeypatch.setattr(cores, "CORES", {0, 1})
    options = ["loss", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main([*options, "--preset", "paper"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: busy: other programs use 1.00 of 2 cores")
    assert "at most 5%" in line and "hypervisor" in line
    assert "--busy_ok" in line and not list(tmp_path.iterdir())
    # Smoke tests go on, and figures say beside what they were taken.
    assert run.main(options) == 0
    figures = json.loads((tmp_path / "loss-smoke-cpu.json").read_text())
    assert figures["environment"]["load"] == {"cores_used_by_others": 1.0, "disturbed": True}
    assert {"threads", "binding"} <= figures["environment"].keys()
    assert "note: other programs used 1.00 cores before the run\n" in capsys.readouterr().out


def test_a_busy_machine_may_be_accepted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cores, "Others", Busy)
    monkeypatch.setattr(cores, "CORES", {0, 1})
    monkeypatch.setattr(loss, "run", lambda **options: {"options_seen": sorted(options)})
    monkeypatch.setattr(loss, "table", lambda figures: "")
    monkeypatch.setattr(loss, "plot", lambda figures, path: None)
    options = ["loss", "--device", "cpu", "--preset", "paper", "--busy_ok", "--out", str(tmp_path)]
    assert run.main(options) == 0
    figures = json.loads((tmp_path / "loss-paper-cpu.json").read_text())
    assert figures["environment"]["load"]["disturbed"]
    assert "note: taken with --busy_ok\n" in capsys.readouterr().out
    assert figures["options_seen"] == ["device", "preset", "rounds", "save"]
