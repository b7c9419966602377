"""Time and peak memory, the same way for every case."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch

from benchmarks.results import recorded


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call; waits for the GPU before and after, if there is one."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def device_seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median over calls in a row, after three that warm up. On CUDA between events, so that what
    the host does meanwhile does not count."""
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
    """Seconds of each way, one call a round, so that what slows the machine for a while slows
    neighbours alike. `before` runs before every call and is not timed. With `results`, a way that
    fails is left out from then on, and results[name]["problem"] says why; without, it raises."""
    found: dict[str, list[float]] = {name: [] for name in ways}

    def call(name: str) -> float | None:
        before()
        if results is None:
            return seconds(ways[name])
        with recorded(results[name]):
            return seconds(ways[name])
        del found[name]
        return None

    if torch.cuda.is_available():
        # Compilers and autotuning meet these sizes for the first time.
        for name in ways:
            call(name)
    for _ in range(rounds):
        for name in list(found):
            taken = call(name)
            if taken is not None:
                found[name].append(taken)
    return found


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Median and range over rounds of slower / faster."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def peak_extra_mb(function: Callable[[], object]) -> float:
    """MiB that a call on CUDA needs on top of what is allocated."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
