"""benchmarks/run.py peers: what others' trainers compute is what this engine computes, one process
at a time; a peer that is missing, fails or computes something else is reported as such."""

import json
import shutil
import signal
import stat
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks import peer_processes, peers, readme, run
from benchmarks.baselines import released_rows, released_tokens
from benchmarks.peer_processes import Peer, find
from benchmarks.peers_readme import peers_section
from benchmarks.workloads import Lengths, draw, weights_note
from rrhf_fast import demo
from rrhf_fast.data.tokenise import TokenisedQuery

SMOKE = {"preset": "smoke", "device": "cpu", "num_queries": 2}


@pytest.fixture(scope="module")
def all_responses():
    """The released trainer and this engine, two rounds."""
    if find("accelerate") is None:
        pytest.skip("transformers' Trainer needs accelerate")
    saved = []
    figures = peers.run(
        **SMOKE,
        rounds=2,
        workloads=["all responses"],
        save=lambda figures: saved.append(json.dumps(figures)),
    )
    figures["environment"] = {"device": "cpu", "processor": "x", "threads": 1, "torch": "2"}
    figures["environment"]["date"] = "2026-01-01"
    figures |= {"case": "peers", "options": {"rounds": 2}}
    return json.loads(json.dumps(figures)), saved


@pytest.mark.slow
def test_the_released_trainer_computes_what_compat_official_does(all_responses, tmp_path):
    figures, saved = all_responses
    (case,) = figures["cases"]
    engine, released = (case["contenders"][n] for n in (peers.ENGINE_OFFICIAL, peers.RELEASED))
    assert "problem" not in engine and "problem" not in released
    assert released["gradient_difference"] < 1e-4 and released["loss_difference"] < 1e-5
    assert released["tokens"] > engine["tokens"]
    for way in (engine, released):
        assert len(way["seconds"]) == 2
        for gradients, step in zip(way["gradient_seconds"], way["seconds"], strict=True):
            assert 0 < gradients < step
    assert engine["seconds_over_engine"]["median"] == 1 and case["rounds"]["counted"] == 2
    assert len(saved) >= 3  # after each start, and after the rounds
    text = peers.table(figures)
    assert peers.RELEASED in text and "in transformers.Trainer" in text
    peers.plot(figures, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.slow
def test_figures_are_published_where_there_are_some(all_responses, tmp_path):
    figures, _ = all_responses
    assert "Others' trainers" not in readme.speed_section(_results(tmp_path, {}))
    missing = {"computes": "DPO", "problem": "not installed: trl (make peers)"}
    figures["cases"][0]["contenders"]["TRL"] = missing
    section = readme.speed_section(_results(tmp_path, figures))
    assert "| the released trainer | " in section
    assert "* TRL: not installed: trl (make peers)" in section
    assert section.count("```bash") == section.count("```bash\npython benchmarks/")
    figures["cases"][0]["contenders"][peers.RELEASED]["problem"] = "differs from rrhf_fast"
    with pytest.raises(ValueError, match="differs from rrhf_fast"):
        readme.speed_section(_results(tmp_path, figures))


def _results(tmp_path, figures):
    folder = tmp_path / "results"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(readme.RESULTS, folder)
    for file in folder.glob("peers-*"):
        file.unlink()
    if figures:
        (folder / "peers-smoke-cpu.json").write_text(json.dumps(figures))
    return folder


@pytest.mark.slow
def test_trl_computes_our_dpo():
    pytest.importorskip("trl", reason="TRL is the peer (make peers)")
    figures = peers.run(**SMOKE, rounds=1, workloads=["pairs"])
    ways = figures["cases"][0]["contenders"]
    trl = ways[peers.TRL]
    assert "problem" not in trl
    assert trl["gradient_difference"] < 1e-4 and trl["loss_difference"] < 1e-5
    # References are shifted: otherwise every pair's loss would be log 2, whatever is computed.
    assert abs(trl["loss"] - np.log(2)) > 1e-3
    assert trl["reference_seconds"] > 0 and "2: " in trl["setting"]
    factory = ways[peers.FACTORY]
    assert factory.get("problem", "not installed").startswith("not installed")
    if "problem" not in factory:
        assert factory["gradient_difference"] < 1e-4 and factory["reference_in_step"]


@pytest.mark.slow
def test_who_fails_or_differs_is_marked_and_the_others_go_on(monkeypatch):
    _, rows = peers.WORKLOADS["all responses"]
    engine = rows[peers.ENGINE_OFFICIAL]
    others = {
        peers.ENGINE_OFFICIAL: engine,
        "other": replace(engine, loss={"compat": "official", "rank_weight": 0.5}),
        "broken": replace(engine, module="none_of_that_name"),
        "absent": replace(engine, package="no_package_of_that_name"),
    }
    monkeypatch.setitem(peers.WORKLOADS, "all responses", (peers.ENGINE_OFFICIAL, others))
    figures = peers.run(**SMOKE, rounds=1, workloads=["all responses"])
    ways = figures["cases"][0]["contenders"]
    assert "problem" not in ways[peers.ENGINE_OFFICIAL]
    assert ways["other"]["problem"] == "differs from rrhf_fast" and ways["other"]["seconds"]
    assert "exit code 1" in ways["broken"]["problem"]
    assert "none_of_that_name" in ways["broken"]["problem"]
    assert ways["absent"]["problem"].startswith("not installed: no_package_of_that_name")
    for name in ("broken", "absent"):
        assert ways[name]["problem"][:40] in peers.table(figures)


def test_an_interpreter_is_found_by_what_it_has(tmp_path):
    assert find("torch") == sys.executable and find(None) == sys.executable
    assert find("no_package_of_that_name", [str(tmp_path / "none")]) is None
    (tmp_path / "only_there.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    assert find("only_there", [str(python)]) == str(python)


def test_relative_paths_are_those_of_the_folder_one_is_in(tmp_path, monkeypatch):
    """Peers start in another folder."""
    python = tmp_path / "v" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peer_processes, "_PROBE", "pass")
    monkeypatch.setattr(sys, "executable", "/none")
    assert find("any", ["v/python"]) == str(python)  # the link, not what it links to
    assert find("any", ["none/python"]) is None
    shutil.copytree(demo.MODEL_DIR, tmp_path / "model")
    _, path, rows = peers._inputs("smoke", "model", str(demo.TRAIN_FILE), 2, tmp_path / "x")
    assert path == str(tmp_path / "model") and len(rows) == 2


def test_a_package_that_make_peers_could_not_install_is_not_recommended_again(
    tmp_path, monkeypatch
):
    made = [tmp_path / name / "bin" / "python" for name in (".venv-peers", ".venv-llamafactory")]
    monkeypatch.setattr(peer_processes, "MADE", made)
    expected = "not installed: llamafactory (make peers)"
    assert peer_processes.missing("llamafactory") == expected
    made[1].parent.mkdir(parents=True)
    made[1].touch()
    assert peer_processes.missing("trl") == "not installed: trl (make peers)"
    said = peer_processes.missing("llamafactory")
    assert said == "not installed: llamafactory (nor in .venv-llamafactory, which make peers made)"


@pytest.fixture
def peer(tmp_path):
    """A process that runs `code` in the place of a peer's module."""

    def start(code):
        module = tmp_path / "python"
        module.write_text(f"#!{sys.executable}\nimport sys, time\n{code}\n")
        module.chmod(0o755)
        return Peer(str(module), "any", {}, tmp_path, "peer")

    return start


def test_one_that_takes_too_long_is_killed_at_once(peer):
    """It would go on working beside those that are timed."""
    with peer("print('loading', file=sys.stderr, flush=True)\ntime.sleep(600)") as slow:
        while "loading" not in slow._log.read_text():
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=r"no answer after 0\.01 s: loading"):
            slow.answer(timeout=0.01)
        assert slow._process.poll() == -signal.SIGKILL


def test_the_problem_of_one_that_fails_ends_with_what_it_said(peer):
    said = "\n".join(f"print('line {i}', file=sys.stderr)" for i in range(9))
    with peer(f"{said}\nsys.exit(3)") as failing:
        expected = "exit code 3: line 8 (before: line 4 | line 5 | line 6 | line 7)"
        with pytest.raises(RuntimeError) as raised:
            failing.answer(timeout=60)
    assert str(raised.value) == expected


@pytest.mark.parametrize("names", [["peer"], []])
def test_without_the_engine_others_are_shown_without_ratios(tmp_path, names):
    way = {"computes": "DPO", "seconds": [2.0], "gradient_seconds": [1.0], "tokens": 5}
    failed = {"computes": "DPO", "problem": "exit code 1: why"}
    way |= {"reference_seconds": 0.5, "reference_in_step": True}
    ways = {peers.ENGINE_DPO: failed} | dict.fromkeys(names, way)
    case = {"model": "m", "data": "d", "workload": "pairs", "rows": 1, "contenders": ways}
    figures = {"dtype": "float32", "cases": [case], "case": "peers", "options": {"rounds": 1}}
    figures["environment"] = {"device": "cpu", "processor": "x", "threads": 1, "torch": "2"}
    figures["environment"]["date"] = "2026-01-01"
    assert "why" in peers.table(figures)
    peers.plot(figures, tmp_path / "figure.png")
    assert f"* {peers.ENGINE_DPO}: exit code 1: why" in peers_section(figures)


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_reported_and_ended(tmp_path):
    job = {"model": str(demo.MODEL_DIR), "rows": []}
    with Peer(sys.executable, "benchmarks.peer_scripts.engine", job, tmp_path, "slow") as peer:
        with pytest.raises(RuntimeError, match=r"no answer after 0\.001 s"):
            peer.answer(timeout=0.001)
        process = peer._process
    assert process.poll() is not None


lengths = st.integers(1, 5)


@given(prompt=lengths, responses=st.lists(lengths, min_size=1, max_size=4))
def test_rows_as_the_released_code_feeds_them(prompt, responses):
    ids = iter(range(1, 100))
    take = lambda count: [next(ids) for _ in range(count)]  # noqa: E731
    prompt, responses = take(prompt), [take(count) for count in responses]
    rows, mask, labels = released_rows(prompt, responses)
    arrays = [np.array(ids, np.int32) for ids in responses]
    query = TokenisedQuery(np.array(prompt), arrays, np.zeros(len(arrays), np.float32))
    assert rows.numel() == released_tokens(query)
    for row, real, next_, response in zip(rows, mask, labels, responses, strict=True):
        assert row[real.bool()].tolist() == prompt + response
        assert next_[next_ != -100].tolist() == response
        # A label is the token after its position.
        places = torch.nonzero(next_ != -100).flatten()
        assert torch.equal(row[places + 1], next_[places])


def test_pairs_are_the_best_and_the_worst():
    (query,) = draw(Lengths(3, 4, 4), 1, 50)
    query.rewards[:] = [0.5, 2.0, -1.0, 2.0]
    (pair,) = peers._pairs([query])
    assert pair.rewards.tolist() == [2.0, -1.0]
    assert pair.response_ids[0] is query.response_ids[1]
    with pytest.raises(ValueError, match="no row has responses of unequal scores"):
        peers._pairs([replace(query, rewards=np.ones(4, np.float32))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_from_4_bits_are_named_so(tmp_path, dtype):
    g = torch.Generator().manual_seed(0)
    weight, name = torch.randn(64, 96, generator=g), str(dtype).removeprefix("torch.")
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]

    def note(*weights):
        tensors = {name: w.to(dtype).clone() for name, w in zip(names, weights, strict=True)}
        save_file(tensors, tmp_path / "model.safetensors")
        return weights_note(str(tmp_path))

    assert note(weight, weight) == name
    blocks = weight.view(64, -1, 32)
    low = blocks.amin(-1, keepdim=True)
    scale = (blocks.amax(-1, keepdim=True) - low) / 15
    rounded = (((blocks - low) / scale).round() * scale + low).view(64, 96)
    assert note(rounded, rounded).startswith("dequantised from 4 bits")
    assert note(rounded, weight) == name
    assert weights_note(str(tmp_path / "none")) == "unknown"


def test_the_command_names_weights_dtype_and_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "run", lambda **options: {"cases": [], "dtype": "bfloat16"})
    monkeypatch.setattr(peers, "plot", lambda *_: None)
    options = ["--model", str(demo.MODEL_DIR), "--data", str(demo.TRAIN_FILE)]
    options += ["--compute_dtype", "bfloat16", "--model_note", "made by hand"]
    options += ["--peers_python", "/some/python", "--device", "cpu", "--out", str(tmp_path)]
    options.append("--busy_ok")
    assert run.main(["peers", *options]) == 0
    (file,) = tmp_path.glob("*.json")
    assert file.name == "peers-model-train-bfloat16-cpu.json"
    text = file.read_text()
    assert "/some/python" not in text and str(demo.MODEL_DIR) not in text
    assert json.loads(text)["weights"] == "made by hand"
    assert "made by hand" in capsys.readouterr().out
