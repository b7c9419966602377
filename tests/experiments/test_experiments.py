"""Experiments: statistics by simulation, the graph of stages, and killed runs."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from experiments import report
from experiments.__main__ import EXPERIMENTS, main
from experiments.recipe import CONFIGS, load_experiment
from experiments.runner import all_stages
from experiments.stages import KINDS, build_config
from experiments.statistics import Table, estimate, holm, swap_test
from rrhf_fast.train.config import TrainConfig
from tests import jsonl

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


def table(values):
    return Table(values, np.ones_like(values))


def draw(rng, shape=(5, 60), seeds=0.0, prompts=0.0, noise=1.0):
    """Cells with effects of seeds and prompts of these standard deviations; the mean is 0."""
    return (
        seeds * rng.standard_normal((shape[0], 1))
        + prompts * rng.standard_normal((1, shape[1]))
        + noise * rng.standard_normal(shape)
    )


@pytest.mark.parametrize(
    "effects",
    [{}, {"seeds": 1.0, "noise": 0.5}, {"prompts": 1.0}, {"seeds": 0.2, "prompts": 0.5}],
    ids=str,
)
def test_intervals_have_their_nominal_coverage(effects):
    rng, trials = np.random.default_rng(0), 400
    intervals = [estimate(table(draw(rng, **effects)), draws=300) for _ in range(trials)]
    assert np.mean([e.low <= 0 <= e.high for e in intervals]) >= 0.93
    # Not wider than needed: some must miss.
    assert not all(e.low <= 0 <= e.high for e in intervals)


def test_a_paired_difference_is_narrower_than_its_sides():
    rng = np.random.default_rng(0)
    shared = draw(rng, seeds=1.0, prompts=1.0, noise=0.0)
    a, b = (table(shared + draw(rng, noise=0.1) + gain) for gain in (0.2, 0.0))
    gain, alone = estimate(a, b), estimate(a)
    assert gain.low > 0.1 and gain.high < 0.3
    assert alone.high - alone.low > 5 * (gain.high - gain.low)


@given(st.integers(0, 2**32 - 1))
def test_equal_arms_do_not_differ(seed):
    values = draw(np.random.default_rng(seed), shape=(3, 8))
    gain = estimate(table(values), table(values.copy()), draws=50)
    assert gain.low == gain.value == gain.high == 0
    assert swap_test(table(values), table(values), draws=100) == 1


@given(st.integers(0, 2**32 - 1))
def test_order_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    above, below = rng.random((2, 4, 12)) + 0.1
    rows, columns = rng.permutation(4), rng.permutation(12)
    a = Table(above, below)
    b = Table(above[rows][:, columns], below[rows][:, columns])
    one, other = estimate(a), estimate(b)
    assert one.value == pytest.approx(other.value) == pytest.approx(above.sum() / below.sum())
    # The draws differ.
    assert one.high - one.low == pytest.approx(other.high - other.low, rel=0.25)


def test_p_is_uniform_under_the_null_and_small_for_a_difference():
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(300):
        shared = draw(rng, prompts=1.0, noise=0.0)
        a, b = (table(shared + draw(rng)) for _ in range(2))
        p_values.append(swap_test(a, b, draws=300))
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.07)
    shifted = table(shared + draw(rng) + 1.0)
    assert swap_test(shifted, b) < 0.001


def test_an_arm_without_data_does_not_differ():
    empty, other = Table(*np.zeros((2, 3, 8))), table(np.ones((3, 8)))
    assert swap_test(empty, other) == 1


def test_a_ratio_of_sums_counts_cells_by_their_denominators():
    above, below = np.array([[1.0, 3.0], [0.0, 2.0]]), np.array([[1.0, 6.0], [0.0, 3.0]])
    assert estimate(Table(above, below)).value == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (100, 1.984)],
)
def test_few_seeds_widen_the_interval_by_students_quantile(freedom, expected):
    values = np.random.default_rng(0).standard_normal((freedom + 1, 1))
    interval = estimate(table(values), draws=40_000)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert interval.high - interval.value == pytest.approx(expected * error, rel=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


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


SMALL = {
    "title": "t",
    "question": "q",
    "seeds": [0, 1],
    "baseline": "initial",
    "measures": ["reward", "ranking_accuracy"],
    "stages": {
        "rows": {"select": {"data": "{demo.train}", "rows": 8, "seed": "{seed}"}},
        "train": {
            "train": {"model_name_or_path": "{demo.model}", "train_data": "{rows}", "max_steps": 2}
        },
        "held_out": {"select": {"data": "{demo.eval}", "rows": 6}},
        "evaluate": {
            "evaluate": {
                "model_name_or_path": "{train}",
                "data": "{held_out}",
                "reward_fn": "rrhf_fast.demo.reward:score",
                "num_samples": 2,
                "max_new_tokens": 8,
            }
        },
        "rank": {"rank": {"model_name_or_path": "{train}", "data": "{held_out}"}},
    },
    "results": ["evaluate", "rank"],
    "arms": {
        "initial": {
            "evaluate.model_name_or_path": "{demo.model}",
            "rank.model_name_or_path": "{demo.model}",
        },
        "RRHF": {},
        "more samples": {"evaluate.num_samples": 3},
        "real": {"evaluate.model_name_or_path": "{models}/none"},
    },
}


def write(path, **changes):
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return path


def test_equal_stages_are_one_stage(tmp_path):
    roots = {"models": None, "data": None}
    one = load_experiment(write(tmp_path / "one.yaml"), tmp_path, roots)
    arms = {arm.name: arm for arm in one.arms}
    assert arms["real"].skipped == "--models is not given" and not arms["real"].results
    rrhf, more = arms["RRHF"].results[0], arms["more samples"].results[0]
    assert rrhf[1] == more[1] and rrhf[0] != more[0]
    assert rrhf[0].inputs[0] == more[0].inputs[0]
    results = [s for arm in one.arms for stages in arm.results.values() for s in stages]
    kinds = [stage.kind for stage in all_stages(results)]
    # Two seeds' rows, the held-out rows, two trainings; the initial model is evaluated once.
    assert [kinds.count(k) for k in ("select", "train", "evaluate", "rank")] == [3, 2, 5, 3]
    # A default that is spelled out changes nothing.
    explicit = SMALL["arms"] | {
        "RRHF": {"train.rank_weight": 1.0},
        "SFT": {"train.rank_weight": 0.0},
    }
    changes = {"title": "u", "seeds": [1], "arms": explicit}
    other = load_experiment(write(tmp_path / "other.yaml", **changes), tmp_path, roots)
    assert other.arms[1].results[1] == arms["RRHF"].results[1] != other.arms[-1].results[1]


def test_defaults_are_part_of_a_stages_key(tmp_path, monkeypatch):
    """A changed default changes the key of a stage that does not set the option."""

    @dataclass
    class Changed(TrainConfig):
        rank_weight: float = 2.0

    def key():
        roots = {"models": None, "data": None}
        return load_experiment(path, tmp_path, roots).arms[1].results[0][0].key

    path = write(tmp_path / "one.yaml")
    before = key()
    monkeypatch.setitem(KINDS, "train", replace(KINDS["train"], config=Changed))
    assert key() != before


def test_the_content_of_files_is_part_of_a_stages_key(tmp_path):
    stages_of_files = []
    for text in ("a", "b"):
        folder = tmp_path / text
        folder.mkdir()
        (folder / "rows.jsonl").write_text(text)
        for file in ("{data}/rows.jsonl", str(folder / "rows.jsonl")):
            stages = {**SMALL["stages"], "rows": {"select": {"data": file}}}
            path = write(tmp_path / "own.yaml", stages=stages)
            arms = load_experiment(path, tmp_path, {"models": None, "data": folder}).arms
            stages_of_files.append(arms[1].results[0][0])
    first, same, other, same_as_other = stages_of_files
    assert first == same != other == same_as_other


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.yaml")])
def test_every_recipe_is_valid(name, tmp_path):
    for folder in ("stories260k", "smollm2"):
        (tmp_path / folder).mkdir()
    for file in ("pandalm_human.jsonl", "vicuna_bench_gpt4.jsonl"):
        (tmp_path / file).touch()
    roots = {"models": tmp_path, "data": tmp_path}
    experiment = load_experiment(CONFIGS / f"{name}.yaml", tmp_path, roots)
    assert len(experiment.text["seeds"]) >= (5 if name in EXPERIMENTS else 2)
    assert all(arm.results or importlib.util.find_spec("trl") is None for arm in experiment.arms)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tilte": "x"}, "tilte: no such field"),
        ({"question": ""}, "question: missing"),
        ({"baseline": "none"}, "baseline: none is not an arm"),
        ({"results": ["evalute"]}, "evalute: expected a stage"),
        ({"arms": {"initial": {"trane.max_steps": 1}}}, "there is no stage trane"),
        ({"arms": {"a": {"train.learning_rat": 1.0}}}, "learning_rat"),
        ({"arms": {"a": {"train.learning_rate": "high"}}}, "learning_rate: expected float"),
        ({"arms": {"a": {"train.train_data": "{train}"}}}, "train: depends on itself"),
        ({"arms": {"a": {"train.train_data": "{rws}"}}}, "{rws} is not a stage, file or seed"),
        ({"series": {"a": None}, "points": {1: None}}, "expected arms, or series and points"),
        ({"arms": ["initial"]}, "arms: expected a mapping"),
        ({"arms": {"a": 5}}, "arms: a: expected a mapping, found 5"),
        ({"arms": {"a": {"train.max_steps.x": 1}}}, "train.max_steps.x: there are no options"),
        (
            {"stages": SMALL["stages"] | {"held_out": {"select": None}}},
            "expected options, found None",
        ),
        ({"results": [{"evaluate": 1}]}, "results: expected names"),
        ({"measures": ["rewrad"]}, "measures: rewrad: no such measure"),
        ({"seeds": [0, 0]}, "seeds: expected different whole numbers"),
        ({"reading": 5}, "reading: expected text, found 5"),
        ({"check": [{"better": "RRHF"}]}, "check: expected better, than and measure"),
        ({"check": [{"better": "x", "than": "RRHF", "measure": "reward"}]}, "check: expected two"),
        ({"arms": None, "series": {"a": {"points": [7]}}, "points": {1: None}}, "a: points:"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(changes, expected, tmp_path, capsys):
    path = write(tmp_path / "bad.yaml", **changes)
    assert main([str(path), "--work", str(tmp_path / "work")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.yaml" in line and expected in line
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("option", ["work", "results"])
def test_a_file_where_a_folder_belongs_is_one_line(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    folders = {"work": tmp_path / "work", "results": tmp_path / "results"}
    folders[option] = tmp_path / "file"
    arguments = [x for name, folder in folders.items() for x in (f"--{name}", str(folder))]
    assert main([str(write(tmp_path / "one.yaml")), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {option}: {tmp_path / 'file'} cannot be a folder" in line


def test_invalid_yaml_is_one_line_too(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("title: [")
    assert main([str(path)]) == main([str(tmp_path / "none.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


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
