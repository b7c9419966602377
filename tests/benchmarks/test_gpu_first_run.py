"""The first run on a GPU, without one: parts that fail, hang or are killed do not affect the
figures of others, and every part runs at its toy size."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_first_run, gpu_parts, packs
from benchmarks.isolated import FAILED, INTERRUPTED, KILLED, NOT_RUN, OK, TIMED_OUT, Part
from benchmarks.results import problems

ROOT = Path(__file__).parents[2]
PARTS = """
import os, signal, subprocess, sys, time

def good(device, save, **options):
    save({"value": 1, **options})

def fails(device, save):
    save({"value": 2})
    raise RuntimeError("no such luck")

def hangs(device, save):
    save({"value": 3})
    print("waiting for Godot", flush=True)
    time.sleep(600)

def killed(device, save):
    save({"value": 4})
    os.kill(os.getpid(), signal.SIGKILL)

def crashes(device, save):
    save({"value": 5})
    os.abort()

def leaves_a_child(device, save):
    save({"pid": subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid})
    raise RuntimeError("and goes")
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Parts from the module `fake_parts` above."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_parts.py").write_text(PARTS)
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def part(name, seconds=60, **more):
        return Part(name, f"fake_parts:{name.split()[0]}", seconds, **more)

    return part


def run(chosen, out):
    results = {"command": "kernels", "device": "cpu", "engine_options": {}}
    gpu_first_run.run_parts(chosen, results, out)
    written = json.loads((out / "kernels.json").read_text())
    assert written == json.loads(json.dumps(results))
    return written


def test_a_failed_part_does_not_affect_other_figures(parts, tmp_path):
    names = ["fails", "hangs", "killed", "crashes"]
    chosen = [
        part
        for name in names
        for part in (parts(name, 3 if name == "hangs" else 60), parts(f"good after {name}"))
    ]
    records = run(chosen, tmp_path)["parts"]
    status = {name: (records[name]["status"], records[name]["detail"]) for name in names}
    assert status == {
        "fails": (FAILED, "exit code 1"),
        "hangs": (TIMED_OUT, "after 3 s"),
        "killed": (KILLED, "SIGKILL"),
        "crashes": (KILLED, "SIGABRT"),
    }
    assert [records[name]["figures"] for name in names] == [{"value": i} for i in (2, 3, 4, 5)]
    assert records["fails"]["tail"][-1] == "RuntimeError: no such luck"
    assert "waiting for Godot" in records["hangs"]["tail"]
    assert 'fake_parts.py", line 14 in hangs' in "".join(records["hangs"]["tail"])  # where it hung
    assert any("fake_parts.py" in line for line in records["crashes"]["tail"])
    for name in names:
        good = records[f"good after {name}"]
        assert good["status"] == OK and good["figures"] == {"value": 1} and "tail" not in good
    assert not (tmp_path / "part.json").exists()


def test_a_limit_may_be_one_second(parts, tmp_path):
    start = time.monotonic()
    records = run([parts("hangs", 1), parts("good")], tmp_path)["parts"]
    assert time.monotonic() - start < 60
    assert [record["status"] for record in records.values()] == [TIMED_OUT, OK]


def test_processes_of_a_part_end_with_it(parts, tmp_path):
    record = run([parts("leaves_a_child")], tmp_path)["parts"]["leaves_a_child"]
    status = Path(f"/proc/{record['figures']['pid']}/stat")
    for _ in range(100):  # it may still wait to be reaped
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it is still running")


@pytest.mark.parametrize("how", ["fails", "killed"])
def test_a_part_that_stops_the_others(parts, tmp_path, how):
    records = run([parts("good"), parts(how, stops=True), parts("good too")], tmp_path)["parts"]
    assert [record["status"] for record in records.values()][::2] == [OK, NOT_RUN]
    assert how in records["good too"]["detail"]


def test_a_slow_part_is_not_a_wrong_one(parts, tmp_path):
    instead = {"compile": False}
    chosen = [parts("hangs", 1, stops=True, instead=instead), parts("good")]
    results = run(chosen, tmp_path)
    assert results["parts"]["good"]["status"] == OK and results["engine_options"] == {}


def test_later_parts_continue_without_a_failed_option(parts, tmp_path):
    wants = {"options": {"engine_options": {}}}
    chosen = [
        parts("good first", **wants),
        parts("fails", instead={"attn_implementation": "forest_flash"}),
        parts("killed", instead={"compile": False}),
        parts("good last", **wants),
    ]
    results = run(chosen, tmp_path)
    expected = {"attn_implementation": "forest_flash", "compile": False}
    assert results["engine_options"] == expected
    given = [
        results["parts"][name]["figures"]["engine_options"] for name in ("good first", "good last")
    ]
    assert given == [{}, expected]
    # So does the next command in the same folder.
    (tmp_path / "kernels.json").rename(tmp_path / "correctness.json")
    options = gpu_first_run._parser().parse_args(
        ["step", "--out", str(tmp_path), "--attention", "x"]
    )
    engine_options = gpu_first_run._engine_options(options, tmp_path)
    assert engine_options == {"attn_implementation": "x", "compile": False}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_command_keeps_its_figures(parts, tmp_path, number):
    script = f"""
from benchmarks import gpu_first_run as first
names = ["good", "hangs", "killed"]
first.COMMANDS["kernels"] = [first.Part(name, "fake_parts:" + name, 100) for name in names]
raise SystemExit(first.main(["kernels", "--device", "cpu", "--out", {str(tmp_path)!r}]))
"""
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}
    )
    log = tmp_path / "output.log"
    while not log.exists() or "Godot" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 1
    records = json.loads((tmp_path / "kernels.json").read_text())["parts"]
    assert [r["status"] for r in records.values()] == [OK, INTERRUPTED, NOT_RUN]
    assert [r.get("figures") for r in records.values()] == [{"value": 1}, {"value": 3}, None]


def test_missing_wheels_are_listed_on_one_line(tmp_path, monkeypatch, capsys):
    gone = {"torch", "liger_kernel", "xdist"}
    monkeypatch.setattr(gpu_first_run, "find_spec", lambda name: None if name in gone else name)
    assert gpu_first_run.main(["kernels", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "missing wheels: liger-kernel, pytest-xdist\n"
    assert said.err == "error: nothing runs without torch\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_runs(tmp_path, capsys):
    assert gpu_first_run.main(["step", "--out", str(tmp_path)]) == 2
    assert "error: nothing runs without a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("command", gpu_first_run.COMMANDS)
def test_commands_fit_their_ten_minutes(command):
    chosen = gpu_first_run.COMMANDS[command]
    assert sum(part.seconds for part in chosen) <= gpu_first_run.SECONDS < 600
    assert len({part.name for part in chosen}) == len(chosen)
    for part in chosen:
        module, _, name = part.function.partition(":")
        assert callable(getattr(import_module(module), name))


@pytest.mark.slow
@pytest.mark.parametrize("command", gpu_first_run.COMMANDS)
def test_every_part_at_its_toy_size(command, tmp_path, capsys, monkeypatch):
    # The limits are for a GPU; a CPU may be busy.
    patient = [replace(part, seconds=900) for part in gpu_first_run.COMMANDS[command]]
    monkeypatch.setitem(gpu_first_run.COMMANDS, command, patient)
    assert gpu_first_run.main([command, "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"{command}.json").read_text())
    expected = [part.name for part in gpu_first_run.COMMANDS[command]]
    assert list(results["parts"]) == expected
    figures = {name: record["figures"] for name, record in results["parts"].items()}
    assert figures["machine"]["tflops"] > 0 and figures["machine"]["copy_gb_per_second"] > 0
    for name in set(figures) - {"attention 128/64 k=6", "attention 1024/128 k=8"}:
        # A peer may be absent: none is among what the tests need.
        told = [line for line in problems(figures[name]) if ": not installed" not in line]
        assert told == [], name
    if command == "correctness":
        assert len(figures["head"]["cases"]) == 4  # with and without a softcap, all and half
        assert all(figures[f"tests {name}"]["failed"] == {} for name in ("kernels", "ranks"))
    elif command == "kernels":
        for case in figures["head Llama 3 8B"]["cases"]:
            assert case["products"]["ms"] > 0
            ways = [way for way in case["contenders"].values() if "problem" not in way]
            assert len(ways) > 2
            assert all(way["over_products"]["median"] > 0 for way in ways)
        assert figures["tiles"]["fastest"]
    else:
        sizes = [case["max_tokens_per_pack"] for case in figures["packs"]["cases"]]
        assert sizes == [256, 512]
        assert all(case["mfu"] > 0 for case in figures["packs"]["cases"])
        assert (tmp_path / "profile" / "trace.json.gz").stat().st_size > 0
    assert gpu_first_run.main(["report", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert all(f"| {name} | ok |" in page for name in expected)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    "fits, tried",
    [
        (lambda size, mode: True, [(64, "none")]),
        (lambda size, mode: size < 64, [(64, "none"), (32, "none")]),
        (lambda size, mode: mode == "full", [(64, "none"), (32, "none"), (32, "full")]),
    ],
)
def test_packs_are_halved_then_layers_checkpointed(fits, tried):
    saved, calls = [], []

    def measure(size, options, save):
        calls.append((size, options["activation_checkpointing"]))
        assert options["compile"] is False
        save({"so far": size})
        return {"value": size} if fits(*calls[-1]) else out_of_memory()

    gpu_parts.fitting(measure, 64, {"compile": False}, lambda figures: saved.append(dict(figures)))
    assert calls == tried
    *others, last = saved[-1].values()
    assert last == {"value": tried[-1][0]} and all(
        "OutOfMemory" in one["problem"] for one in others
    )


def test_a_part_that_never_fits_fails():
    with pytest.raises(RuntimeError, match="OutOfMemory"):
        gpu_parts.fitting(lambda *_: out_of_memory(), 64, {}, lambda figures: None)


def test_sizes_continue_with_checkpointing_when_memory_runs_out(monkeypatch):
    measured = packs._measure

    def measure(engine, size, *more):
        checkpointed = "checkpoint" in repr(engine.lm.model.layers[0].forward)
        return measured(engine, size, *more) if checkpointed or size < 512 else out_of_memory()

    monkeypatch.setattr(packs, "_measure", measure)
    figures = packs.run(device="cpu", shape="tiny", sizes=[768, 256, 512], rounds=1)
    cases = [
        (case["max_tokens_per_pack"], case["activation_checkpointing"], "mfu" in case)
        for case in figures["cases"]
    ]
    assert cases == [
        (256, "none", True),
        (512, "none", False),
        (512, "full", True),
        (768, "full", True),
    ]


def test_wrong_or_unchecked_results_fail_a_part():
    right, wrong = {"errors": [0.0]}, {"errors": [1.0], "problem": "too far from float64"}
    gpu_parts._require({"cases": [{"contenders": {"a": right}}]})
    with pytest.raises(RuntimeError, match="/cases\\[0\\]/contenders/b: too far"):
        gpu_parts._require({"cases": [{"contenders": {"a": right, "b": wrong}}]})
    with pytest.raises(RuntimeError, match="nothing was checked"):
        gpu_parts._require({"cases": [{"contenders": {}}]})
