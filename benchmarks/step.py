"""Loss and gradient of whole queries: the engine, each of its levers off in turn, and other
methods, interleaved. Optimizer steps are excluded.

Every contender's loss and gradient of two queries are compared with float64. A contender that is
too far off is timed anyway and marked; one that fails is left out, with the reason.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from benchmarks.baselines import HEADS, released_loss, repeat_prompts
from benchmarks.exact import exact_of
from benchmarks.flops import flops_of_packs, flops_of_rows
from benchmarks.machine import compute_dtype, peak_flops
from benchmarks.plots import ranked_bars
from benchmarks.points import ENGINE, PADDED, RELEASED, REPEATED
from benchmarks.results import Save, judge, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.timing import interleaved, ratio
from benchmarks.workloads import (
    EQUAL,
    LONG_PROMPTS,
    LONG_RESPONSES,
    PACK_TOKENS,
    PAPER,
    build_model,
    draw,
    draw_tries,
    fill,
    planner_for,
    real,
    unpacked_tokens,
)
from rrhf_fast import TrainConfig
from rrhf_fast.data.forest import PackedForest
from rrhf_fast.data.packs import Batch, PackPlanner
from rrhf_fast.data.padded import padded_tokens
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import backward_active, is_worthwhile
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals

# Largest relative error of the loss, and (norm) of the whole gradient, against float64.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LENGTHS = {
    "paper": PAPER,
    "prompt as long as responses": EQUAL,
    "long prompts": LONG_PROMPTS,
    "long responses": LONG_RESPONSES,
}
# Model shapes and workloads per preset, without and with a GPU.
PRESETS = {
    "smoke": (["tiny"], ["paper", "long prompts"]),
    "paper": (["SmolLM2-135M"], ["paper", "prompt as long as responses"]),
    "full": (["SmolLM2-135M"], [*LENGTHS, "beam search"]),
}
GPU_PRESETS = {
    "smoke": (["tiny"], ["paper", "long prompts"]),
    "paper": (["Llama-3.2-1B"], ["paper", "long prompts"]),
    "full": (
        ["SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-2-7B"],
        [*LENGTHS, "beam search"],
    ),
}
NUM_QUERIES = 4  # without a GPU, and for real rows


@dataclass
class Contender:
    """A way to compute loss and gradient of the same queries."""

    lm: PreTrainedModel  # accumulates gradients
    tokens: int  # encoded by the decoder
    run: Callable[[], float]  # returns the mean loss; gradients accumulate in `lm`
    # Operations of products with weights and of attention, without padding; None if only some of
    # the tokens have a backward.
    flops: float | None = None


def run(
    *,
    preset: str,
    device: str,
    rounds: int,
    max_tokens_per_pack: int | None = None,
    num_queries: int | None = None,
    model: str | None = None,
    data: str | None = None,
    shapes: Sequence[str] | None = None,
    workloads: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    engine_options: dict | None = None,
    save: Save = no_save,
) -> dict:
    """Time all contenders on the preset's shapes, or on a real model and real rows.

    Args:
        max_tokens_per_pack: default: `PACK_TOKENS` of the device.
        num_queries: default: enough for four packs on a GPU, else 4.
        shapes, workloads: names, instead of the preset's.
        rounds: of timing; 0 only checks.
        only: names of contenders, instead of all.
        engine_options: for `RRHFModel`, instead of the engine's own.

    Raises:
        ValueError: rows without a model, or rows or model that cannot be read.
    """
    max_tokens = max_tokens_per_pack or PACK_TOKENS[device]
    figures: dict = {"max_tokens_per_pack": max_tokens, "peak_tflops": peak_flops(device) / 1e12}
    figures["cases"] = []
    options = (rounds, max_tokens, only, engine_options or {}, figures["peak_tflops"] * 1e12)

    def measure(case: dict, lm: PreTrainedModel, queries: Sequence[TokenisedQuery]) -> None:
        case |= {"queries": len(queries), "contenders": {}}
        figures["cases"].append(case)
        with recorded(case):
            _measure(case, lm, queries, *options, partial(save, figures))
        save(figures)

    if data is not None:
        queries = real(data, model, num_queries or NUM_QUERIES)
        case = {"model": Path(model).name, "workload": Path(data).stem}
        measure(case, load_model(model).to(device), queries)
        return figures
    defaults = (GPU_PRESETS if device == "cuda" else PRESETS)[preset]
    for shape in shapes or defaults[0]:
        for workload in workloads or defaults[1]:
            lm = build_model(shape, device=device)
            lengths = LENGTHS.get(workload, PAPER)
            count = fill(lengths, max_tokens) if device == "cuda" else NUM_QUERIES
            make = draw_tries if workload == "beam search" else draw
            queries = make(lengths, num_queries or count, lm.config.vocab_size)
            measure({"model": shape, "workload": workload}, lm, queries)
            del lm
    return figures


def _measure(
    case: dict,
    lm: PreTrainedModel,
    queries: Sequence[TokenisedQuery],
    rounds: int,
    max_tokens: int,
    only: Sequence[str] | None,
    engine_options: dict,
    peak: float,
    save: Callable[[], None],
) -> None:
    """Check every contender, then time those that work; results are added to `case`."""
    dtype, results = compute_dtype(lm.device.type), case["contenders"]
    # The released code divides by the padded width, so all contenders do here.
    options = {"max_length": 4096, "compute_dtype": dtype}
    plain = copy.deepcopy(lm)
    padded = RRHFModel(plain, LossConfig(compat="official"), packing="none", **options)
    options |= {"max_tokens": max_tokens, "compile": None} | engine_options
    engine = RRHFModel(lm, LossConfig(compat="official"), **options)
    case |= {
        "dtype": str(dtype),
        "attention": engine.attention.name,
        "compiled": engine.compiled,
        "warnings": engine.warnings,
        "responses": sum(len(query.response_ids) for query in queries),
        "unpacked_tokens": unpacked_tokens(queries),
    }
    save()

    planner = planner_for(engine, queries, max_tokens)
    active = _active_fraction(engine, planner.packs(range(len(queries))))
    case["active_fraction"] = active
    takes_active = is_worthwhile(TrainConfig(), active)

    def ways_of(queries: Sequence[TokenisedQuery]) -> dict[str, Contender]:
        ways = contenders(engine, padded, queries, max_tokens, takes_active, active)
        return {name: way for name, way in ways.items() if only is None or name in only}

    few = sorted(queries, key=lambda query: query.padded_width)[:2]
    exact = exact_of(plain, few, dtype)
    case["checked_pairs"] = exact.num_pairs
    for name, way in ways_of(exact.queries).items():
        results[name] = {}
        with recorded(results[name]):
            results[name] |= exact.errors(way.lm, way.run)
            errors = (results[name]["loss_error"], results[name]["gradient_error"])
            judge(results[name], errors, TOLERANCES[dtype])
        way.lm.zero_grad()
        save()
    del exact
    if rounds == 0:
        return

    def forget() -> None:
        plain.zero_grad()
        lm.zero_grad()

    ways = {name: way for name, way in ways_of(queries).items() if "loss_error" in results[name]}
    runs = {name: way.run for name, way in ways.items()}
    seconds = interleaved(runs, rounds, before=forget, results=results)
    for name, times in seconds.items():
        results[name] |= _speeds(ways[name], times, len(queries), peak)
        if RELEASED in seconds:
            results[name]["times_released"] = ratio(seconds[RELEASED], times)
    if {REPEATED, ENGINE} <= seconds.keys():
        case["over_repeated"] = ratio(seconds[REPEATED], seconds[ENGINE])


def _speeds(way: Contender, times: list[float], num_queries: int, peak: float) -> dict:
    return {
        "seconds": times,
        "tokens": way.tokens,
        "queries_per_second": num_queries / median(times),
        "tokens_per_second": way.tokens / median(times),
        "mfu": None if way.flops is None else way.flops / median(times) / peak,
    }


def contenders(
    engine: RRHFModel,
    padded: RRHFModel,
    queries: Sequence[TokenisedQuery],
    max_tokens: int,
    takes_active: bool,
    active_fraction: float = 1.0,
) -> dict[str, Contender]:
    """All contenders, by name. `padded` is the same model on the padded layout; `takes_active` is
    the trainer's default choice for this fraction of tokens with a gradient."""
    device = engine.device

    def packs(model: RRHFModel, packing: str, max_tokens: int) -> list[tuple]:
        options = {} if packing == "none" else _pack_options(model)
        planner = PackPlanner(queries, packing=packing, max_tokens_per_pack=max_tokens, **options)
        return [(p.to(device), p.num_queries) for p in planner.packs(range(len(queries)))]

    def released(query: TokenisedQuery) -> torch.Tensor:
        with padded.autocast():
            return released_loss(padded.lm, query)

    def rows(pack) -> torch.Tensor:
        return padded(pack).loss

    def forest(pack) -> torch.Tensor:
        return engine(pack).loss

    def way(model: RRHFModel, loss: Callable, parts: list[tuple], tokens: int) -> Contender:
        is_forest = parts is not repeated and model is engine
        flops = of_trees if is_forest else of_copies
        return Contender(model.lm, tokens, partial(_add_up, loss, parts), flops)

    trees = packs(engine, "forest", max_tokens)
    of_trees = flops_of_packs(engine, [pack for pack, _ in trees], active_fraction)
    of_copies = flops_of_rows(engine, queries, active_fraction)
    repeated = _repeated(engine, queries, max_tokens)
    padded_count = sum(padded_tokens(query) for query in queries)
    tokens, repeated_count = (
        sum(pack.num_tokens for pack, _ in parts) for parts in (trees, repeated)
    )
    active = partial(_active, engine, trees, len(queries), max_tokens)
    whole = way(engine, forest, trees, tokens)
    by_active = Contender(engine.lm, tokens, active)
    ways = {
        RELEASED: way(padded, released, [(query, 1) for query in queries], padded_count),
        PADDED: way(padded, rows, packs(padded, "none", max_tokens), padded_count),
        REPEATED: way(engine, forest, repeated, repeated_count),
    }
    if takes_active:
        ways |= {ENGINE: by_active, "without the active set": whole}
    else:
        ways |= {ENGINE: whole, "active set all the same": by_active}
    ways["one query a pack"] = way(engine, forest, packs(engine, "forest", 1), tokens)
    for name, head in HEADS.items():
        ways[name] = way(engine, partial(head, engine), trees, tokens)
    return ways


def _add_up(loss: Callable, parts: list[tuple]) -> float:
    """Forward and backward of each of `parts`: an argument of `loss`, and its number of queries."""
    num_queries, total = sum(count for _, count in parts), 0.0
    for part, count in parts:
        mean = loss(part) * (count / num_queries)
        mean.backward()
        total += mean.detach()
    return float(total)


def _active(engine: RRHFModel, trees: list[tuple], num_queries: int, max_tokens: int) -> float:
    totals = Totals(engine.device)
    config = replace(TrainConfig(), max_tokens_per_pack=max_tokens)
    batch = Batch([pack for pack, _ in trees], num_queries)
    backward_active(engine, batch, config, World(engine.device), totals)
    return totals.means()["loss"]


def _active_fraction(engine: RRHFModel, trees: Sequence[PackedForest]) -> float:
    totals = Totals(engine.device)
    for pack in trees:
        pack = pack.to(engine.device)
        _, weights = engine.edge_weights(pack)
        totals.add_active(pack, weights != 0)
    return totals.active_fraction


def _pack_options(model: RRHFModel) -> dict:
    return {"pad_to_multiple_of": model.pad_to_multiple_of, "plan": model.plan}


def _repeated(engine: RRHFModel, queries: Sequence[TokenisedQuery], max_tokens: int) -> list[tuple]:
    """Pack queries in order, at most max_tokens per pack, with repeated prompts."""
    packs, members, size = [], [], 0
    for i, query in enumerate([*queries, None]):
        own = 0 if query is None else unpacked_tokens([query])
        if members and (query is None or size + own > max_tokens):
            chosen = [queries[j] for j in members]
            pack = repeat_prompts(chosen, members, **_pack_options(engine))
            packs.append((pack.to(engine.device), len(members)))
            members, size = [], 0
        members, size = [*members, i], size + own
    return packs


def table(figures: dict) -> str:
    """Every contender's tokens, queries/s and ratio to the released method."""
    parts = []
    header = ["tokens", "queries/s", "tokens/s", "MFU", "times released", ""]
    for case in figures["cases"]:
        rows = [[name, *_cells(result)] for name, result in case["contenders"].items()]
        if "problem" in case:
            rows.append([case["problem"][:100], *[""] * len(header)])
        parts.append(text_table([_title(case), *header], rows))
        if "over_repeated" in case:
            over = "{median:.2f} ({min:.2f} to {max:.2f})".format(**case["over_repeated"])
            parts[-1] += f"\nrrhf_fast over packed with repeated prompts: {over}"
    return "\n\n".join(parts)


def _cells(result: dict) -> list[str]:
    problem = result.get("problem", "")[:60]
    if "seconds" not in result:
        return [""] * 5 + [problem or "not timed"]
    ratio = result.get("times_released")
    return [
        f"{result['tokens']:,}",
        f"{result['queries_per_second']:.2f}",
        f"{result['tokens_per_second']:,.0f}",
        "" if result["mfu"] is None else f"{result['mfu']:.1%}",
        "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio) if ratio else "",
        problem,
    ]


def plot(figures: dict, path: Path) -> None:
    """Speed as a multiple of the released method's."""
    panels = []
    for case in figures["cases"]:
        ways = case["contenders"].items()
        times = {name: w["times_released"]["median"] for name, w in ways if "times_released" in w}
        if times:
            panels.append((_title(case), times))
    ranked_bars(panels, path, xlabel="queries/s, times the released method's")


def _title(case: dict) -> str:
    return f"{case['model']}, {case['workload']}, {case['queries']} queries"
