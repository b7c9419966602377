"""Where the time of training steps goes: a trace, and each part's time and work.

The parts are the ranges of `rrhf_fast.spans`. An operator belongs to the innermost range around it,
one of the backward pass to the part of the forward operator whose gradient it computes: autograd
gives both the same number.
"""

import errno
import gzip
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from rrhf_fast.data.packs import Batch
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.spans import PARTS, span
from rrhf_fast.stages.files import replacing
from rrhf_fast.train.evaluate import Totals
from rrhf_fast.train.roofline import Breakdown, measure_roofline

# Steps before the recorded ones: layers compile, the optimizer makes its state.
WARMUP = 3
# The range around the recorded steps. "communication", "other" and "idle" have no range.
STEPS = "training steps"
COLLECTIVES = ("FSDP::", "c10d::", "_c10d_functional::", "gloo:", "nccl:")


class StepProfiler:
    """Lets `WARMUP` steps pass, records `num_steps`, and writes trace.json.gz (for Perfetto or
    chrome://tracing), breakdown.md and breakdown.png to `folder`. `breakdown` is None until then.

    Every rank may have one. Times are those of its own rank, work is the mean over ranks. Works on
    packed forests.
    """

    def __init__(
        self,
        model: RRHFModel,
        optimizer: torch.optim.Optimizer,
        *,
        num_steps: int,
        folder: Path,
        num_ranks: int = 1,
    ):
        self.model, self.optimizer = model, optimizer
        self.num_steps, self.folder, self.num_ranks = num_steps, folder, num_ranks
        self.breakdown: Breakdown | None = None
        self._is_recording = False
        self._totals: list[Totals] = []  # of the recorded steps

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the same batches. A step lasts from the request for its batch to the request for
        the next one, evaluations and checkpoints included."""
        for _, batch in zip(range(WARMUP), batches, strict=False):
            yield batch
        _wait(self.model.device)
        with torch.profiler.profile() as profile:
            try:
                with record_function(STEPS):
                    self._is_recording = True
                    for _ in range(self.num_steps):
                        with span("data"):
                            batch = next(batches, None)
                        if batch is None:
                            break
                        yield batch
                    self._is_recording = False
                    _wait(self.model.device)
            finally:
                if dist.is_initialized():
                    # A thread of gloo uses the profiler until shortly after its collective is done,
                    # and dies of a segmentation fault if there is none by then (torch 2.13).
                    time.sleep(0.5)
        if self._totals:
            self._write(profile)
        yield from batches

    def add(self, totals: Totals) -> None:
        """Note the sums over all ranks of the step just done."""
        if self._is_recording:
            self._totals.append(totals)

    def _write(self, profile: torch.profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _export(profile, self.folder / "trace.json.gz")
        total, seconds = attribute(profile.events())
        num_steps = len(self._totals)
        # Per step and rank.
        mean = Totals()
        mean.sums = sum(totals.sums for totals in self._totals) / (num_steps * self.num_ranks)
        self.breakdown = Breakdown(
            total=total / num_steps,
            seconds={part: spent / num_steps for part, spent in seconds.items()},
            flops=mean.flops._asdict(),
            bytes={"optimizer": optimizer_bytes(self.optimizer)},
            num_tokens=mean.read().num_real_tokens,
            num_steps=num_steps,
            device=self.model.device,
            roofline=measure_roofline(self.model.device, self.model.compute_dtype),
        )
        self.breakdown.write(self.folder)


def _export(profile: torch.profiler.profile, path: Path) -> None:
    """Write the trace. Raises OSError if PyTorch wrote none, of which it only prints a line."""
    plain = path.with_name(".trace.json")
    try:
        profile.export_chrome_trace(str(plain))
        with replacing(path) as staging:
            if not plain.exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            with plain.open("rb") as file, gzip.open(staging, "wb") as packed:
                shutil.copyfileobj(file, packed)
    finally:
        for left in path.parent.glob(f"{plain.name}*"):
            left.unlink()


def attribute(events: Iterable) -> tuple[float, dict[str, float]]:
    """Seconds from the first recorded step's begin to the last one's end, and each part's share.

    On the CPU a part gets its own time on the training thread, Python included. On CUDA it gets its
    kernels' time; "communication" is the part that no other kernel hides, and "idle" the time when
    the device does nothing, mostly because the host is late.

    Args:
        events: of a torch profiler, with ranges named after the parts within one named `STEPS`.
    """
    events = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    (steps,) = (event for event in on_host if event.name == STEPS)
    begin, end = steps.time_range.start, steps.time_range.end
    on_host = [event for event in on_host if begin <= event.time_range.start <= end]
    parts = assign_parts(on_host)
    total, seconds = (end - begin) / 1e6, defaultdict(float)
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if not kernels:
        for event, part in zip(on_host, parts, strict=True):
            if event.thread == steps.thread:
                seconds[part] += event.self_cpu_time_total / 1e6
        return total, dict(seconds)
    for event, part in zip(on_host, parts, strict=True):
        for kernel in event.kernels:
            if not kernel.name.startswith("nccl"):
                seconds[part] += kernel.duration / 1e6
    busy = _covered(kernels) / 1e6
    own = sum(spent for part, spent in seconds.items() if part != "communication")
    seconds["communication"] = max(0.0, busy - own)
    seconds["idle"] = total - busy
    return total, dict(seconds)


def assign_parts(events: list) -> list[str]:
    """The part of each event on the host; events are sorted by their begins."""
    parts: dict = {}
    makers: dict[tuple[int, int], str] = {}  # part by thread and number of a forward operator
    latest = defaultdict(lambda: "other")  # part of each thread's latest backward operator
    for event in events:
        if event.name in PARTS:
            part = event.name
        elif event.name.startswith("Optimizer."):  # PyTorch's own range
            part = "optimizer"
        elif event.name.startswith(COLLECTIVES):
            part = "communication"
        elif event.name.startswith("autograd::engine::evaluate_function"):
            # Accumulating a gradient has no forward operator. It follows the gradient's maker.
            maker = (event.fwd_thread, event.sequence_nr)
            part = latest[event.thread] = makers.get(maker, latest[event.thread])
        else:
            part = parts.get(event.cpu_parent, "other")
        parts[event] = part
        if event.sequence_nr >= 0 and not event.fwd_thread:
            # Several operators may share a number; the last one to begin made the graph's node.
            makers[event.thread, event.sequence_nr] = part
    return [parts[event] for event in events]


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length that intervals [begin, end) cover together; sorted by their begins."""
    length, until = 0.0, float("-inf")
    for begin, end in spans:
        length += max(0.0, end - max(begin, until))
        until = max(until, end)
    return length


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that one step has to move: it reads gradients for their norm and for the update, and
    reads and writes parameters and moments."""
    moved = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = [t for t in optimizer.state[parameter].values() if t.shape == parameter.shape]
            # Gradients have the parameter's size.
            moved += (2 + 2) * _size(parameter) + 2 * sum(_size(t) for t in moments)
    return moved


def _size(tensor: torch.Tensor) -> int:
    """Bytes on this rank."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
