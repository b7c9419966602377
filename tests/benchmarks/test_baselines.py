"""Others' methods run without the engine's levers, and the check against float64 does not depend on
the layers that it checks."""

import pytest
import torch
from torch import nn

from benchmarks import points, step
from benchmarks.workloads import Lengths, build_model
from rrhf_fast.model import active_rows, lean_layers
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel

OURS = active_rows.__name__.rpartition(".")[0]


@pytest.fixture
def checked(monkeypatch):
    """Check contenders on two short queries, with layers converted however small they are."""
    monkeypatch.setattr(active_rows, "GATHER", 0)
    monkeypatch.setitem(step.LENGTHS, "paper", Lengths(16, 8, 4))

    def check(**options):
        only = [step.RELEASED, step.PADDED, step.ENGINE]
        options = {"num_queries": 2, "workloads": ["paper"], "only": only} | options
        figures = step.run(preset="smoke", device="cpu", **{"rounds": 0} | options)
        return figures["cases"][0]["contenders"]

    return check


def break_gradient(monkeypatch, function, which):
    """Let one gradient of an autograd function be 1.5 times what it is."""
    own = function.backward

    def wrong(ctx, *gradients):
        found = list(own(ctx, *gradients))
        if found[which] is not None:
            found[which] = 1.5 * found[which]
        return tuple(found)

    monkeypatch.setattr(function, "backward", staticmethod(wrong))


@pytest.mark.parametrize(
    "function, which", [(active_rows._Linear, 1), (lean_layers._Gated, 0)], ids=["rows", "gate"]
)
def test_a_wrong_gradient_of_the_engines_layers_is_found(checked, monkeypatch, function, which):
    break_gradient(monkeypatch, function, which)
    ways = checked()
    for name in (step.ENGINE, step.PADDED):
        assert ways[name]["problem"] == "too far from float64"
    assert "problem" not in ways[step.RELEASED] and ways[step.RELEASED]["gradient_error"] < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_agree_and_are_timed_with_the_same_weights(checked, dtype):
    ways = checked(rounds=1, compute_dtype=dtype)
    for way in ways.values():
        assert "problem" not in way and way["step_seconds"]


def is_untouched(lm):
    kinds = {type(module) for module in lm.modules()}
    return not any(k.__module__.startswith(OURS) for k in kinds) and not any(
        "forward" in vars(module) for module in lm.modules()
    )


def test_the_released_method_runs_on_an_untouched_model(checked, monkeypatch):
    seen, released_loss = [], step.released_loss

    def released(lm, query):
        seen.append(is_untouched(lm))
        return released_loss(lm, query)

    monkeypatch.setattr(step, "released_loss", released)
    checked()
    assert seen and all(seen)
    wrapped = build_model("tiny", device="cpu")
    RRHFModel(wrapped, LossConfig(), packing="none", max_length=64)
    assert not is_untouched(wrapped)  # or this test could not fail


@pytest.mark.parametrize("way", [points.RELEASED, points.PADDED])
def test_so_it_does_where_memory_is_measured(monkeypatch, way):
    monkeypatch.setattr(active_rows, "GATHER", 0)
    model, run = points._prepare(points.Point(way, "tiny", Lengths(16, 8, 4), "cpu"))
    assert is_untouched(model) == (way == points.RELEASED)
    assert run()["loss"] > 0 and all(p.grad is not None for p in model.parameters())


def test_a_copy_has_layers_of_its_own_and_the_same_parameters():
    lm = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    copied = step._on_same_weights(lm)
    pairs = list(zip(lm.parameters(), copied.parameters(), strict=True))
    assert all(a is b for a, b in pairs) and copied[0] is not lm[0]
    copied[0].__class__ = active_rows.ActiveLinear
    assert type(lm[0]) is nn.Linear
    copied(torch.ones(1, 2)).sum().backward()
    assert all(p.grad is not None for p in lm.parameters())
