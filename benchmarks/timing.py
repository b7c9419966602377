"""Measure time and peak memory in one way for all cases."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch

from benchmarks.results import recorded


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
    rounds: int,
    *,
    before: Callable[[], object] = lambda: None,
    results: dict[str, dict] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each way, one call per round, so that temporary slowdowns of the machine affect
    all alike. `before` runs before every call and is not timed. With `results`, a way that fails is
    dropped from then on, and results[name]["problem"] says why; without, it raises."""
    times: dict[str, list[float]] = {name: [] for name in ways}

    def call(name: str) -> float | None:
        before()
        if results is None:
            return seconds(ways[name])
        with recorded(results[name]):
            return seconds(ways[name])
        del times[name]
        return None

    if torch.cuda.is_available():
        # Compilers and autotuning see these sizes for the first time.
        for name in ways:
            call(name)
    for _ in range(rounds):
        for name in list(times):
            taken = call(name)
            if taken is not None:
                times[name].append(taken)
    return times


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Median and range over rounds of slower / faster."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def peak_extra_mb(function: Callable[[], object]) -> float:
    """Peak MiB that a call on CUDA needs beyond what is already allocated."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
