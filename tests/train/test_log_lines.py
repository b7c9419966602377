"""Lines in a log in the place of a progress bar."""

import subprocess
import sys

import pytest

from rrhf_fast import demo
from rrhf_fast.train import log_lines
from rrhf_fast.train.log_lines import LogLines


def record(step):
    return {"step": step, "loss": 1.5, "rewards/accuracies": 0.75, "tokens_per_second": 1234.5}


def test_the_first_step_then_one_line_every_30_seconds_and_the_last_step(monkeypatch):
    now, lines = [100.0], []
    monkeypatch.setattr(log_lines.time, "monotonic", lambda: now[0])
    shown = LogLines(20, 120, lines.append)
    for step in range(21, 121):
        now[0] += 1
        shown.show(record(step))
    assert [line.partition(":")[0] for line in lines] == [
        f"step {step} of 120" for step in (21, 51, 81, 111, 120)
    ]
    means = "loss 1.500, accuracy 0.75, 1,234 tokens/s"
    assert lines[1] == f"step 51 of 120: {means}, 00:31 elapsed, 01:09 left"
    assert lines[-1].endswith("01:40 elapsed, 00:00 left")


@pytest.mark.slow
def test_a_log_holds_lines_and_no_bar(tmp_path):
    options = [f"--output_dir={tmp_path}/out", "--max_steps=40", "--train_batch_size=2"]
    options += [f"--model_name_or_path={demo.MODEL_DIR}", f"--train_data={demo.TRAIN_FILE}"]
    command = [sys.executable, "-m", "rrhf_fast.train", *options]
    with (tmp_path / "log").open("w+") as log:
        subprocess.run(command, stdout=log, stderr=log, timeout=300, check=True)
        log.seek(0)
        text = log.read()
    assert "step 1 of 40: loss" in text and "step 40 of 40: loss" in text
    assert "step/s" not in text and len(text) < 5000
