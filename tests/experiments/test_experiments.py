"""Experiments: selected rows, pages, and killed runs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.__main__ import main
from experiments.recipe import Arm, Experiment, Stage
from experiments.stages import KINDS, build_config
from rrhf_fast import demo
from rrhf_fast.evaluate.measures import Estimate
from tests import jsonl
from tests.experiments.small import SMALL, write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


def select(folder, rows, **options):
    data = folder / "data.jsonl"
    jsonl.write(data, rows)
    KINDS["select"].run(build_config("select", {"data": str(data), **options}), folder)
    return jsonl.read(folder / "rows.jsonl")


def test_select_keeps_the_rows_and_responses_asked_for(tmp_path):
    rows = [
        {
            "query": f"q{i}",
            "responses": ["a", "a", "b", " ", "c", "d"],
            "scores": [1.2, 1.0, 0.4, 3.0, 2.0, 5.0],
            "sources": ["beam", "beam", "beam", "beam", "provided_good", "sample"],
        }
        for i in range(10)
    ]
    (row,) = select(tmp_path, rows[:1], take={"beam": 2, "provided": 1}, round_to=1.0)
    assert row == {
        "prompt": "q0",
        "responses": ["a", "b", "c"],  # no duplicates, no empty ones
        "scores": [1.0, 0.0, 2.0],
        "sources": ["beam", "beam", "provided_good"],
    }
    assert len(select(tmp_path, rows, take={"beam": 2, "provided": 1}, responses=6)) == 2
    by_fold = []
    for fold in range(3):
        held_out = {r["prompt"] for r in select(tmp_path, rows, folds=3, fold=fold, keep="fold")}
        others = {r["prompt"] for r in select(tmp_path, rows, folds=3, fold=fold)}
        assert not held_out & others and len(held_out | others) == 10
        by_fold += held_out
    assert len(by_fold) == len(set(by_fold)) == 10
    shuffled = select(tmp_path, rows, shuffle=True, seed=3)
    assert len({tuple(row["responses"]) for row in shuffled}) > 1
    for row in shuffled:
        given = zip(rows[0]["responses"], rows[0]["scores"], rows[0]["sources"], strict=True)
        kept = zip(row["responses"], row["scores"], row["sources"], strict=True)
        assert set(kept) <= set(given) and len(row["responses"]) == 4
    noisy = select(tmp_path, rows, noise=1.0, seed=3)
    assert noisy == select(tmp_path, rows, noise=1.0, seed=3)
    assert noisy != select(tmp_path, rows, noise=1.0, seed=4)


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_figures(tmp_path, capsys):
    path = write(tmp_path / "small.yaml")

    def arguments(name):
        return [str(path), "--work", str(tmp_path / name), "--results", str(tmp_path / f"{name}-r")]

    rng, work = random.Random(0), tmp_path / "killed"
    for finished in (1, 5):
        command = [sys.executable, "-m", "experiments", *arguments("killed")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(work.glob("*/result.json"))) < finished:
            time.sleep(0.01)
        time.sleep(rng.random())
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done = {p: p.stat().st_mtime_ns for p in work.glob("*/result.json")}
        assert done
    assert main(arguments("killed")) == main(arguments("whole")) == 0
    # Stages finished before the kill were not repeated.
    assert all(p.stat().st_mtime_ns == at for p, at in done.items())
    names = ("small.json", "small.md")
    one, other = ([(tmp_path / r / n).read_text() for n in names] for r in ("killed-r", "whole-r"))
    assert one == other
    assert "Left out: real (--models is not given)" in one[1]
    assert len(list((tmp_path / "whole").glob("*/result.json"))) == 13

    # The page again from the figures alone, and a check that cannot hold.
    (tmp_path / "whole-r" / "small.md").unlink()
    (tmp_path / "whole").rename(tmp_path / "away")
    assert main([*arguments("whole"), "--report_only"]) == 0
    assert (tmp_path / "whole-r" / "small.md").read_text() == one[1]
    capsys.readouterr()
    write(path, check=[{"better": "initial", "than": "initial", "measure": "reward"}])
    assert main([*arguments("whole"), "--report_only"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected initial above initial in reward" in line


@pytest.mark.slow
def test_a_run_at_several_temperatures_reports_each_and_what_it_cost(tmp_path):
    arms = {name: SMALL["arms"][name] for name in ("initial", "RRHF")}
    arms |= {"best": {"evaluate": {"best_of": {"evaluation": "{again}"}}, "rank": None}}
    evaluate = SMALL["stages"]["evaluate"]["evaluate"] | {"seed": "{seed}"}
    changes = {
        "temperatures": [1, 0.5, 0],
        "cost": {"over": "initial", "measure": "reward@0.5"},
        "arms": arms,
        "stages": SMALL["stages"]
        | {name: {"evaluate": evaluate} for name in ("evaluate", "again")},
    }
    path = write(tmp_path / "small.yaml", **changes)
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "r")]
    assert main([str(path), *folders]) == 0
    figures = json.loads((tmp_path / "r" / "small.json").read_text())
    initial, rrhf, best = figures["arms"]
    every = ["reward", "reward@0.5", "reward@0", "reward@best", "ranking_accuracy"]
    assert list(initial["measures"]) == list(rrhf["measures"]) == every
    assert list(best["measures"]) == ["reward", "reward@0.5", "reward@best"]
    # The same greedy answers whatever the seed, and other samples.
    greedy, sampled = (initial["by_prompt"][m]["numerators"] for m in ("reward@0", "reward"))
    assert greedy[0] == greedy[1] and sampled[0] != sampled[1]
    options = [json.loads(p.read_text()) for p in (tmp_path / "work").glob("*/stage.json")]
    of_greedy = [o for o in options if o["options"].get("temperature") == 0]
    assert len(of_greedy) == 4
    page = (tmp_path / "r" / "small.md").read_text()
    assert "mean reward of a sample, greedy" in page and "no gain shown" in page
    # Training counts; evaluation does not.
    assert list(rrhf["seconds"]) == ["train"] and rrhf["seconds"]["train"] > 0
    assert initial["seconds"] == {}


def test_the_cost_of_a_reward_is_all_seconds_over_the_gain():
    def arm(name, reward, seconds, series=None):
        lists = {"prompts": [0, 0], "numerators": [[reward] * 3, [reward] * 3]}
        by_prompt = {"reward": lists | {"denominators": None}}
        return {"name": name, "series": series, "by_prompt": by_prompt, "seconds": seconds}

    arms = [
        arm("free", 1.0, {}),
        arm("a, 4", 2.0, {"sample": 2.0, "train": 1.0}, "a"),
        arm("a, 8", 3.0, {"sample": 2.0, "train": 3.0}, "a"),
        arm("b", 0.5, {"train": 3.0}),
    ]
    cost = {"over": "free", "measure": "reward"}
    figures = {"cost": cost, "prompts": [["0", "1", "2"]], "measures": ["reward"], "arms": arms}
    _, _, a, b = report._cost_table(figures, arms).splitlines()
    cells = [cell.strip() for cell in a.strip("|").split("|")]
    assert cells == ["a, 8", "2.0", "3.0", "5.0", "2.000 [2.000, 2.000]", "2.5"]
    assert "no gain shown" in b
    # Who was not measured has no row; if it is the one compared with, there is no table.
    arms[3]["by_prompt"] = {}
    assert len(report._cost_table(figures, arms).splitlines()) == 3


def figures_of(rewards, measures=("reward",)):
    """Figures whose arms have these rewards [seeds, prompts]."""
    arms = []
    for name, rows in rewards.items():
        lists = {"prompts": [0] * len(rows), "numerators": rows, "denominators": None}
        arms.append({"name": name, "by_prompt": dict.fromkeys(measures, lists)})
    prompts = [[str(i) for i in range(len(rows[0]))]]
    return {"name": "f", "prompts": prompts, "arms": arms}


def gains(gaps):
    """Figures of arms a and b, with these differences by seed."""
    rng = np.random.default_rng(0)
    gained = [rng.normal(gap, 0.01, 40).tolist() for gap in gaps]
    return figures_of({"a": gained, "b": [[0.0] * 40 for _ in gaps]})


CHECK = {"better": "a", "than": "b", "measure": "reward"}


@pytest.mark.parametrize(
    ("gaps", "holds"),
    [
        ([1.0, 1.1], True),
        ([1.0, -0.1], False),  # one seed alone
        ([1.0, 1.1, 0.9], True),
        ([1.0, 0.05, 0.1, 0.02, 0.03], False),
    ],
)
def test_a_check_needs_its_seeds_beside_its_interval(gaps, holds, monkeypatch):
    assert (report.failed_checks(gains(gaps), [CHECK]) == []) == holds
    monkeypatch.setattr(report, "estimate", lambda *tables: Estimate(1.0, 0.5, 1.5))
    assert (report.failed_checks(gains(gaps), [CHECK]) == []) == holds


@pytest.mark.parametrize("gaps", [[1.0, 1.1], [1.0, 1.1, 0.9]])
def test_a_check_needs_its_interval_beside_its_seeds(gaps, monkeypatch):
    monkeypatch.setattr(report, "estimate", lambda *tables: Estimate(1.0, -0.1, 2.1))
    (line,) = report.failed_checks(gains(gaps), [CHECK])
    assert "f: expected a above b in reward, found 1.000 [-0.100, 2.100] (by seed 0.999" in line


def test_a_check_of_an_arm_without_figures_fails():
    figures = figures_of({"a": [[1.0, 2.0]], "b": [[0.0, 1.0]]})
    for missing in ({"better": "c", "than": "b"}, {"better": "a", "than": "b"}):
        (line,) = report.failed_checks(figures, [missing | {"measure": "reward@0.5"}])
        assert "expected" in line and "found no figures of both" in line


@pytest.mark.parametrize(
    ("kind", "have", "chooses"),
    [
        ("evaluate", ["reward", "reward@0.5", "reward@0"], True),
        ("evaluate", ["reward", "reward@0"], False),
        ("evaluate", ["reward"], False),
        ("best_of", ["reward", "reward@0.5"], True),
        ("best_of", ["reward"], False),
    ],
)
def test_who_lacks_a_temperature_has_no_best_one(kind, have, chooses):
    arm = Arm("a", results={0: [(Stage("key", kind, {}, ()), 1.0)]})
    experiment = Experiment("e", {"temperatures": [1, 0.5, 0]}, [0], [arm])
    figures = figures_of({"a": [[1.0, 2.0, 3.0, 4.0]]}, have)
    (record,) = figures["arms"]
    report._add_best(record, report._temperatures(arm, experiment), figures["prompts"])
    assert ("reward@best" in record["by_prompt"]) == chooses


def test_a_page_says_what_its_figures_lack():
    text = SMALL | {"measures": ["reward", "reward@best"]}
    names = list(SMALL["arms"])
    figures = {"arms": [{"name": name} for name in names], "seeds": [0, 1]}
    assert report._not_run(figures | {"measures": text["measures"]}, text) == []
    older = {"arms": [{"name": name} for name in names[1:]], "seeds": [0], "measures": ["reward"]}
    (line,) = report._not_run(older, text)
    for words in ("at T = 1 only", "have 1 of 2 seeds", "lack the arms initial"):
        assert words in line


@pytest.mark.slow
def test_a_round_is_sampled_again_from_its_model(tmp_path):
    rows = jsonl.read(demo.TRAIN_FILE)[:8]
    jsonl.write(tmp_path / "rows.jsonl", rows)
    jsonl.write(tmp_path / "eval.jsonl", jsonl.read(demo.EVAL_FILE)[:6])
    stages = {
        "rounds": {
            "iterate": {
                "model_name_or_path": "{demo.model}",
                "data": str(tmp_path / "rows.jsonl"),
                "eval_data": str(tmp_path / "eval.jsonl"),
                "reward_fn": "rrhf_fast.demo.reward:score",
                "policies": [{"method": "provided"}],
                "max_new_tokens": 16,
                "rounds": 1,
                "train": {"learning_rate": 1.0e-3, "max_steps": 2},
            }
        },
        "round": {"round": {"iterate": "{rounds}", "per_round": 2, "steps": 2}},
        "evaluate": {
            "evaluate": {
                "model_name_or_path": "{rounds}/round-1/model",
                "reference_model_name_or_path": "{demo.model}",
                "data": str(tmp_path / "eval.jsonl"),
                "reward_fn": "rrhf_fast.demo.reward:score",
                "max_new_tokens": 16,
            }
        },
    }
    arms = {
        "round 0": {"round.steps": 0, "evaluate.model_name_or_path": "{demo.model}"},
        "round 1": {},
    }
    measures = {"measures": ["reward"], "temperatures": [1, 0], "seeds": [0], "arms": arms}
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "r")]
    for result in ("round", "evaluate"):
        changes = measures | {"baseline": "round 0", "results": [result], "stages": stages}
        assert main([str(write(tmp_path / f"{result}.yaml", **changes)), *folders]) == 0
    read, again = (
        json.loads((tmp_path / "r" / f"{name}.json").read_text())["arms"]
        for name in ("round", "evaluate")
    )
    for one, other in zip(read, again, strict=True):
        assert one["by_prompt"]["reward@0"] == other["by_prompt"]["reward@0"]
    assert read[0]["by_prompt"]["reward@0"] != read[1]["by_prompt"]["reward@0"]


def test_committed_pages_agree_with_their_figures_and_recipes(tmp_path):
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    assert names
    for name in names:
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    assert main([*names, "--report_only", "--results", str(tmp_path)]) == 0
    for page in (*(f"{name}.md" for name in names), "index.md"):
        assert (tmp_path / page).read_text() == (RESULTS / page).read_text(), page


def test_a_plot_of_series_has_one_legend_beside_its_panels(tmp_path, monkeypatch):
    """A series of one point is drawn as a level."""
    drawn = []
    measures = {
        "reward": {"value": 1.0, "low": 0.5, "high": 1.5},
        "tokens": {"value": 20.0, "low": 19.0, "high": 21.0},
    }
    monkeypatch.setattr(report, "save_figure", lambda figure, axes, path: drawn.append(figure))
    arms = [
        {"name": f"{series}, {x}", "series": series, "x": x, "measures": measures}
        for series, x in [("initial", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    ]
    figures = {"title": "T", "baseline": "a", "x": "steps", "measures": ["reward", "tokens"]}
    report.plot(figures | {"arms": arms}, tmp_path / "figure.png")
    (figure,) = drawn
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["initial", "a", "b"]
    for axis, value in zip(figure.axes, (1.0, 20.0), strict=True):
        assert axis.get_legend_handles_labels()[1] == []
        assert list(axis.lines[0].get_ydata()) == [value, value]
        curves = [[float(x) for x in curve.lines[0].get_xdata()] for curve in axis.containers]
        assert np.round(curves).tolist() == [[1, 2], [1, 2]]


@pytest.mark.slow
def test_a_stage_that_fails_is_one_line_and_exit_code_1(tmp_path, capsys):
    stages = {**SMALL["stages"], "held_out": {"select": {"data": "{here}/none.jsonl"}}}
    path = write(tmp_path / "failing.yaml", stages=stages, seeds=[0])
    arguments = [str(path), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "r")]
    assert main(arguments) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "experiments: error" in x]
    assert "select" in line and "none.jsonl" in line


@pytest.mark.slow
def test_a_killed_stage_is_reported(tmp_path):
    deadly = "import os\n\n\ndef score(prompts, responses):\n    os.kill(os.getpid(), 9)\n"
    (tmp_path / "deadly.py").write_text(deadly)
    arms = {"initial": SMALL["arms"]["initial"] | {"evaluate.reward_fn": "deadly:score"}, "a": {}}
    path = write(tmp_path / "deadly.yaml", arms=arms, seeds=[0], results=["evaluate"])
    command = [sys.executable, "-m", "experiments", str(path), "--jobs", "1"]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if "experiments: error" in x]
    assert "killed by signal 9 (see" in line


@pytest.mark.slow
def test_the_smallest_experiment_passes_its_check(tmp_path):
    """The same check as `python -m experiments smallest`."""
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert main(["smallest", *folders]) == 0
    figures = json.loads((tmp_path / "results" / "smallest.json").read_text())
    assert all(arm["measures"] for arm in figures["arms"])
    assert (tmp_path / "results" / "smallest.png").stat().st_size > 10_000


def noisy() -> dict:
    """Figures of noisy arms, of which `again` repeats `b`."""
    rng = np.random.default_rng(0)
    means = {"a": 0, "b": 2, "c": 3}
    rewards = {name: rng.normal(mean, size=(3, 4)).tolist() for name, mean in means.items()}
    figures = figures_of(rewards | {"again": rewards["b"]})
    for arm in figures["arms"]:
        arm["measures"] = {}
    return figures | {"measures": ["reward"]}


def compared(against: dict[str, list[str]]) -> Experiment:
    arms = [Arm(name, None, None, names) for name, names in against.items()]
    return Experiment("test", {}, [0, 1, 2], arms)


def test_a_comparison_counts_once_in_the_correction():
    """Whichever way it is written, and under however many names."""
    p_values = {}
    for kind, against in {
        "once": {"a": [], "b": ["a"], "c": ["a"], "again": []},
        "twice": {"a": ["b", "c"], "b": ["a"], "c": ["a"], "again": ["a"]},
    }.items():
        figures = noisy()
        report._measure(figures, against)
        p_values[kind] = {
            (arm["name"], row["arm"]): row["p"]
            for arm in figures["arms"]
            for row in arm["measures"]["reward"]["against"]
        }
    once, twice = p_values["once"], p_values["twice"]
    assert twice.items() > once.items()
    assert twice["a", "b"] == twice["again", "a"] == once["b", "a"] < 1


def test_a_page_of_earlier_figures_compares_what_the_recipe_does_now():
    figures = noisy()
    report._measure(figures, {"a": [], "b": ["a"], "c": ["a"], "again": []})
    before = json.dumps(figures)
    report.update(figures, compared({"a": [], "b": ["a"], "c": ["a"], "new": ["a"]}))
    assert json.dumps(figures) == before
    report.update(figures, compared({"a": [], "b": ["a"], "c": ["b", "new"]}))
    rows = {arm["name"]: arm["measures"]["reward"]["against"] for arm in figures["arms"]}
    found = {name: [row["arm"] for row in found] for name, found in rows.items()}
    assert found == {"a": [], "b": ["a"], "c": ["b"], "again": []}
