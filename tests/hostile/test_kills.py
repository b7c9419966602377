"""Wherever a command is killed, the same command again ends with the files of an undisturbed run.

A few points of each command. All of them: `make kills`; every k-th: KILL_EVERY=k.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).with_name("kill.py")
GROUPS = {
    "stages": ["sample", "score", "judge", "evaluate", "export"],
    "training": ["train", "iterate"],
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def kill(folder, commands, *options):
    """Run the machine in a process that has no threads; returns its table."""
    words = [sys.executable, str(KILL), str(folder), *options, "--", *commands]
    environment = os.environ | {"PYTHONPATH": str(KILL.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("group", GROUPS)
def test_the_same_command_ends_as_if_nothing_had_happened(group, tmp_path):
    pytest.importorskip("openai", reason="the judge is asked through the openai package")
    every = os.environ.get("KILL_EVERY")
    how = ["--every", every] if every else ["--points", "1"]
    table = kill(tmp_path, GROUPS[group], *how)
    assert all(f"| {name} |" in table for name in GROUPS[group])
