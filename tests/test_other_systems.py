"""Windows has neither fcntl nor SIGUSR1: training works without, a journal says what is missing."""

import json
import subprocess
import sys

WITHOUT = """
import signal, sys
sys.modules["fcntl"] = None
del signal.SIGUSR1
from rrhf_fast.{command}.__main__ import main
sys.exit(main({arguments}))
"""


def run_without(command, *arguments):
    code = WITHOUT.format(command=command, arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_training(tmp_path):
    out = tmp_path / "out"
    done = run_without("train", "--max_steps", 1, "--train_batch_size", 4, "--output_dir", out)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").exists()


def test_a_journal_without_locks_is_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Why?", "responses": ["So.", "No."]}) + "\n")
    policies = "[{method: provided}]"
    out = tmp_path / "out.jsonl"
    done = run_without("sample", "--data", rows, "--output", out, "--policies", policies)
    assert done.returncode == 2 and not list(tmp_path.glob("out*"))
    assert "error: output: this system has no file locks" in done.stderr.splitlines()[-1]
