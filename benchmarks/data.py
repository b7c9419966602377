"""The host's work for a step, against the step: tokenising, planning, building packs.

A thread builds packs ahead, so they cost nothing as long as their share of a step's time is well
below 1.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.results import Save, no_save, recorded
from benchmarks.workloads import PAPER, build_model, draw, draw_tries, real, unpacked_tokens
from rrhf_fast import TrainConfig, demo
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.load import load_rows
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.tokenise import TokenisedQuery, tokenise_rows
from rrhf_fast.model.decoder import load_model, load_tokenizer
from rrhf_fast.model.rrhf import RRHFModel

TOKENISE, BUILD, REPEATING = "tokenise", "build", "build, no prefix shared"
COUNT, PLAN, PLAN_RANKS, ATTENTION = "count", "plan", "plan for 8 ranks", "plan attention"
# Work of each optimizer step.
EVERY_STEP = (PLAN, BUILD, ATTENTION)
SHAPES = {"smoke": "tiny", "paper": "SmolLM2-135M", "full": "SmolLM2-135M"}
GPU_SHAPE = "Llama-3.2-1B"
STEP_QUERIES = {"cpu": 4, "cuda": 64}


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    data: str | None = None,
    model: str | None = None,
    num_queries: int = 256,
    max_tokens_per_pack: int = 8192,
    save: Save = no_save,
) -> dict:
    """Time each part of the host's work on drawn queries, or on real rows in the tokens of a real
    model; and a step of the engine on some of them."""
    if (data is None) != (model is None):
        raise ValueError("data, model: expected both or neither, found one")
    if data is None:
        shape = GPU_SHAPE if device == "cuda" else SHAPES[preset]
        lm = build_model(shape, device=device)
        vocab_size = lm.config.vocab_size
        workloads = {
            str(PAPER): draw(PAPER, num_queries, vocab_size),
            f"{PAPER}, shared prefixes": draw_tries(PAPER, num_queries, vocab_size),
        }
    else:
        shape, lm = Path(model).name, load_model(model).to(device)
        workloads = {Path(data).stem: real(data, model, num_queries)}
    engine = RRHFModel(
        lm,
        TrainConfig(),
        max_length=4096,
        max_tokens=max_tokens_per_pack,
        compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        compile=None,
    )
    figures = {"model": shape, "tokenise": _tokenise(data, model, rounds), "cases": []}
    save(figures)
    for name, queries in workloads.items():
        case = {"workload": name, "queries": len(queries)}
        figures["cases"].append(case)
        with recorded(case):
            case |= _case(engine, queries, rounds, max_tokens_per_pack)
        save(figures)
    return figures


def _tokenise(data: str | None, model: str | None, rounds: int) -> dict:
    rows, report = load_rows(data or str(demo.TRAIN_FILE), on_bad_rows="skip")
    tokenizer = load_tokenizer(model or str(demo.MODEL_DIR))
    options = {"max_length": 2048, "on_bad_rows": "skip"}
    queries, _ = tokenise_rows(rows, tokenizer, report, **options)
    seconds = _seconds(lambda: tokenise_rows(rows, tokenizer, report, **options), rounds)
    tokens = sum(len(q.prompt_ids) + sum(map(len, q.response_ids)) for q in queries)
    return {
        "rows": "the demo's rows" if data is None else Path(data).stem,
        "queries": len(queries),
        "tokens": tokens,
        "seconds": seconds,
    }


def _case(
    engine: RRHFModel, queries: Sequence[TokenisedQuery], rounds: int, max_tokens: int
) -> dict:
    options = {"pad_to_multiple_of": engine.pad_to_multiple_of}

    def planner(chosen: Sequence[TokenisedQuery], **more) -> PackPlanner:
        return PackPlanner(
            chosen, packing="forest", max_tokens_per_pack=max_tokens, **options, **more
        )

    plain = planner(queries)
    numbers = range(len(queries))
    planned = plain.group(numbers)
    packs = [plain.build(ids) for ids in planned]

    def build(share_prefixes: bool) -> list:
        return [
            build_forest([queries[i] for i in ids], ids, share_prefixes=share_prefixes, **options)
            for ids in planned
        ]

    work = {
        COUNT: lambda: planner(queries),
        PLAN: lambda: plain.deal(numbers, 1),
        PLAN_RANKS: lambda: plain.deal(numbers, 8),
        BUILD: lambda: build(True),
        REPEATING: lambda: build(False),
        ATTENTION: lambda: [engine.plan(pack) for pack in packs],
    }
    few = queries[:: max(1, len(queries) // STEP_QUERIES[engine.device.type])]
    step_packs = planner(few, plan=engine.plan).packs(range(len(few)))
    step_packs = [pack.to(engine.device) for pack in step_packs]

    def step() -> None:
        engine.zero_grad()
        for pack in step_packs:
            loss = engine(pack).loss
            loss.backward()
        loss.item()  # waits for the device

    step()  # one-time initialisation
    a_query = _seconds(step, rounds) / len(few)
    seconds = {name: _seconds(function, rounds) for name, function in work.items()}
    host = sum(seconds[name] for name in EVERY_STEP) / len(queries)
    return {
        "tokens": sum(pack.num_tokens for pack in packs),
        "tokens_no_prefix_shared": sum(pack.num_tokens for pack in build(False)),
        "tokens_unpacked": unpacked_tokens(queries),
        "packs": len(packs),
        "seconds": seconds,
        "step": {
            "queries": len(few),
            "tokens": sum(pack.num_tokens for pack in step_packs),
            "seconds": a_query * len(few),
        },
        # Relative to the time of loss and gradient of the same queries.
        "share_of_step": host / a_query,
    }


def _seconds(function: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def _rates(figures: dict, case: dict) -> dict[str, float]:
    """Tokens per second of each part, the step last; counts packs' tokens, except in tokenising."""
    text = figures["tokenise"]
    tokens = {name: case["tokens"] for name in case["seconds"]}
    tokens[REPEATING] = case["tokens_no_prefix_shared"]
    rates = {TOKENISE: text["tokens"] / text["seconds"]}
    rates |= {name: tokens[name] / seconds for name, seconds in case["seconds"].items()}
    return rates | {"loss and gradient": case["step"]["tokens"] / case["step"]["seconds"]}


def table(figures: dict) -> str:
    """Tokens per second and microseconds per query of each part, and the host's share of a step."""
    text = figures["tokenise"]
    lines = [
        f"{TOKENISE}: {text['tokens'] / text['seconds']:,.0f} tokens/s, {text['rows']}, "
        f"{text['queries']} queries"
    ]
    for case in figures["cases"]:
        if "problem" in case:
            lines += ["", f"{case['workload']}: {case['problem']}"]
            continue
        lines += [
            "",
            f"{case['queries']} queries of {case['workload']}: {case['tokens']:,} tokens in "
            f"{case['packs']} packs, {case['tokens_no_prefix_shared']:,} where only prompts are "
            f"shared, {case['tokens_unpacked']:,} unpacked",
            f"{'':26} {'tokens/s':>12} {'µs per query':>12}",
        ]
        rates = _rates(figures, case)
        del rates[TOKENISE]
        step = case["step"]
        each = {name: s / case["queries"] for name, s in case["seconds"].items()}
        each["loss and gradient"] = step["seconds"] / step["queries"]
        lines += [f"{name:26} {rates[name]:12,.0f} {each[name] * 1e6:12,.1f}" for name in rates]
        parts = " + ".join(EVERY_STEP)
        lines.append(f"{parts}: {case['share_of_step']:.2%} of a step of {figures['model']}")
    return "\n".join(lines)


def plot(figures: dict, path: Path) -> None:
    """Tokens per second of each part (log axis), one panel per workload; the step is red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in figures["cases"] if "problem" not in case]
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 3.4 * len(cases)), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes.flat, cases, strict=True):
        rates = _rates(figures, case)
        colors = ["C0"] * (len(rates) - 1) + ["C3"]
        # Dots: on a logarithmic axis the length of a bar is meaningless.
        axis.scatter(rates.values(), list(rates), color=colors)
        for name, rate in rates.items():
            axis.annotate(
                f"{rate:,.0f}", (rate, name), (8, -3), textcoords="offset points", fontsize=8
            )
        axis.set_xscale("log")
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlim(min(rates.values()) / 3, max(rates.values()) * 6)
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s")
        axis.set_title(
            f"{case['workload']}; the host's work takes {case['share_of_step']:.2%} of a step of "
            f"{figures['model']}",
            fontsize=10,
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
