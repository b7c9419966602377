"""Wall-clock time and peak memory, the same way for every case."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def seconds(function: Callable[[], object]) -> float:
    """Of one call; waits for the GPU before and after, if there is one."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def interleaved(
    ways: dict[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each way, one call a round, so that what slows the machine for a while slows
    neighbours alike. `before` runs before every call and is not timed."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    if torch.cuda.is_available():
        # Compilers and autotuning meet these sizes for the first time.
        for way in ways.values():
            before()
            way()
    for _ in range(rounds):
        for name, way in ways.items():
            before()
            found[name].append(seconds(way))
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
