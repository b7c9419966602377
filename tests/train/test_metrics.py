"""metrics.jsonl: strict JSON, whole lines."""

import errno
import json
import os

import pytest

from rrhf_fast import TrainConfig
from rrhf_fast.train import metrics
from rrhf_fast.train.metrics import MetricsLog


def refuse(constant):
    raise AssertionError(constant)


def test_numbers_that_json_lacks_become_null(tmp_path):
    log = MetricsLog(tmp_path, TrainConfig())
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "epoch": 0.5})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 1, "loss": None, "grad_norm": None, "epoch": 0.5}
    assert json.loads(line, parse_constant=refuse) == expected


def test_records_follow_those_up_to_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    log = MetricsLog(tmp_path, TrainConfig())
    log.resume(len('{"step": 1}\n'))
    log.write({"step": 2, "loss": 1.0})
    log.close()
    assert file.read_text() == '{"step": 1}\n{"step": 2, "loss": 1.0}\n'
    assert [record["step"] for record in log.records] == [1, 2]


@pytest.mark.parametrize(
    "line", ["\0" * 11, '{"step": 1', "[1]", '{"loss": 1}', '{"step": 1, "loss": NaN}', "[" * 10**5]
)
def test_damaged_lines_stay_in_the_file_and_are_not_read(line, tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 0}}\n{line}\n')
    content = file.read_bytes()
    log = MetricsLog(tmp_path, TrainConfig())
    log.resume(len(content))
    log.close()
    assert file.read_bytes() == content and log.records == [{"step": 0}]
    assert f"1 of 2 lines of {file} are damaged" in capsys.readouterr().out


def test_a_refused_record_leaves_no_half_line(tmp_path, monkeypatch):
    class Full(metrics.FileIO):
        def write(self, data):
            if self.tell() == 0:
                return super().write(data)
            if len(data) > 5:
                return super().write(data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics, "FileIO", Full)
    log = MetricsLog(tmp_path, TrainConfig())
    log.write({"step": 1})
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        log.write({"step": 2})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
