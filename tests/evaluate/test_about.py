"""What reports say of their run, and what they must not say."""

import os
from dataclasses import replace

import pytest

from rrhf_fast.evaluate.about import about, changed_options, shown_names
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample.config import Policy
from rrhf_fast.train.config import TrainConfig


@pytest.fixture
def scored(tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text("")
    os.utime(path, (86400 * 365.25 * 30,) * 2)  # 2000-01-01, noon
    return path


def test_an_evaluation_is_described_without_its_folders(tmp_path, scored):
    config = EvaluateConfig(
        model_name_or_path=f"{tmp_path}/secret/trained",
        baseline="org/base",
        data=[f"{tmp_path}/rows.jsonl", "org/rows:test"],
        reward_fn="mine.rewards:score",
        base_url="http://me:password@host/v1",
        top_p=0.9,
        seed=7,
        output_dir=str(tmp_path),
    )
    found = about(config, scored)
    assert found["model"] == "trained (local)" and found["baseline"] == "org/base"
    assert found["data"] == "rows.jsonl (local), org/rows:test"
    assert found["reward"] == "mine.rewards:score" and found["date"] == "2000-01-01"
    assert (found["seed"], found["num_samples"]) == (7, 4)
    assert found["options"] == {"top_p": 0.9, "seed": 7}
    assert "rrhf_fast" in found["versions"] and "torch" in found["versions"]
    assert not {str(tmp_path), "secret", "password"} & set(str(found).split("/"))
    assert str(tmp_path) not in str(found) and "password" not in str(found)


def test_options_within_options_are_those_that_differ(tmp_path, scored):
    policies = [Policy(max_new_tokens=9), Policy(method="sample", model=str(tmp_path))]
    train = TrainConfig(margin=1.0, train_data="elsewhere")
    config = IterateConfig(policies=policies, train=train, rounds=3, eval_data="org/prompts")
    assert changed_options(config) == {
        "rounds": 3,
        "policies": [
            {"method": "sample", "max_new_tokens": 9},
            {"method": "sample", "model": "(a path)"},
        ],
        "train": {"margin": 1.0},
    }
    assert about(config, scored)["eval_data"] == "org/prompts"
    assert changed_options(replace(config, rounds=2, policies=IterateConfig().policies)) == {
        "train": {"margin": 1.0}
    }
    assert changed_options(IterateConfig()) == changed_options(EvaluateConfig()) == {}


def test_samples_of_an_earlier_evaluation_have_no_name(tmp_path):
    assert shown_names(f"{tmp_path}/scored.jsonl") == "samples of an earlier evaluation"
