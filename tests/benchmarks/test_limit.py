"""The limit of a step, whole steps, and where the engine's time goes: on a tiny model, properties
that hold on any machine."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import breakdown, limit, readme, step
from benchmarks.workloads import Lengths, build_model, draw, planner_for
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel

LENGTHS = Lengths(20, 9, 4)


@pytest.fixture(scope="module")
def tiny():
    """An engine, and packs of two queries. In one all rewards are equal, so only one response, the
    first of the best, has a gradient."""
    lm = build_model("tiny", device="cpu")
    engine = RRHFModel(lm, LossConfig(), max_length=4096)
    queries = draw(LENGTHS, 2, lm.config.vocab_size)
    queries[0].rewards[:] = 0
    planner = planner_for(engine, queries, 64)
    return engine, list(planner.packs(range(2)))


def by_hand(engine, tokens, rows):
    """Operations of one product of each linear layer's, for this many tokens; and of the head's."""
    layers = [m for m in engine.lm.base_model.modules() if isinstance(m, torch.nn.Linear)]
    decoder = sum(2 * tokens * layer.weight.numel() for layer in layers)
    return decoder, 2 * rows * engine.head.linear.weight.numel()


def test_what_must_be_computed(tiny):
    engine, packs = tiny
    work = limit.work_of(engine, packs)
    tokens, edges = work["tokens"], work["edges"]
    assert tokens["forward"] == 2 * LENGTHS.tokens and edges["forward"] == 2 * 4 * 9
    assert 0 < tokens["backward"] < tokens["forward"]
    assert edges["backward"] < edges["forward"] and edges["backward"] % 9 == 0
    forward, backward = work["flops"]["forward"], work["flops"]["backward"]
    assert (forward["decoder"], forward["head"]) == by_hand(
        engine, *tokens_and_edges(work, "forward")
    )
    one, head = by_hand(engine, *tokens_and_edges(work, "backward"))
    assert (backward["decoder"], backward["head"]) == (2 * one, 2 * head)
    assert 0 < backward["attention"] < 2 * forward["attention"]


def tokens_and_edges(work, way):
    return work["tokens"][way], work["edges"][way]


def test_it_is_the_same_however_the_backward_skips_rows(tiny):
    engine, packs = tiny
    other = RRHFModel(
        build_model("tiny", device="cpu"), LossConfig(), max_length=4096, skip_rows=False
    )
    assert limit.work_of(other, packs) == limit.work_of(engine, packs)


def test_frozen_weights_need_no_product(tiny):
    _, packs = tiny
    lm = build_model("tiny", device="cpu")
    whole = limit.work_of(RRHFModel(lm, LossConfig(), max_length=4096), packs)
    for layer in lm.model.layers:
        layer.mlp.requires_grad_(False)
    engine = RRHFModel(lm, LossConfig(), max_length=4096)
    work = limit.work_of(engine, packs)
    frozen = sum(p.numel() for p in lm.model.layers.parameters() if not p.requires_grad)
    saved = 2 * frozen * work["tokens"]["backward"]
    assert whole["flops"]["backward"]["decoder"] - work["flops"]["backward"]["decoder"] == saved
    # The list of products, which the speeds of single shapes are for, adds up to the same.
    flops = [work["flops"][way][part] for way in work["flops"] for part in ("decoder", "head")]
    assert sum(count for count, _ in limit._products(engine, work)) == sum(flops)


def test_nothing_to_learn_needs_no_backward(tiny):
    engine, packs = tiny
    lm = engine.lm
    plain = RRHFModel(lm, LossConfig(sft_weight=0.0, rank_weight=0.0), max_length=4096)
    work = limit.work_of(plain, packs)
    assert set(work["flops"]["backward"].values()) == {0.0}
    speeds = limit.product_speeds(plain, work, 64)
    assert limit.limit_of(plain, work, speeds, speeds)["total_seconds"] > 0


def test_the_peak_is_the_best_of_what_occurs(tiny):
    engine, packs = tiny
    work = limit.work_of(engine, packs)
    speeds = limit.product_speeds(engine, work, 64)
    shapes = {tuple(layer.weight.shape) for layer, _ in limit._linears(engine)}
    assert len(speeds) == 3 * len(shapes) + 1 and all(speed > 1e6 for speed in speeds.values())
    slow, (name, *_) = dict.fromkeys(speeds, 1e9), speeds
    found = limit.limit_of(engine, work, slow, slow | {name: 4e9})
    assert (found["peak_tflops"], found["peak_of"]) == (4e-3, name)
    assert found["peaks_before_and_after"] == [1e-3, 4e-3]
    flops = sum(sum(parts.values()) for parts in work["flops"].values())
    assert found["total_seconds"] == pytest.approx(flops / 4e9)
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    # All products but those of this one name run at a quarter of the peak, attention at the peak.
    assert found["total_seconds"] < found["own_speed_seconds"] < 4 * found["total_seconds"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def figures(request):
    options = {"preset": "smoke", "device": "cpu", "rounds": 1, "num_queries": 1}
    options |= {"workloads": ["paper"], "only": [step.RELEASED, step.ENGINE]}
    figures = step.run(**options, compute_dtype=request.param)
    return json.loads(json.dumps(figures))


def test_steps_show_their_distance_from_the_limit(figures):
    (case,) = figures["cases"]
    ways, bound = case["contenders"], case["limit"]
    assert not [way for way in ways.values() if "problem" in way]
    assert case["dtype"] == f"torch.{bound['dtype']}"
    for way in ways.values():
        assert way["of_limit"] == pytest.approx(bound["total_seconds"] / way["seconds"][0])
        assert 0 < way["of_limit"] < 1
        (gradient,), (update,), (whole,) = (
            way[f"{name}seconds"] for name in ("", "update_", "step_")
        )
        assert whole == pytest.approx(gradient + update) and update > 0
    assert ways[step.ENGINE]["of_limit"] > ways[step.RELEASED]["of_limit"]
    text = step.table(figures)
    for words in (
        "of the limit",
        "s at the peak",
        "limit / measured: released",
        "after one to warm",
    ):
        assert words in text


def test_the_breakdown_adds_up_to_the_step(figures):
    (case,) = figures["cases"]
    found, groups = case["breakdown"], case["breakdown"]["groups"]
    assert sum(groups.values()) == pytest.approx(found["seconds"], rel=0.02)
    wanted = {
        breakdown.DECODER, breakdown.HEAD, breakdown.ATTENTION, breakdown.NORMS,
        breakdown.GATHERS, breakdown.OPTIMIZER, breakdown.ALLOCATOR, breakdown.PYTHON,
    }  # fmt: skip
    assert wanted <= groups.keys() <= set(breakdown.GROUPS)
    assert sum(found["at_peak"].values()) == pytest.approx(case["limit"]["total_seconds"])
    # That they take longer than at the peak is not tested: other programs may slow either.
    assert all(groups[group] > 0 < seconds for group, seconds in found["at_peak"].items())
    assert breakdown.HEAD in breakdown.table(found)


def test_the_page_shows_what_the_figures_hold(figures):
    environment = {"device": "cpu", "processor": "P", "threads": 2, "torch": "2", "date": "today"}
    about = {"environment": environment, "case": "step", "options": {"device": "cpu"}}
    for page in (readme._step, readme._step_again):
        text = page(figures | about)
        for words in (
            "of the limit | whole steps with AdamW", "GFLOP/s: the forward of all", "s at the peak",
            "1 interleaved rounds after one to warm up", f"| {breakdown.DECODER} |",
        ):  # fmt: skip
            assert words in text
    (case,) = figures["cases"]
    new = ("rounds", "limit", "breakdown")
    older = {name: value for name, value in case.items() if name not in new}
    about["options"] = {"device": "cpu", "rounds": 2}
    text = readme._step({"cases": [older]} | about)
    assert "medians of 2 interleaved rounds" in text and "limit" not in text


def test_an_update_leaves_the_weights():
    lm = build_model("tiny", device="cpu")
    update = step._updater(lm)
    before = [p.detach().clone() for p in lm.parameters()]
    for seed in range(2):
        torch.manual_seed(seed)
        for parameter in lm.parameters():
            parameter.grad = torch.randn_like(parameter)
        update()
    assert all(torch.equal(a, b) for a, b in zip(before, lm.parameters(), strict=True))


@pytest.mark.parametrize(
    "name, part, parent, group",
    [
        ("aten::mm", "decoder", "aten::matmul", breakdown.DECODER),
        ("aten::addmm_", "head", None, breakdown.HEAD),
        ("aten::bmm", "attention", None, breakdown.ATTENTION),
        ("aten::mm", "optimizer", None, breakdown.OPTIMIZER),
        ("mkldnn::_linear_pointwise", "decoder", None, breakdown.DECODER),
        ("aten::index_select", "decoder", None, breakdown.GATHERS),
        ("aten::index_select", "attention", None, breakdown.ATTENTION),
        ("aten::mul", "decoder", None, breakdown.NORMS),
        ("aten::exp_", "head", None, breakdown.HEAD_REST),
        ("aten::empty", "attention", None, breakdown.ALLOCATOR),
        ("aten::copy_", "decoder", "aten::_to_copy", breakdown.COPIES),
        ("aten::add_", "decoder", breakdown.ACCUMULATE, breakdown.SUMS),
        ("aten::index", "data", None, breakdown.PACKS),
        ("_LinearBackward", "decoder", None, breakdown.PYTHON),
        ("decoder", "decoder", None, breakdown.PYTHON),
    ],
)
def test_groups_of_operators(name, part, parent, group):
    parent = None if parent is None else SimpleNamespace(name=parent)
    assert breakdown._group(SimpleNamespace(name=name, cpu_parent=parent), part) == group
