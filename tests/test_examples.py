"""The examples run as they stand, and show what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_loop_learns_the_order(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss ([-\d.]+)", run("own_loop.py", tmp_path))]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_own_reward_rises(tmp_path):
    before, after = re.findall(r"reward (-?[\d.]+) -> (-?[\d.]+)", run("own_reward.py", tmp_path))[
        -1
    ]
    assert float(after) > float(before)


def test_own_data_is_read_and_logged(tmp_path):
    out = run("own_data.py", tmp_path)
    assert (
        len(re.findall(r"^step \d: accuracy", out, re.MULTILINE)) == 6
        and "eval_rewards/accuracies" in out
    )


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_each_example_has_a_test(path):
    assert f'"{path.name}"' in Path(__file__).read_text()
