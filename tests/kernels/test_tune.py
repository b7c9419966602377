"""Tuned tiles: selected, written, read, and refused if the file is invalid."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from rrhf_fast.kernels.configs import TILES, choose
from rrhf_fast.kernels.linear_logprob import capability
from rrhf_fast.kernels.tune import candidates, tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_fastest_tile_that_runs_is_written_and_read(tmp_path, monkeypatch):
    states, weight = torch.randn(9, 16, device=DEVICE), torch.randn(70, 16, device=DEVICE)
    good = TILES["forward", 80, 4]
    broken = replace(good, block_k=3)  # not a power of two, which Triton refuses
    lines = []
    rows = tune(states, weight, torch.arange(9, device=DEVICE), [broken, good], lines.append)
    assert [row["kernel"] for row in rows] == ["forward", "dlogits"]
    assert len(lines) == 4 and sum(line.endswith(" ms") for line in lines) == 2

    rows[0]["tile"]["group_m"] = 5
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(rows))
    monkeypatch.setenv("RRHF_FAST_TILES", str(file))
    here = capability(states)
    assert choose("forward", here, 4) == replace(good, group_m=5)
    assert choose("dlogits", here, 4) == good
    assert choose("forward", 90, 2) is TILES["forward", 90, 2]  # not in the file


def test_a_device_on_which_no_tile_runs():
    states, weight = torch.randn(9, 16, device=DEVICE), torch.randn(70, 16, device=DEVICE)
    broken = replace(TILES["forward", 80, 4], block_k=3)
    with pytest.raises(RuntimeError, match="forward: none of 1 tiles runs on this device"):
        tune(states, weight, torch.arange(9, device=DEVICE), [broken], lambda line: None)


@pytest.mark.parametrize("text", [None, "{", '[{"kernel": "forward"}]', "[1]"])
def test_other_files_are_refused(text, tmp_path, monkeypatch):
    file = tmp_path / "tiles.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("RRHF_FAST_TILES", str(file))
    with pytest.raises(ValueError, match="RRHF_FAST_TILES: .*tiles.json: expected a file written"):
        choose("forward", 90, 2)


def test_candidates_include_the_table():
    for (_, family, itemsize), tile in TILES.items():
        assert itemsize == 4 or tile in set(candidates(family))
