"""Named ranges around the parts of a training step, for profilers."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

PARTS = ("data", "decoder", "attention", "head", "loss", "optimizer")


def span(part: str) -> AbstractContextManager:
    """A profiler range named after one of `PARTS`; nothing while no profiler runs, because a range
    costs ten microseconds even then. Not for code that torch.compile traces."""
    assert part in PARTS
    return record_function(part) if torch.autograd.profiler._is_profiler_enabled else nullcontext()
