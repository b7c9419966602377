"""Measure time and peak memory in one way for all cases."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import TypeVar

import torch

from benchmarks.cores import Others, is_disturbed
from benchmarks.results import recorded

Found = TypeVar("Found")
# The range over five rounds contains the median with a probability of 94 %: 1 - 2 / 2^5.
ROUNDS, LONG_ROUNDS = 5, 3
LONG = 60.0  # seconds of a round from which on fewer are made
SEED = 0  # of the orders


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call; waits for the GPU, if any, before and after."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def device_seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median over consecutive calls, after three to warm up. On CUDA between events, so that time
    on the host does not count."""
    for _ in range(3):
        function()
    if not torch.cuda.is_available():
        return median(seconds(function) for _ in range(repeats))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    _wait()
    return median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def interleaved(
    ways: dict[str, Callable[[], object]],
    rounds: int | None,
    *,
    device: str = "cpu",
    before: Callable[[], object] = lambda: None,
    results: dict[str, dict] | None = None,
    record: dict | None = None,
) -> dict[str, list[float]]:
    """Seconds of each way, by `in_rounds`. `before` runs before every call and is not timed."""

    def timed(way: Callable[[], object]) -> float:
        before()
        return seconds(way)

    calls = {name: partial(timed, way) for name, way in ways.items()}
    return in_rounds(calls, rounds, device=device, results=results, record=record)


def in_rounds(
    calls: dict[str, Callable[[], Found]],
    rounds: int | None,
    *,
    device: str = "cpu",
    results: dict[str, dict] | None = None,
    record: dict | None = None,
    is_warm: bool = False,
) -> dict[str, list[Found]]:
    """What each call returns, one call per round, so that temporary slowdowns of the machine affect
    all alike.

    A first round warms up and does not count: allocators, caches, compilers and autotuning see
    these sizes for the first time. Every round has an order of its own. On a CPU, a round during
    which other programs used too much of its cores (`cores.is_disturbed`) is repeated, about half
    as often as there are rounds, and the least disturbed ones count.

    Args:
        rounds: to count; None: `ROUNDS`, or `LONG_ROUNDS` if one takes over a minute.
        device: that is measured, "cpu" or "cuda", whether or not there is a GPU.
        results: a call that fails is dropped from then on, and results[name]["problem"] says why;
            without, it raises.
        record: gets how many rounds ran and were disturbed, what others used in those that count
            (None where the system does not say), and the orders' seed.
        is_warm: every call has been made before, so no round is made to warm up.
    """
    calls, shuffle = dict(calls), random.Random(SEED).shuffle

    def one_round() -> dict[str, Found]:
        names, found = list(calls), {}
        shuffle(names)
        for name in names:
            if results is None:
                found[name] = calls[name]()
                continue
            with recorded(results[name]):
                found[name] = calls[name]()
            if name not in found:
                del calls[name]
        return found

    length = 0.0 if is_warm else seconds(one_round)
    if rounds is None:
        rounds = LONG_ROUNDS if length > LONG else ROUNDS
    done: list[tuple[float | None, dict[str, Found]]] = []
    calm = 0
    while calm < rounds and len(done) < rounds + (rounds + 1) // 2:
        others = Others()
        found = one_round()
        used = others.cores()
        calm += device == "cuda" or not is_disturbed(used)
        done.append((used, found))
    best = sorted(range(len(done)), key=lambda i: done[i][0] or 0.0)[:rounds]
    if record is not None:
        record["rounds"] = {
            "counted": rounds,
            "run": len(done),
            "disturbed": len(done) - calm,
            "disturbed_counted": max(0, rounds - calm),
            "cores_used_by_others": [done[i][0] for i in sorted(best)],
            "order_seed": SEED,
        }
    return {name: [done[i][1][name] for i in sorted(best)] for name in calls}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Median and range over rounds of slower / faster."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def best_seconds(function: Callable[[], object], seconds_in_all: float = 0.2) -> float:
    """The shortest of at least three consecutive calls, after one to warm up."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds_in_all:
        times.append(seconds(function))
    return min(times)


def peak_extra_mb(function: Callable[[], object]) -> float:
    """Peak MiB that a call on CUDA needs beyond what is already allocated."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
