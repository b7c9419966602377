"""Loss and gradient of whole queries: the engine, each of its levers off in turn, and other
methods, interleaved; on a CPU also whole steps with AdamW, and how far all are from the time that
the matrix products take (`benchmarks.limit`).

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

from benchmarks import breakdown, limit
from benchmarks.baselines import HEADS, released_loss, released_tokens, repeat_prompts
from benchmarks.exact import exact_of
from benchmarks.flops import flops_of_packs, flops_of_rows
from benchmarks.machine import compute_dtype as dtype_of
from benchmarks.plots import ranked_bars
from benchmarks.points import ENGINE, PADDED, RELEASED, REPEATED
from benchmarks.results import Save, judge, no_save, recorded
from benchmarks.tables import text_table
from benchmarks.timing import in_rounds, ratio, seconds
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
from rrhf_fast.model.active_rows import use_active_rows, use_all_rows
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import backward_active, is_worthwhile
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals
from rrhf_fast.train.optimizer import build_optimizer, clipped_step, gradient_norm

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
NUM_QUERIES = 4  # for real rows
CPU_QUERIES = {"smoke": 4, "paper": 2, "full": 4}
# What the paper preset times on the second of a CPU's workloads, to end in about ten minutes.
MAIN = (RELEASED, REPEATED, ENGINE)


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
    rounds: int | None = None,
    compute_dtype: str | None = None,
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
        rounds: of timing; 0 only checks; None: as `in_rounds` chooses.
        compute_dtype: "float32" or "bfloat16"; None: bfloat16 on a GPU that has it.
        max_tokens_per_pack: default: `PACK_TOKENS` of the device.
        num_queries: default: enough for four packs on a GPU, else `CPU_QUERIES`.
        shapes, workloads: names, instead of the preset's.
        only: names of contenders, instead of all.
        engine_options: for `RRHFModel`, instead of the engine's own.

    Raises:
        ValueError: rows without a model, or rows or model that cannot be read.
    """
    max_tokens = max_tokens_per_pack or PACK_TOKENS[device]
    figures: dict = {"max_tokens_per_pack": max_tokens, "cases": []}
    options = {
        "rounds": rounds,
        "max_tokens": max_tokens,
        "engine_options": engine_options or {},
        "dtype": dtype_of(device) if compute_dtype is None else getattr(torch, compute_dtype),
    }

    def measure(
        case: dict,
        lm: PreTrainedModel,
        queries: Sequence[TokenisedQuery],
        only: Sequence[str] | None = only,
    ) -> None:
        case |= {"queries": len(queries), "contenders": {}}
        figures["cases"].append(case)
        with recorded(case):
            _measure(case, lm, queries, only=only, save=partial(save, figures), **options)
        save(figures)

    if data is not None:
        queries = real(data, model, num_queries or NUM_QUERIES)
        case = {"model": Path(model).name, "workload": Path(data).stem}
        measure(case, load_model(model).to(device), queries)
        return figures
    defaults = (GPU_PRESETS if device == "cuda" else PRESETS)[preset]
    for shape in shapes or defaults[0]:
        for number, workload in enumerate(workloads or defaults[1]):
            lm = build_model(shape, device=device)
            lengths = LENGTHS.get(workload, PAPER)
            count = fill(lengths, max_tokens) if device == "cuda" else CPU_QUERIES[preset]
            make = draw_tries if workload == "beam search" else draw
            queries = make(lengths, num_queries or count, lm.config.vocab_size)
            is_short = only is None and number > 0 and device == "cpu" and preset == "paper"
            chosen = MAIN if is_short else only
            measure({"model": shape, "workload": workload}, lm, queries, chosen)
            del lm
    return figures


def _measure(
    case: dict,
    lm: PreTrainedModel,
    queries: Sequence[TokenisedQuery],
    *,
    rounds: int | None,
    max_tokens: int,
    only: Sequence[str] | None,
    engine_options: dict,
    dtype: torch.dtype,
    save: Callable[[], None],
) -> None:
    """Check every contender, then time those that work; results are added to `case`."""
    # The released code divides by the padded width, so all contenders do here.
    options = {"max_length": 4096, "compute_dtype": dtype}
    # No engine touches it, since engines convert layers in place: it is what float64 is computed
    # from, and the released method's model.
    plain = copy.deepcopy(lm)
    own = _on_same_weights(plain)
    padded = RRHFModel(own, LossConfig(compat="official"), packing="none", **options)
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
    packs = [pack.to(engine.device) for pack in planner.packs(range(len(queries)))]
    active = _active_fraction(engine, packs)
    case["active_fraction"] = active
    takes_active = is_worthwhile(TrainConfig(), active, engine.row_skipping)

    def ways_of(queries: Sequence[TokenisedQuery]) -> dict[str, Contender]:
        ways = contenders(engine, plain, padded, queries, max_tokens, takes_active, active)
        return {name: way for name, way in ways.items() if only is None or name in only}

    _check(case, plain, queries, dtype, ways_of, save)
    if rounds == 0:
        return
    results = case["contenders"]
    ways = {name: way for name, way in ways_of(queries).items() if "loss_error" in results[name]}
    work, rows = limit.work_of(engine, packs), max(pack.num_tokens for pack in packs)
    before = limit.product_speeds(engine, work, rows)
    on_cpu = lm.device.type == "cpu"
    updates = {id(model): _updater(model) for model in (plain, lm)} if on_cpu else {}
    found = in_rounds(
        {name: partial(_time, way, (plain, lm), updates) for name, way in ways.items()},
        rounds,
        device=lm.device.type,
        results=results,
        record=case,
    )
    after = limit.product_speeds(engine, work, rows)
    case["limit"] = limit.limit_of(engine, work, before, after)
    for name, times in found.items():
        results[name] |= _speeds(ways[name], times, len(queries), case["limit"])
    _compare(case)
    save()
    if on_cpu and ENGINE in found:
        step = partial(_time, ways[ENGINE], (plain, lm), updates)
        case["breakdown"] = breakdown.measure(step, case["limit"])


def _check(
    case: dict,
    plain: PreTrainedModel,
    queries: Sequence[TokenisedQuery],
    dtype: torch.dtype,
    ways_of: Callable[[Sequence[TokenisedQuery]], dict[str, Contender]],
    save: Callable[[], None],
) -> None:
    """Compare every contender's loss and gradient of the two shortest queries with float64."""
    few = sorted(queries, key=lambda query: query.padded_width)[:2]
    exact, results = exact_of(plain, few, dtype), case["contenders"]
    case["checked_pairs"] = exact.num_pairs
    for name, way in ways_of(exact.queries).items():
        results[name] = {}
        with recorded(results[name]):
            results[name] |= exact.errors(way.lm, way.run)
            errors = (results[name]["loss_error"], results[name]["gradient_error"])
            judge(results[name], errors, TOLERANCES[dtype])
        way.lm.zero_grad()
        save()


def _time(
    way: Contender, models: Sequence[PreTrainedModel], updates: dict[int, Callable[[], None]]
) -> tuple[float, float | None]:
    """Seconds of loss and gradient, and of the update that makes them a whole step."""
    for model in models:
        model.zero_grad()
    gradient = seconds(way.run)
    return gradient, seconds(updates[id(way.lm)]) if updates else None


def _updater(lm: PreTrainedModel) -> Callable[[], None]:
    """Norm, clipping and AdamW as in training, but at a learning rate of 0: the weights stay, and
    with them the work of the next call."""
    config = TrainConfig()
    optimizer, _ = build_optimizer(lm, config, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def update() -> None:
        clipped_step(optimizer, gradient_norm(lm).item(), config.max_grad_norm)

    return update


def _speeds(
    way: Contender, times: list[tuple[float, float | None]], num_queries: int, bound: dict
) -> dict:
    gradients = [gradient for gradient, _ in times]
    middle, peak = median(gradients), bound["peak_tflops"] * 1e12
    figures = {
        "seconds": gradients,
        "tokens": way.tokens,
        "queries_per_second": num_queries / middle,
        "tokens_per_second": way.tokens / middle,
        "mfu": None if way.flops is None else way.flops / middle / peak,
        "of_limit": bound["total_seconds"] / middle,
    }
    if times[0][1] is not None:
        figures["update_seconds"] = [update for _, update in times]
        figures["step_seconds"] = [sum(pair) for pair in times]
    return figures


def _compare(case: dict) -> None:
    """Add ratios between contenders, for gradients and for whole steps."""
    timed = {name: way for name, way in case["contenders"].items() if "seconds" in way}
    for of, name in (("seconds", "times_released"), ("step_seconds", "steps_times_released")):
        for way in timed.values():
            if RELEASED in timed and of in way:
                way[name] = ratio(timed[RELEASED][of], way[of])
    if {REPEATED, ENGINE} <= timed.keys():
        case["over_repeated"] = ratio(timed[REPEATED]["seconds"], timed[ENGINE]["seconds"])


def contenders(
    engine: RRHFModel,
    plain: PreTrainedModel,
    padded: RRHFModel,
    queries: Sequence[TokenisedQuery],
    max_tokens: int,
    takes_active: bool,
    active_fraction: float = 1.0,
) -> dict[str, Contender]:
    """All contenders, by name. `plain` is the same model as Hugging Face made it, and `padded` one
    with its parameters on the padded layout; `takes_active` is the trainer's default choice for
    this fraction of tokens with a gradient."""
    device, dtype = engine.device, engine.compute_dtype

    def packs(model: RRHFModel, packing: str, max_tokens: int) -> list[tuple]:
        options = {} if packing == "none" else _pack_options(model)
        planner = PackPlanner(queries, packing=packing, max_tokens_per_pack=max_tokens, **options)
        return [(p.to(device), p.num_queries) for p in planner.packs(range(len(queries)))]

    def released(query: TokenisedQuery, share: float) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return share * released_loss(plain, query)

    def rows(pack, share: float) -> torch.Tensor:
        return padded(pack, share=share).loss

    def forest(pack, share: float) -> torch.Tensor:
        return engine(pack, share=share, into_grad=True).loss  # as the trainer calls it

    def way(lm: PreTrainedModel, loss: Callable, parts: list[tuple], tokens: int) -> Contender:
        is_forest = parts is not repeated and lm is engine.lm
        flops = of_trees if is_forest else of_copies
        skips = lm is engine.lm and engine.row_skipping
        return Contender(lm, tokens, partial(_add_up, loss, parts), None if skips else flops)

    trees = packs(engine, "forest", max_tokens)
    of_trees = flops_of_packs(engine, [pack for pack, _ in trees], active_fraction)
    of_copies = flops_of_rows(engine, queries, active_fraction)
    repeated = _repeated(engine, queries, max_tokens)
    padded_count = sum(map(padded_tokens, queries))
    released_count = sum(map(released_tokens, queries))
    tokens, repeated_count = (
        sum(pack.num_tokens for pack, _ in parts) for parts in (trees, repeated)
    )
    active = partial(_active, engine, trees, len(queries), max_tokens)
    whole = way(engine.lm, forest, trees, tokens)
    by_active = Contender(engine.lm, tokens, active)
    ways = {
        RELEASED: way(plain, released, [(query, 1) for query in queries], released_count),
        PADDED: way(plain, rows, packs(padded, "none", max_tokens), padded_count),
        REPEATED: way(engine.lm, forest, repeated, repeated_count),
    }
    if takes_active:
        ways |= {ENGINE: by_active, "without the active set": whole}
    else:
        ways |= {ENGINE: whole, "active set all the same": by_active}
    if engine.row_skipping:
        all_rows = partial(_with_all_rows, engine, whole.run)
        ways["with all rows in the backward"] = Contender(engine.lm, tokens, all_rows, of_trees)
    ways["one query a pack"] = way(engine.lm, forest, packs(engine, "forest", 1), tokens)
    for name, head in HEADS.items():
        ways[name] = way(engine.lm, partial(head, engine), trees, tokens)
    return ways


def _on_same_weights(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy with layers of its own and the same parameters, which collect its gradients."""
    return copy.deepcopy(lm, {id(parameter): parameter for parameter in lm.parameters()})


def _add_up(loss: Callable, parts: list[tuple]) -> float:
    """Forward and backward of each of `parts`: an argument of `loss`, and its number of queries.
    `loss` gives the part's share in the mean over all."""
    num_queries, total = sum(count for _, count in parts), 0.0
    for part, count in parts:
        mean = loss(part, count / num_queries)
        mean.backward()
        total += mean.detach()
    return float(total)


def _with_all_rows(engine: RRHFModel, run: Callable[[], float]) -> float:
    """`run` while linear layers do not leave out rows without a gradient."""
    before = [layer.skips_rows for layer in engine.copied]
    use_all_rows(engine.lm)
    for layer in engine.copied:
        layer.skips_rows = False
    try:
        return run()
    finally:
        use_active_rows(engine.lm)
        for layer, skips in zip(engine.copied, before, strict=True):
            layer.skips_rows = skips


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
    """Every contender's tokens, queries/s and ratio to the released method; the limit, and where
    the engine's time goes."""
    parts = []
    header = ["tokens", "queries/s", "tokens/s", "MFU", "of the limit", "times released"]
    header += ["whole steps", ""]
    for case in figures["cases"]:
        rows = [[name, *_cells(result)] for name, result in case["contenders"].items()]
        if "problem" in case:
            rows.append([case["problem"][:100], *[""] * len(header)])
        parts.append(text_table([_title(case), *header], rows))
        if "over_repeated" in case:
            over = _range(case["over_repeated"])
            parts[-1] += f"\nrrhf_fast over packed with repeated prompts: {over}"
        if "limit" in case:
            ways = case["contenders"].items()
            shares = {name: way["of_limit"] for name, way in ways if "of_limit" in way}
            count = case["rounds"]["counted"]
            text = f"medians and ranges of {count} rounds after one to warm up"
            parts += [text, limit.table(case["limit"], shares)]
        if "breakdown" in case:
            parts.append(breakdown.table(case["breakdown"]))
    return "\n\n".join(parts)


def _cells(result: dict) -> list[str]:
    problem = result.get("problem", "")[:60]
    if "seconds" not in result:
        return [""] * 7 + [problem or "not timed"]
    return [
        f"{result['tokens']:,}",
        f"{result['queries_per_second']:.2f}",
        f"{result['tokens_per_second']:,.0f}",
        "" if result["mfu"] is None else f"{result['mfu']:.1%}",
        f"{result['of_limit']:.2f}",
        _range(result.get("times_released")),
        _range(result.get("steps_times_released")),
        problem,
    ]


def _range(ratio: dict | None) -> str:
    return "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio) if ratio else ""


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
