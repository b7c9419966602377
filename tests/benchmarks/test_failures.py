"""A contender that fails, runs out of memory or is wrong does not affect the others' figures, which
are written before the next contender runs."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import active, attention, exact, kernel, loss, memory, points, run, scaling, step
from benchmarks.results import problems
from benchmarks.timing import interleaved
from benchmarks.workloads import Lengths, build_model, draw


def broken(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


PROBLEM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


def checked(case, figures, saved, tmp_path, names):
    """Final and intermediate figures are accepted by the file, the table and the plot."""
    assert len(saved) > 1 and saved[-1] == json.loads(json.dumps(figures))
    text = case.table(figures)
    assert all(name in text for name in names)
    case.plot(figures, tmp_path / "figure.png")
    return figures["cases"][0]["contenders"]


def snapshots():
    saved = []
    return saved, lambda figures: saved.append(json.loads(json.dumps(figures)))


def test_rounds_continue_without_a_failing_way():
    results, calls = {"good": {}, "bad": {}, "late": {}}, []

    def late():
        calls.append(1)
        if len(calls) == 3:  # after the warm-up and one round
            broken()

    ways = {"good": lambda: None, "bad": broken, "late": late}
    seconds = interleaved(ways, 3, results=results)
    assert seconds.keys() == {"good"} and len(seconds["good"]) == 3
    assert results == {"good": {}, "bad": {"problem": PROBLEM}, "late": {"problem": PROBLEM}}
    with pytest.raises(torch.OutOfMemoryError):
        interleaved(ways, 1)


def test_heads(monkeypatch, tmp_path):
    own = kernel.own

    def contenders(device, sizes):
        def wrong(hidden, weight, queries):
            return 1.1 * heads["plain torch"](hidden, weight, queries)

        def nan(hidden, weight, queries):
            return np.nan * heads["plain torch"](hidden, weight, queries)

        heads = own(device, sizes)
        return heads | {"bad": broken, "wrong": wrong, "nan": nan, "absent": "not installed"}

    monkeypatch.setattr(kernel, "contenders", contenders)
    saved, save = snapshots()
    options = {"shapes": [(512, 32, 500)], "fractions": (1.0, 0.5), "workspaces_mb": [1, 2]}
    figures = kernel.run(preset="smoke", device="cpu", rounds=1, save=save, **options)
    ways = checked(kernel, figures, saved, tmp_path, ["bad", "rrhf_fast torch, one sweep, 2 MiB"])
    failed = {name: way["problem"] for name, way in ways.items() if "problem" in way}
    far = "too far from float64"
    assert failed == {"bad": PROBLEM, "wrong": far, "nan": far, "absent": "not installed"}
    assert ways["wrong"]["gradient_errors"] == pytest.approx([0.1, 0.1], rel=0.01)
    for name in set(ways) - set(failed):
        assert ways[name]["over_products"]["median"] > 0 and ways[name]["ms"] > 0
    assert set(failed) <= saved[len(ways) - 1]["cases"][0]["contenders"].keys()


def test_heads_that_are_only_checked():
    options = {"shapes": [(512, 32, 500)], "fractions": (1.0,), "softcaps": [None, 5.0]}
    figures = kernel.run(preset="smoke", device="cpu", rounds=0, **options)
    for case in figures["cases"]:
        ways = case["contenders"].values()
        missing = [w["problem"] for w in ways if "gradient_errors" not in w]
        assert all(problem.startswith("not installed") for problem in missing)
        assert all(max(w["gradient_errors"]) < 1e-5 for w in ways if "gradient_errors" in w)
        assert len(ways) - len(missing) >= 3
    # A softcap changes the expected gradients.
    case = dict(shape=(512, 32, 500), fraction=1.0, contenders={}, softcap=5.0)
    ignores = {"plain": lambda h, w, q: q.loss(kernel._plain(h, w, q.targets, None))}
    kernel._measure(case, ignores, "cpu", torch.float32, 0, lambda: None)
    assert problems(case)


def test_attention(monkeypatch, tmp_path):
    ways = attention._ways

    def more(*arguments):
        all_ways = ways(*arguments)
        right = all_ways["unpacked"]
        return {"bad": broken, "wrong": lambda: lambda *qkv: 1.1 * right()(*qkv)} | all_ways

    monkeypatch.setattr(attention, "_ways", more)
    monkeypatch.setattr(attention, "_decoder", broken)
    saved, save = snapshots()
    options = {"shapes": [(16, 8, 3)], "tokens": 128, "save": save}
    figures = attention.run(preset="smoke", device="cpu", rounds=1, **options)
    results = checked(attention, figures, saved, tmp_path, ["bad", "wrong", "out of memory"])
    assert results["bad"]["problem"] == figures["decoder"]["problem"] == PROBLEM
    assert "problem" in results["wrong"] and results["forest_sdpa"]["ms"] > 0


@pytest.mark.parametrize("whole", [False, True])
def test_an_error_after_the_first_tree_is_found_in_the_whole_pack(monkeypatch, whole):
    ways = attention._ways

    def more(pack, *others):
        right = ways(pack, *others)["forest_sdpa"]
        first = int(pack.subtree_end[0])

        def attend(q, k, v):
            out = right()(q, k, v)
            return torch.cat([out[:first], 2 * out[first:]])

        return {"wrong later": lambda: attend}

    monkeypatch.setattr(attention, "_ways", more)
    options = {"shapes": [(16, 8, 3)], "tokens": 128, "whole": whole, "decoder": False}
    figures = attention.run(preset="smoke", device="cpu", rounds=0, **options)
    assert bool(problems(figures)) == whole


def test_gqa_is_requested_only_from_versions_that_need_it():
    def newer(q, k, v, *, window_size=(-1, -1), enable_gqa=False): ...
    def older(q, k, v, *, window_size=(-1, -1)): ...

    assert attention.gqa_option(newer) == {"enable_gqa": True}
    assert attention.gqa_option(older) == {}


def test_options_of_flex_attention_are_changed_for_one_contender(monkeypatch):
    own = lambda *args: {"IS_DIVISIBLE": True, "args": args}  # noqa: E731
    monkeypatch.setattr(attention.forest_flex, "kernel_options", own, raising=False)
    with attention._kernel_options({"IS_DIVISIBLE": False}):
        options = attention.forest_flex.kernel_options(1, 2)
    assert options == {"IS_DIVISIBLE": False, "args": (1, 2)}
    assert attention.forest_flex.kernel_options is own


@pytest.fixture
def steps(monkeypatch):
    """step.run with two more contenders."""
    contenders = step.contenders

    def more(*arguments):
        all_ways = contenders(*arguments)
        first = all_ways[step.RELEASED]

        def wrong():
            loss = first.run()
            for parameter in first.lm.parameters():
                parameter.grad *= 1.01
            return loss

        bad = step.Contender(first.lm, 5, broken)
        return {"bad": bad, "wrong": step.Contender(first.lm, 5, wrong)} | all_ways

    monkeypatch.setattr(step, "contenders", more)
    return partial(step.run, preset="smoke", device="cpu", rounds=1, num_queries=2)


def test_steps(steps, tmp_path):
    saved, save = snapshots()
    figures = steps(workloads=["paper"], save=save)
    ways = checked(step, figures, saved, tmp_path, ["bad", "wrong", "rrhf_fast over packed"])
    assert ways["bad"] == {"problem": PROBLEM}
    assert ways["wrong"]["gradient_error"] == pytest.approx(0.01, rel=1e-3)
    assert ways["wrong"]["problem"] == "too far from float64"
    assert ways["wrong"]["queries_per_second"] > 0  # timed anyway
    assert figures["cases"][0]["checked_pairs"] > 0
    for name in set(ways) - {"bad", "wrong"}:
        way = ways[name]
        assert "problem" not in way and way["gradient_error"] < 1e-5
        assert way["tokens_per_second"] == pytest.approx(way["tokens"] / way["seconds"][0])
        # Nothing is faster than its products at the best speed of all.
        assert 0 < way["of_limit"] < 1 and (way["mfu"] is None or 0 < way["mfu"] < 1)
        assert way["step_seconds"][0] > way["seconds"][0]


def test_a_failing_baseline_costs_only_its_ratios(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "released_loss", broken)
    figures = step.run(preset="smoke", device="cpu", rounds=1, num_queries=2, workloads=["paper"])
    ways = figures["cases"][0]["contenders"]
    assert ways[step.RELEASED] == {"problem": PROBLEM}
    assert "times_released" not in ways[step.ENGINE] and ways[step.ENGINE]["tokens_per_second"] > 0
    assert "over_repeated" in figures["cases"][0] and "out of memory" in step.table(figures)


def test_operations_equal_those_of_a_plain_run():
    """Against PyTorch's count for one row: decoder, attention and all predictions."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.flops import flops_of_packs, flops_of_rows
    from rrhf_fast.data.forest import build_forest
    from rrhf_fast.model.config import LossConfig
    from rrhf_fast.model.rrhf import RRHFModel

    lm = build_model("tiny", device="cpu")
    engine = RRHFModel(lm, LossConfig(), max_length=4096)
    (query,) = draw(Lengths(1, 300, 1), 1, lm.config.vocab_size)
    ids = torch.from_numpy(np.append(query.prompt_ids, query.response_ids[0][:-1])).long()[None]
    lm.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter:
        lm(input_ids=ids).logits.sum().backward()
    causal = 0.5 * 12 * 4 * 6 * 32 * 300 * 299  # computed and masked by eager attention
    expected = counter.get_total_flops() - causal
    assert flops_of_rows(engine, [query], 1.0) == pytest.approx(expected, rel=1e-3)
    pack = build_forest([query], pad_to_multiple_of=128)
    assert flops_of_packs(engine, [pack], 1.0) == flops_of_rows(engine, [query], 1.0)
    head = 2 * 8192 * 192 * 300
    assert flops_of_rows(engine, [query], 0.5) == pytest.approx(expected - head, rel=1e-3)


def test_near_ties_form_no_pair():
    rewards = np.array([3, 1, 2, 5, 4], np.float32)
    scores = np.array([0.0, 1.0, 1.05, 1.1, 2.0])
    merged = exact.without_near_ties(rewards, scores, 0.06)
    assert merged.tolist() == [3.0, pytest.approx(8 / 3), merged[1], merged[1], 4.0]
    assert exact.without_near_ties(rewards, scores, 0.01).tolist() == rewards.tolist()


@pytest.mark.parametrize("near, tolerance", [(exact.NEAR_TIES[torch.bfloat16], 0.02), (0.0, 0.2)])
def test_a_flipped_tie_is_not_an_error(monkeypatch, near, tolerance):
    """These queries have two responses whose order bfloat16 reverses."""
    monkeypatch.setitem(exact.NEAR_TIES, torch.bfloat16, near)
    options = {"workloads": ["long prompts"], "only": [step.ENGINE], "num_queries": 2}
    options |= {"compute_dtype": "bfloat16"}
    figures = step.run(preset="smoke", device="cpu", rounds=0, **options)
    (case,) = figures["cases"]
    error = case["contenders"][step.ENGINE]["gradient_error"]
    assert tolerance / 10 < error < tolerance
    assert case["checked_pairs"] > 10


def test_the_ranking_loss(monkeypatch, tmp_path):
    ways = loss._ways

    def more(*arguments):
        plain = lambda logps, rewards: loss._all_pairs(2 * logps, rewards)  # noqa: E731
        return {"bad": broken, "wrong": plain} | ways(*arguments)

    monkeypatch.setattr(loss, "_ways", more)
    figures = loss.run(preset="smoke", device="cpu", rounds=1)
    results = checked(loss, figures, [None, json.loads(json.dumps(figures))], tmp_path, ["bad"])
    assert results["bad"]["problem"] == PROBLEM and "problem" in results["wrong"]
    assert results["rrhf_fast torch"]["ms"] > 0


def test_the_active_set(monkeypatch, tmp_path):
    measured, calls = active._case, []

    def case(*arguments):
        calls.append(1)
        return broken() if len(calls) in (1, 4) else measured(*arguments)

    monkeypatch.setattr(active, "_case", case)
    saved, save = snapshots()
    figures = active.run(preset="smoke", device="cpu", rounds=1, num_queries=2, save=save)
    assert len(saved) == len(figures["cases"]) == 6
    assert ["problem" in case for case in figures["cases"]] == [i in (0, 3) for i in range(6)]
    assert "out of memory" in active.table(figures)
    active.plot(figures, tmp_path / "figure.png")


@pytest.mark.parametrize("lost", [points.RELEASED, points.ENGINE])
def test_memory(monkeypatch, tmp_path, lost):
    def measure(point):
        if point.way == lost:
            broken()
        tokens = {"tokens": point.num_tokens, "loss": 1.0, "model_bytes": 2**20}
        return tokens | {"extra_bytes": 2**21, "peak_bytes": 2**23}

    monkeypatch.setattr(memory, "measure", measure)
    saved, save = snapshots()
    figures = memory.run(preset="smoke", device="cpu", rounds=1, save=save)
    assert saved[-1] == json.loads(json.dumps(figures)) and len(saved) == len(memory.WAYS)
    ways = figures["cases"][0]["ways"]
    assert ways[lost] == {"problem": PROBLEM}
    assert ("of_released" in ways[points.PADDED]) == (lost != points.RELEASED)
    assert PROBLEM[:30] in memory.table(figures)
    memory.plot(figures, tmp_path / "figure.png")


def test_a_way_with_a_different_loss_is_marked(monkeypatch):
    def measure(point):
        loss = 1.001 if point.way == points.ENGINE else 1.0
        return {"tokens": 1, "loss": loss, "model_bytes": 1, "extra_bytes": 1, "peak_bytes": 1}

    monkeypatch.setattr(memory, "measure", measure)
    ways = memory.run(preset="smoke", device="cpu", rounds=1)["cases"][0]["ways"]
    assert [name for name, way in ways.items() if "problem" in way] == [points.ENGINE]


def test_scaling(monkeypatch, tmp_path):
    def measure(point):
        if (point.way == points.RELEASED and point.lengths.k == 3) or point.way == points.ACTIVE:
            broken()
        k = point.lengths.k
        return {"tokens": 10 * k, "seconds": 0.5 * k, "extra_bytes": 2**20 * k, "loss": 1.0}

    sweeps = (
        scaling.Sweep("k", (2, 3), Lengths(16, 8, 0)),
        scaling.Sweep("vocab_size", (64, 128), Lengths(16, 8, 3), (points.ENGINE, points.RELEASED)),
        scaling.Sweep("correlation", (0.0, 1.0), Lengths(16, 8, 4), **scaling.RANKED),
    )
    monkeypatch.setitem(scaling.PRESETS, "smoke", sweeps)
    monkeypatch.setattr(scaling, "measure", measure)
    saved, save = snapshots()
    figures = scaling.run(preset="smoke", device="cpu", rounds=1, save=save)
    assert len(saved) == 3 and saved[-1] == json.loads(json.dumps(figures))
    series = figures["sweeps"][0]["series"]
    assert series[points.ENGINE]["slopes"]["seconds"] == pytest.approx(0.5)
    assert series[points.RELEASED]["slopes"] is None
    assert series[points.RELEASED]["points"][1]["problem"] == PROBLEM
    assert "OutOfMemory" in scaling.table(figures)
    scaling.plot(figures, tmp_path / "figure.png")


def test_a_case_that_fails_early_leaves_its_file(monkeypatch, tmp_path, capsys):
    def early(*, save, **options):
        save({"cases": [1]})
        broken()

    monkeypatch.setattr(loss, "run", early)
    assert run.main(["loss", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: loss: {PROBLEM}\n"
    figures = json.loads((tmp_path / "loss-smoke-cpu.json").read_text())
    assert figures["cases"] == [1] and figures["case"] == "loss"


@pytest.mark.parametrize("name", ["table", "plot"])
def test_figures_are_written_before_they_are_shown(monkeypatch, tmp_path, name):
    monkeypatch.setattr(loss, name, broken)
    assert run.main(["loss", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "loss-smoke-cpu.json").read_text())["cases"]


def test_all_continues_after_a_failed_case(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "CASES", {"unknown": "", "loss": ""})
    assert run.main(["all", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert {file.name for file in tmp_path.iterdir()} >= {"loss-smoke-cpu.json"}


def test_packs_are_larger_on_a_gpu():
    from benchmarks.workloads import PACK_TOKENS, PAPER, fill

    assert PACK_TOKENS == {"cpu": 2048, "cuda": 16_384}
    assert 3 * 16_384 < fill(PAPER, 16_384) * PAPER.tokens < 5 * 16_384
