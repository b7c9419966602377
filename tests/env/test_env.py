"""`rrhf-fast env`: what a bug report needs, and nothing that must not be in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rrhf_fast
from rrhf_fast.env.__main__ import main
from rrhf_fast.env.facts import facts
from rrhf_fast.model.attention import BACKENDS


@pytest.fixture(scope="module")
def found():
    return facts()


def test_every_fact_is_found(found):
    assert found["rrhf_fast"].startswith(f"{rrhf_fast.__version__} in ")
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["attention"].split()[0] in BACKENDS
    assert str(torch.get_num_threads()) in found["threads"]
    assert os.environ["RRHF_FAST_CACHE"] in found["cache"]
    assert "failed" not in json.dumps(found)


def test_text_and_json_say_the_same(found, capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for words in (["--json"], ["--json", "true"], ["--json=true"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == found
    for name, version in found["packages"].items():
        assert any(name in line and (version or "not installed") in line
                   for line in text.splitlines())  # fmt: skip
    assert found["attention"] in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_values_of_the_environment_stay_here(monkeypatch, capsys):
    secret = "hf_abcdefghijklmnop"
    names = ["HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "https_proxy", "OMP_NUM_THREADS"]
    for name in names:
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words in ([], ["--json"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert secret not in out
        assert all(name in out for name in names)
    assert json.loads(out)["environment"]["HF_HUB_OFFLINE"] == "1"


def test_the_home_folder_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RRHF_FAST_CACHE", str(tmp_path / "cache"))
    found = facts()
    assert found["cache"].startswith("~/cache (tokens)")
    assert str(tmp_path) not in json.dumps(found)


def test_a_broken_installation_is_reported_too(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    path = f"{tmp_path}{os.pathsep}{Path(rrhf_fast.__file__).parents[1]}"
    command = [sys.executable, "-m", "rrhf_fast.env"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0
    assert "libcudart.so.13: cannot open" in done.stdout and "transformers" in done.stdout
