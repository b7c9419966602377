"""benchmarks/run.py: every case can be run, and mistakes are reported in one line."""

import json
from importlib import import_module

import pytest

from benchmarks import run
from benchmarks.readme import RESULTS, speed_section
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, ratio


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
    assert run.main([*options, "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and problem in line


def test_rounds_alternate_and_ratios_are_taken_per_round():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved(ways, 2, before=lambda: calls.append("-"))
    assert calls == list("-a-b-a-b") and [len(times) for times in seconds.values()] == [2, 2]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_columns_are_aligned():
    assert text_table(["a", "bb"], [["ccc", "1"]]) == "a    bb\nccc   1"


def test_figures_in_the_readme_name_their_machine():
    section = speed_section(RESULTS)
    assert section.count("```bash") == section.count("```bash\npython benchmarks/")
    assert "H200 (torch 2" in section and "threads, torch 2" in section
