"""benchmarks/run.py: every case can be run, and mistakes are reported in one line."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from benchmarks import run, step
from benchmarks.readme import RESULTS, speed_section
from benchmarks.tables import text_table
from benchmarks.timing import ratio


@pytest.mark.parametrize("case", run.CASES)
def test_every_case_has_the_functions_that_run_calls(case):
    module = import_module(f"benchmarks.{case}")
    assert all(callable(getattr(module, name)) for name in ("run", "table", "plot"))


def test_a_case_leaves_figures_and_a_plot(tmp_path, capsys):
    assert run.main(["loss", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "loss-smoke-cpu.json").read_text())
    assert figures["options"] == {"preset": "smoke", "device": "cpu", "rounds": 2}
    assert {"torch", "processor", "date"} <= figures["environment"].keys()
    assert (tmp_path / "loss-smoke-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "rrhf_fast torch" in capsys.readouterr().out


def test_steps_of_a_run_and_their_waits(tmp_path, capsys):
    options = ["--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    assert run.main(["loop", *options]) == 0
    (case,) = json.loads((tmp_path / "loop-smoke-cpu.json").read_text())["cases"]
    (one,) = case["runs"]
    assert len(one["steps"]) == len(one["waits"]) == 4
    assert min(one["steps"]) > 0 and case["first_wait_seconds"] == one["waits"][0] > 0
    assert (tmp_path / "loop-smoke-cpu.png").exists() and "the demo's" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, problem",
    [
        (["step", "--data", "rows.jsonl"], "real rows need --model"),
        (["step", "--model", "nowhere", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["data", "--model", "nowhere"], "expected both"),
        (["step", "--profile"], "profile: needs --out"),
        (["loss", "--out", __file__], "File exists"),
    ],
)
def test_mistakes_are_reported_in_one_line(options, problem, capsys):
    assert run.main([*options, "--device", "cpu", "--busy_ok"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and problem in line


def test_figures_of_a_dtype_have_a_file_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "run", lambda *, save, **options: {"seen": options})
    monkeypatch.setattr(step, "table", lambda figures: "")
    monkeypatch.setattr(step, "plot", lambda figures, path: None)
    options = ["--device", "cpu", "--out", str(tmp_path)]
    assert run.main(["step", *options, "--compute_dtype", "bfloat16"]) == 0
    figures = json.loads((tmp_path / "step-smoke-bfloat16-cpu.json").read_text())
    assert figures["seen"] == {
        "device": "cpu", "preset": "smoke", "rounds": 1, "compute_dtype": "bfloat16"
    }  # fmt: skip
    # Steps choose their rounds by how long one takes.
    assert run.main(["step", *options, "--preset", "paper", "--busy_ok"]) == 0
    assert "rounds" not in json.loads((tmp_path / "step-paper-cpu.json").read_text())["seen"]


@pytest.mark.parametrize(
    "options, rounds",
    [
        ([], 1),
        (["--model", "m", "--data", "rows.jsonl"], None),  # five, or three long ones
        (["--model", "m", "--data", "rows.jsonl", "--rounds", "2"], 2),
    ],
)
def test_real_rows_take_as_many_rounds_as_what_is_published(monkeypatch, options, rounds):
    seen = []
    monkeypatch.setattr(run, "_run", lambda case, options, out: seen.append(options) or 0)
    assert run.main(["step", "--device", "cpu", *options]) == 0
    assert seen[0].get("rounds") == rounds
    assert run.main(["peers", "--device", "cpu", *options]) == 0
    assert seen[1]["rounds"] == (rounds or run.ROUNDS)


@pytest.mark.parametrize(
    "codes, code, line",
    [
        ([0, -9], 1, "error: step: killed by SIGKILL"),
        ([0, -62], 1, "error: step: killed by signal 62"),
        ([2, 1], 1, "error: step: exit code 1"),
        ([0, 2], 2, "error: step: exit code 2"),
        ([0, 0], 0, None),
    ],
)
def test_all_says_which_case_ended_how(monkeypatch, capsys, codes, code, line):
    monkeypatch.setattr(run, "CASES", {"loss": "", "step": ""})
    endings = iter(codes)
    monkeypatch.setattr(run.subprocess, "call", lambda command: next(endings))
    assert run.main(["all"]) == code
    said = capsys.readouterr().err.splitlines()
    assert said[-1:] == ([] if line is None else [line])


def test_without_torch_it_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none', name='torch')")
    command = [sys.executable, run.__file__, "loss", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: torch: not installed here (make test installs it)\n"


def test_ratios_are_taken_per_round():
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_columns_are_aligned():
    assert text_table(["a", "bb"], [["ccc", "1"]]) == "a    bb\nccc   1"


def test_figures_in_the_readme_name_their_machine():
    section = speed_section(RESULTS)
    assert section.count("```bash") == section.count("```bash\npython benchmarks/")
    assert "H200 (torch 2" in section and "threads, torch 2" in section
