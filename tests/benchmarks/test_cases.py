"""Memory, scaling and the host's work: properties of their figures on any machine."""

import json
import math
import sys

import pytest

from benchmarks import data, memory, pairs, points, sample, scaling
from benchmarks.workloads import Lengths

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


def shown(case, figures, tmp_path):
    """Figures as read back from a file, after table and plot have accepted them."""
    figures = json.loads(json.dumps(figures))
    assert case.table(figures)
    case.plot(figures, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    return figures


@on_linux
def test_memory_of_the_same_gradient(monkeypatch, tmp_path):
    ways = (points.RELEASED, points.REPEATED, points.ENGINE, points.ALONE, points.LEAN)
    monkeypatch.setattr(memory, "WAYS", ways)
    figures = memory.run(preset="smoke", device="cpu", rounds=1)
    (case,) = shown(memory, figures, tmp_path)["cases"]
    ways = case["ways"]
    for name, way in ways.items():
        assert math.isclose(way["loss"], ways[points.RELEASED]["loss"], rel_tol=1e-4), name
        assert way["total_bytes"] == case["model_bytes"] + way["extra_bytes"]
    assert ways[points.ENGINE]["tokens"] == 2 * (128 + 6 * 63)
    assert ways[points.REPEATED]["tokens"] == 2 * 6 * (128 + 63)
    # Logits of 6 * 191 tokens over 8,192; as much again for log-softmax and for its gradient.
    logits = 6 * 191 * 8192 * 4
    assert 3 * logits < ways[points.RELEASED]["extra_bytes"] < 10 * logits
    # One query at a time, like the others. Measured: 64 MiB for 100, and 37 for 191.
    assert ways[points.ALONE]["extra_bytes"] < 0.8 * ways[points.REPEATED]["extra_bytes"]
    assert ways[points.LEAN]["extra_of_released"] < 1 / 3


@on_linux
def test_slopes(monkeypatch, tmp_path):
    ways = (points.ENGINE, points.REPEATED)
    sweeps = (
        scaling.Sweep("k", (2, 10), Lengths(96, 16, 0), ways),
        scaling.Sweep(
            "vocab_size", (65_536, 98_304), Lengths(64, 32, 4), (points.ENGINE, points.RELEASED)
        ),
        scaling.Sweep("correlation", (0.0, 1.0), Lengths(16, 8, 6), **scaling.RANKED),
    )
    monkeypatch.setitem(scaling.PRESETS, "smoke", sweeps)
    figures = scaling.run(preset="smoke", device="cpu", rounds=1)
    by_k, by_vocabulary, by_correlation = shown(scaling, figures, tmp_path)["sweeps"]

    engine, repeated = (by_k["series"][way] for way in ways)
    for one, another in zip(engine["points"], repeated["points"], strict=True):
        assert one["tokens"] < another["tokens"]
    assert engine["slopes"]["extra_bytes"] < repeated["slopes"]["extra_bytes"] / 2

    slopes = {way: one["slopes"]["extra_bytes"] for way, one in by_vocabulary["series"].items()}
    # Gradients of the head and of the embedding, which share one matrix here, and no logits.
    assert slopes[points.ENGINE] < 2.5 * 4 * figures["hidden_size"]
    # Three times the logits of every token.
    assert slopes[points.RELEASED] > 2.5 * 4 * 4 * (64 + 31)

    unranked, ranked = by_correlation["series"][points.ACTIVE]["points"]
    assert ranked["active_fraction"] < unranked["active_fraction"] <= 1


def test_losses_of_a_pair(tmp_path):
    figures = pairs.run(preset="smoke", device="cpu", rounds=1)
    (case,) = shown(pairs, figures, tmp_path)["cases"]
    assert set(case["times_hinge"]) == set(pairs.LOSSES)
    assert max(case["gradient_differences"].values()) < 1e-4
    assert case["times_hinge"]["hinge"]["median"] == 1


def test_a_baseline_is_left_out_where_it_would_be_too_slow():
    sweep = scaling.Sweep("prompt", (64, 100_000), Lengths(0, 64, 6))
    options = {"shape": "tiny", "device": "cpu", "rounds": 1}
    assert list(sweep.points(points.REPEATED, **options)) == [64]
    assert list(sweep.points(points.ENGINE, **options)) == [64, 100_000]


def test_the_work_of_the_host(tmp_path):
    figures = data.run(preset="smoke", device="cpu", rounds=1, num_queries=16)
    plain, shared = shown(data, figures, tmp_path)["cases"]
    assert shared["tokens"] < shared["tokens_no_prefix_shared"] < shared["tokens_unpacked"]
    assert plain["tokens_no_prefix_shared"] == 16 * (128 + 6 * 63)
    assert plain["tokens_unpacked"] == 16 * 6 * (128 + 63)
    for case in (plain, shared):
        assert case["share_of_step"] > 0 and all(case["seconds"].values())
    with pytest.raises(ValueError, match="data, model: expected both"):
        data.run(preset="smoke", device="cpu", rounds=1, data="rows.jsonl")


def test_sampling_is_measured_with_what_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "find_spec", lambda _: None)
    figures = sample.run(preset="smoke", device="cpu", rounds=2)
    (case,) = shown(sample, figures, tmp_path)["cases"]
    for name in (sample.PLAIN, sample.ENGINE):
        way = case["ways"][name]
        assert len(way["seconds"]) == 2 and way["responses_per_second"] > 0
    assert case["ways"][sample.PLAIN]["of_transformers"]["median"] == 1
    assert "vLLM is not installed" in case["ways"][sample.VLLM]["problem"]
