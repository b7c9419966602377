"""Record figures in a file: written after every part, including failures."""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Called by a case after each part, with all its figures so far.
Save = Callable[[dict], None]


def no_save(figures: dict) -> None:
    """For callers that need only the final figures."""


def write_json(path: Path, figures: dict) -> None:
    """Replace the file in one step, so that a killed process leaves a complete one."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(partial, path)


@contextmanager
def recorded(result: dict) -> Iterator[None]:
    """Turn an exception inside (out of memory, a compiler's, a changed interface) into
    result["problem"], one line, so that only this result is lost."""
    try:
        yield
    except Exception as error:
        result["problem"] = describe(error)
    if "problem" in result:
        import torch  # late, so that scripts that only write figures start fast

        gc.collect()  # compiled layers are in reference cycles
        torch.cuda.empty_cache()  # no effect without a GPU


def describe(error: BaseException) -> str:
    """An error's type and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def judge(result: dict, errors: Iterable[float], tolerance: float) -> None:
    """Mark a result that is too far from float64, or NaN."""
    if not all(error < tolerance for error in errors):
        result["problem"] = "too far from float64"


def problems(figures: object, place: str = "") -> list[str]:
    """All recorded failures, at any depth, as "where: what"."""
    if isinstance(figures, list):
        return [line for i, one in enumerate(figures) for line in problems(one, f"{place}[{i}]")]
    if not isinstance(figures, dict):
        return []
    own = [f"{place}: {figures['problem']}"] if "problem" in figures else []
    inner = [problems(one, f"{place}/{name}") for name, one in figures.items()]
    return own + [line for lines in inner for line in lines]


def ran_out(figures: dict) -> bool:
    """Whether any part ran out of device memory."""
    return any("OutOfMemory" in line or "out of memory" in line for line in problems(figures))
