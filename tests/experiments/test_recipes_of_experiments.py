"""Recipes of experiments: the graph of stages, and mistakes."""

import importlib.util
from dataclasses import dataclass, replace

import pytest
import yaml

from experiments.__main__ import EXPERIMENTS, main
from experiments.recipe import CONFIGS, load_experiment, read_text, title_of
from experiments.runner import all_stages
from experiments.stages import KINDS
from rrhf_fast.train.config import TrainConfig
from tests.experiments.small import SMALL, stages_of, write


def test_equal_stages_are_one_stage(tmp_path):
    roots = {"models": None, "data": None}
    one = load_experiment(write(tmp_path / "one.yaml"), tmp_path, roots)
    arms = {arm.name: arm for arm in one.arms}
    assert arms["real"].skipped == "--models is not given" and not arms["real"].results
    rrhf, more = stages_of(arms["RRHF"]), stages_of(arms["more samples"])
    assert rrhf[1] == more[1] and rrhf[0] != more[0]
    assert rrhf[0].inputs[0] == more[0].inputs[0]
    kinds = [stage.kind for stage in all_stages(one.results())]
    # Two seeds' rows, the held-out rows, two trainings; the initial model is evaluated once.
    assert [kinds.count(k) for k in ("select", "train", "evaluate", "rank")] == [3, 2, 5, 3]
    # A default that is spelled out changes nothing.
    explicit = SMALL["arms"] | {
        "RRHF": {"train.rank_weight": 1.0},
        "SFT": {"train.rank_weight": 0.0},
    }
    changes = {"title": "u", "seeds": [1], "arms": explicit}
    other = load_experiment(write(tmp_path / "other.yaml", **changes), tmp_path, roots)
    ours = stages_of(arms["RRHF"], seed=1)
    assert stages_of(other.arms[1], seed=1) == ours != stages_of(other.arms[-1], seed=1)


def test_temperatures_repeat_what_draws_samples(tmp_path):
    roots = {"models": None, "data": None}
    best = {"evaluate": {"best_of": {"evaluation": "{again}"}}}
    stages = SMALL["stages"] | {"again": SMALL["stages"]["evaluate"]}
    changes = {"arms": SMALL["arms"] | {"best": best}, "stages": stages}
    plain = load_experiment(write(tmp_path / "plain.yaml", **changes), tmp_path, roots)
    changes |= {"temperatures": [1, 0.5, 0], "measures": ["tokens@0.5", "reward"]}
    path = write(tmp_path / "several.yaml", **changes)
    several = load_experiment(path, tmp_path, roots)
    names = ["tokens@0.5", "reward", "reward@0.5", "reward@0", "reward@best"]
    assert several.text["measures"] == names
    for before, after in zip(plain.arms, several.arms, strict=True):
        for seed, results in after.results.items():
            # What was run at T = 1 is not run again; `rank` and training are the same for all.
            assert results[:2] == before.results[seed]
            greedy = [] if after.name == "best" else [0]
            assert [temperature for _, temperature in results] == [1, 1, 0.5, *greedy]
            assert len({stage for stage, _ in results}) == len(results)
    (half, _), (greedy, _) = several.arms[1].results[0][2:]
    assert half.options["temperature"] == 0.5 and greedy.options["temperature"] == 0
    assert half.inputs == greedy.inputs == several.arms[1].results[0][0][0].inputs
    assert title_of("reward@0", names).endswith(", greedy")
    changes["arms"]["at 1"] = {"temperatures": [1]}
    few = load_experiment(write(tmp_path / "few.yaml", **changes), tmp_path, roots)
    assert {temperature for _, temperature in few.arms[-1].results[0]} == {1}
    changes["arms"]["at 1"] = {"temperatures": [0.5]}
    half = load_experiment(write(tmp_path / "half.yaml", **changes), tmp_path, roots)
    found = {stage.kind: temperature for stage, temperature in half.arms[-1].results[0]}
    assert found == {"evaluate": 0.5, "rank": 1}
    assert title_of("reward", ["reward"]) == title_of("reward", names).removesuffix(", T = 1")


def test_an_arm_may_be_compared_with_others_than_the_baseline(tmp_path):
    roots = {"models": None, "data": None}
    changes = {
        "arms": None,
        "series": {
            "a": None,
            "b": {"against": [1, "a", "a, 1"]},
            "c": {"points": [2], "against": "a, 1"},
        },
        "points": {1: None, 2: {"train.max_steps": 1}},
        "baseline": 1,
    }
    arms = {k: v for k, v in (SMALL | changes).items() if v is not None}
    path = tmp_path / "series.yaml"
    path.write_text(yaml.safe_dump(arms, sort_keys=False))
    experiment = load_experiment(path, tmp_path, roots)
    found = {arm.name: experiment.baselines_of(arm) for arm in experiment.arms}
    assert found == {
        "a, 1": [],
        "a, 2": ["a, 1"],
        "b, 1": ["a, 1"],
        "b, 2": ["b, 1", "a, 2", "a, 1"],
        "c, 2": ["a, 1"],
    }


def test_defaults_are_part_of_a_stages_key(tmp_path, monkeypatch):
    """A changed default changes the key of a stage that does not set the option."""

    @dataclass
    class Changed(TrainConfig):
        rank_weight: float = 2.0

    def key():
        roots = {"models": None, "data": None}
        return stages_of(load_experiment(path, tmp_path, roots).arms[1])[0].key

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
            stages_of_files.append(stages_of(arms[1])[0])
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
        ({"measures": ["reward@0.5"]}, "measures: reward@0.5: no such measure"),
        ({"temperatures": [0.5]}, "temperatures: expected 1, and then others"),
        ({"temperatures": [1, "a"]}, "temperatures: expected 1, and then others"),
        ({"temperatures": 1}, "temperatures: expected a list"),
        ({"temperatures": []}, "temperatures: expected 1, and then others"),
        ({"temperatures": [1, 0.5, 0.5]}, "temperatures: expected each once, found [1, 0.5, 0.5]"),
        ({"temperatures": [1, 1.0]}, "temperatures: expected each once"),
        ({"temperatures": [1, float("inf")]}, "temperatures: expected 1, and then others"),
        *(
            ({"arms": {"a": {"temperatures": own}}}, "bad.yaml: a: temperatures: expected some of")
            for own in (0.5, "hot", [], ["hot"], [[1]], [True], None)
        ),
        (
            {"arms": {"a": {"temperatures": [1, 1]}}},
            "bad.yaml: a: temperatures: expected each once",
        ),
        (
            {"temperatures": [1, 0.5], "measures": ["reward@0.7"]},
            "measures: reward@0.7: no such measure at these temperatures (there are reward, rew",
        ),
        ({"baseline": {"a": "b"}}, "baseline: expected an arm, series or point, or a list"),
        ({"baseline": ["initial", "RRFH"]}, "baseline: RRFH is not an arm, series or point"),
        ({"baseline": [["initial"]]}, "baseline: ['initial'] is not an arm"),
        ({"baseline": ["initial", None]}, "baseline: None is not an arm"),
        (
            {"arms": SMALL["arms"] | {"b": {"against": ["RRHF", "rrhf"]}}},
            "b: against: rrhf is not an arm, series or point",
        ),
        (
            {"arms": SMALL["arms"] | {"b": {"evaluate.temperature": 0.5}}},
            "b: evaluate: temperature: the recipe's temperatures set it",
        ),
        (
            {"arms": {"a": {"train.num_train_epoch": 1.0}}},
            "bad.yaml: a: train: num_train_epoch: no such option (did you mean num_train_epochs?)",
        ),
        (
            {"arms": {"a": {"evaluate.num_samples": "hot"}}},
            "bad.yaml: a: evaluate: num_samples: expected",
        ),
        ({"arms": {"a": {"train.output_dir": "x"}}}, "a: train: output_dir: the stage sets it"),
        ({"arms": {"a": {"rows": {"make": {"seed": 1}}}}}, "a: rows: hidden_size: missing"),
        ({"arms": {"a": {"temperatures": [2]}}}, "a: temperatures: expected some of [1], found"),
        ({"cost": {"over": "none", "measure": "reward"}}, "cost: expected over"),
        (
            {"cost": {"over": "initial", "measure": "nope"}},
            "cost: nope is not among the measures (reward, ranking_accuracy)",
        ),
        (
            {"cost": {"over": "initial", "measure": "reward@0.5"}},
            "cost: reward@0.5 is not among the measures",
        ),
        ({"seeds": [0, 0]}, "seeds: expected different whole numbers"),
        ({"reading": 5}, "reading: expected text, found 5"),
        ({"check": [{"better": "RRHF"}]}, "check: expected better, than and measure"),
        ({"check": [{"better": "x", "than": "RRHF", "measure": "reward"}]}, "check: expected two"),
        ({"check": [{"better": [1], "than": "RRHF", "measure": "reward"}]}, "check: expected two"),
        ({"arms": None, "series": {"a": {"points": [7]}}, "points": {1: None}}, "a: points:"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(changes, expected, tmp_path, capsys):
    path = write(tmp_path / "bad.yaml", **changes)
    assert main([str(path), "--work", str(tmp_path / "work")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.yaml" in line and expected in line
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--jobs", "-2"], "--jobs: expected at least 1, found -2"),
        (["smalest"], "smalest: no such experiment (there are alternatives, choices, "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_too(arguments, expected, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_measures_and_checks_may_name_a_temperature(tmp_path):
    measure = "reward@0.5"
    changes = {
        "temperatures": [1, 0.5],
        "measures": ["reward", "tokens", "tokens"],
        "cost": {"over": "initial", "measure": measure},
        "check": [{"better": "RRHF", "than": "initial", "measure": measure}],
    }
    text = read_text(write(tmp_path / "one.yaml", **changes))
    assert text["measures"] == ["reward", measure, "reward@best", "tokens"]


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
    for content in (b"title: [", b"title: \xff"):
        path.write_bytes(content)
        assert main([str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "bad.yaml: cannot be read" in line
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
