"""Figures on their way into a file: written after every part, and a failure is one of them."""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What a case calls with all its figures so far, after each part.
Save = Callable[[dict], None]


def no_save(figures: dict) -> None:
    """For callers who wait for the whole."""


def write_json(path: Path, figures: dict) -> None:
    """Replace the file in one step, so that a process that is killed leaves a whole one."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(partial, path)


@contextmanager
def recorded(result: dict) -> Iterator[None]:
    """An exception inside (out of memory, a compiler's, an interface that has moved on) becomes
    result["problem"], one line, and costs nothing but this result."""
    try:
        yield
    except Exception as error:
        result["problem"] = describe(error)
    if "problem" in result:
        import torch  # late: what only writes figures starts at once

        gc.collect()  # a compiled layer holds itself
        torch.cuda.empty_cache()  # nothing without a GPU


def describe(error: BaseException) -> str:
    """Its type and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def judge(result: dict, errors: Iterable[float], tolerance: float) -> None:
    """Note a result that is too far from float64; NaN is."""
    if not all(error < tolerance for error in errors):
        result["problem"] = "too far from float64"


def problems(figures: object, place: str = "") -> list[str]:
    """Everything that failed, wherever it is recorded: "where: what"."""
    if isinstance(figures, list):
        return [line for i, one in enumerate(figures) for line in problems(one, f"{place}[{i}]")]
    if not isinstance(figures, dict):
        return []
    own = [f"{place}: {figures['problem']}"] if "problem" in figures else []
    inner = [problems(one, f"{place}/{name}") for name, one in figures.items()]
    return own + [line for lines in inner for line in lines]


def ran_out(figures: dict) -> bool:
    """Whether the device had too little memory for any of it."""
    return any("OutOfMemory" in line or "out of memory" in line for line in problems(figures))
