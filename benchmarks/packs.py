"""The engine by pack size: tokens/s, utilisation, compiled graphs, memory, synchronisations.

One model runs all sizes, smallest first, as training meets packs of many sizes. When memory runs
out, layers are checkpointed from that size on.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch

from benchmarks.flops import flops_of_packs
from benchmarks.machine import compute_dtype, peak_flops
from benchmarks.results import Save, no_save, ran_out, recorded
from benchmarks.timing import seconds
from benchmarks.workloads import PAPER, build_model, draw, fill, planner_for
from rrhf_fast import TrainConfig
from rrhf_fast.model.layers import count_graphs
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import backward_whole
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals


def run(
    *,
    device: str,
    shape: str,
    sizes: Sequence[int],
    rounds: int,
    engine_options: dict | None = None,
    save: Save = no_save,
) -> dict:
    """Loss and gradient of four packs per size (in tokens), with queries of the paper's lengths.
    `shape` is a name in `workloads.SHAPES`; `engine_options` go to `RRHFModel`."""
    figures: dict = {"model": shape, "peak_tflops": peak_flops(device) / 1e12, "cases": []}
    options = {"max_tokens": max(sizes), "compile": None} | (engine_options or {})
    engine, todo = None, sorted(sizes)
    while todo:
        mode = options.get("activation_checkpointing", "none")
        case = {"max_tokens_per_pack": todo[0], "activation_checkpointing": mode}
        figures["cases"].append(case)
        with recorded(case):
            engine = engine or _build(shape, device, options)
            figures |= {"attention": engine.attention.name, "compiled": engine.compiled}
            figures["warnings"] = engine.warnings
            case |= _measure(engine, todo[0], rounds, figures["peak_tflops"] * 1e12)
        save(figures)
        if ran_out(case) and mode == "none":
            options["activation_checkpointing"], engine = "full", None
        else:
            todo = todo[1:]
    return figures


def _build(shape: str, device: str, options: dict) -> RRHFModel:
    lm, dtype = build_model(shape, device=device), compute_dtype(device)
    return RRHFModel(lm, TrainConfig(), max_length=4096, compute_dtype=dtype, **options)


def _measure(engine: RRHFModel, size: int, rounds: int, peak: float) -> dict:
    queries = draw(PAPER, fill(PAPER, size), engine.lm.config.vocab_size)
    config = TrainConfig(max_tokens_per_pack=size)
    batch = planner_for(engine, queries, size).batch(range(len(queries)))
    on_gpu = engine.device.type == "cuda"
    if on_gpu:  # as the trainer does
        batch = replace(batch, packs=[pack.pin_memory() for pack in batch.packs])

    def step() -> Totals:
        engine.zero_grad()
        totals = Totals(engine.device)
        backward_whole(engine, batch, config, World(engine.device), totals)
        return totals

    active = step().active_fraction  # compiles
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(step) for _ in range(rounds)]
    tokens = sum(pack.num_tokens for pack in batch.packs)
    flops = flops_of_packs(engine, batch.packs, active)
    return {
        "packs": len(batch.packs),
        "tokens": tokens,
        "seconds": times,
        "ms_per_pack": median(times) / len(batch.packs) * 1e3,
        "tokens_per_second": tokens / median(times),
        "mfu": flops / median(times) / peak,
        "graphs": count_graphs(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "waits_per_pack": waits(step, len(batch.packs)) if on_gpu else None,
    }


def waits(step: Callable[[], object], num_packs: int) -> dict[str, float]:
    """How often the host waits for the device in a step, per pack, by the line that waits."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [w for w in caught if "called a synchronizing" in str(w.message)]
    places = Counter("/".join(w.filename.split("/")[-2:]) + f":{w.lineno}" for w in lines)
    return {place: count / num_packs for place, count in places.most_common()}
