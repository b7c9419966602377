"""The cores that figures come from: threads bound to them, and what other programs use of them.

This module loads no torch, because OpenMP binds its threads while torch loads it.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Without these, two threads of a product may share one core for seconds, while another is idle.
BINDING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
SHARE = 0.05  # of all cores; figures taken while others use more are marked
# Seconds per core by which two readings of the system's clocks may differ; they tick every 10 ms.
_TICKS = 0.02
_BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; not idle, iowait


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


# Read before torch is loaded: a bound process is allowed one core only.
CORES = _allowed()
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def quota() -> float | None:
    """How many cores' time a container's limit leaves; None without a limit in `_CPU_MAX`."""
    try:
        allowed, period = _CPU_MAX.read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def num_cores() -> float:
    """The cores that this process may use at once."""
    return min(len(CORES), quota() or len(CORES))


def bind() -> bool:
    """Let OpenMP bind each thread of this process to a core, if torch is yet to be loaded; what the
    user has set stays. Returns whether the variables are set in time.

    Processes that this one starts later inherit one core and the variables, unless `free`."""
    if "torch" in sys.modules or not hasattr(os, "sched_setaffinity"):
        return False
    os.environ |= bound_environment()
    return True


def bound_environment() -> dict[str, str]:
    """The variables for a process whose threads are to be bound, the user's own first."""
    return {name: os.environ.get(name, value) for name, value in BINDING.items()}


def free() -> None:
    """Allow this thread, and the processes it starts from here on, all cores again."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)


def binding() -> dict:
    """How the threads of this process are bound, for the record."""
    return {
        "cores": len(CORES),
        "quota": quota(),
        "cores_of_first_thread": len(_allowed()),
        **{name: os.environ.get(name) for name in BINDING},
    }


class Others:
    """What processes other than this one and its descendants use, from here on."""

    def __init__(self):
        self._start, self._used = time.perf_counter(), _used_by_others()

    def cores(self) -> float | None:
        """How many of this process's cores they have used on average, as far as clocks of 10 ms
        tell; None where the system does not say. Short spans show little."""
        if self._used is None:
            return None
        seconds = time.perf_counter() - self._start
        used = _used_by_others() - self._used - _TICKS * len(CORES)
        return min(max(0.0, used / seconds), float(len(CORES)))


def is_disturbed(others: float | None) -> bool:
    """Whether others use so many cores that times are not to be trusted."""
    return others is not None and others > SHARE * num_cores()


def check_load(*, refuse: bool, seconds: float = 1.0) -> dict:
    """What others use for about a second, for the record.

    Raises:
        ValueError: it is too much, and `refuse`.
    """
    others = Others()
    time.sleep(seconds)
    used = others.cores()
    if refuse and is_disturbed(used):
        raise ValueError(
            f"busy: other programs use {used:.2f} of {num_cores():g} cores (with what the "
            "hypervisor gives to others), so times would mean little; expected at most "
            f"{SHARE:.0%} of the cores, or --busy_ok, which marks the figures"
        )
    return {"cores_used_by_others": used, "disturbed": is_disturbed(used)}


def remarks(figures: dict) -> list[str]:
    """What to know of the load beside which figures were taken; nothing of an idle machine."""
    load, said = figures.get("environment", {}).get("load"), []
    if load is not None and load["cores_used_by_others"] is None:
        said.append("load of other programs is unknown here")
    elif load is not None and load["disturbed"]:
        said.append(f"other programs used {load['cores_used_by_others']:.2f} cores before the run")
    if load is not None and load.get("busy_ok"):
        said.append("taken with --busy_ok")
    every = list(_rounds_in(figures))
    if disturbed := sum(rounds["disturbed_counted"] for rounds in every):
        count = sum(rounds["counted"] for rounds in every)
        said.append(f"other programs disturbed {disturbed} of {count} rounds that count")
    return said


def _rounds_in(figures: object) -> Iterator[dict]:
    """All records of `in_rounds`, at any depth."""
    if isinstance(figures, dict):
        if "disturbed_counted" in figures:
            yield figures
        figures = list(figures.values())
    if isinstance(figures, list):
        for one in figures:
            yield from _rounds_in(one)


def _used_by_others() -> float | None:
    """CPU seconds since some moment; includes what the hypervisor gives to other guests."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    clocks = {words[0]: words[1:] for words in map(str.split, lines) if words[0].startswith("cpu")}
    every = [clocks[f"cpu{core}"] for core in CORES if f"cpu{core}" in clocks]
    ticks = sum(int(clock[i]) for clock in every for i in _BUSY)
    return (ticks - _own_ticks()) / os.sysconf("SC_CLK_TCK")


def _own_ticks() -> int:
    """CPU time of this process, of its descendants, and of those that have ended."""
    parents, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may contain spaces.
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(file.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))

    def is_own(pid: int) -> bool:
        while pid and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid != 0

    return sum(spent for pid, spent in ticks.items() if is_own(pid))
