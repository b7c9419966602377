"""The best speed of this machine, and the page that compares a step's parts with it."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from rrhf_fast.stages.figure import new_figure
from rrhf_fast.stages.files import replacing, write_text

NOTE = """\
"At the roofline" is the time that a part's products would take at the speed of one large product,
or its bytes at the speed of a large pass over memory, both measured on this machine. "Share of
roofline" is that over the time taken; it may exceed 100 % where data stays in a cache. "To gain" is
the time taken beyond it: all of it where nothing bounds the part. Work is what the result needs,
without recomputation by activation checkpointing, padding, and scores that attention hides. The
optimizer's part includes clipping. The profiler slows small operators down.
"""
ON_CPU = "Seconds are the training thread's own, in operators and in Python between them.\n"
ON_CUDA = """\
Seconds are those of kernels. Communication is the part that no other kernel hides; idle is the time
without any kernel, mostly because the host was late.
"""


@dataclass(frozen=True)
class Roofline:
    """The measured best of one device."""

    dtype: torch.dtype
    flops: float  # per second, of a matrix product in dtype
    bytes: float  # per second, of a pass over memory that reads and writes


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """The best of many large products and of many passes over a large tensor, with PyTorch's
    threads; about two seconds."""
    # In place: a CPU's copy also reads the memory that it overwrites.
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return Roofline(
        dtype, product_speed(device, dtype), 2 * x.nbytes / _best("x.mul_(1.5)", 1, x=x)
    )


def product_speed(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP per second of one large matrix product, the best of those that run in `seconds`."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best("torch.mm(a, b, out=c)", seconds, a=a, b=b, c=torch.empty_like(a))


def _best(statement: str, seconds: float, **names: torch.Tensor) -> float:
    """Seconds per run, the device's work included."""
    from torch.utils.benchmark import Timer  # imports setuptools

    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=seconds).times)


@dataclass(frozen=True)
class Breakdown:
    """One step's parts, averaged over the recorded steps."""

    total: float  # seconds
    seconds: dict[str, float]  # by part; they add up to the total
    flops: dict[str, float]  # of parts made of matrix products
    bytes: dict[str, float]  # of parts that only move data
    num_tokens: float  # encoded by the decoder, without padding
    num_steps: int
    device: torch.device
    roofline: Roofline

    def at_roofline(self, part: str) -> float | None:
        """Seconds that the part's work takes at best; None if nothing bounds it."""
        if part in self.flops:
            return self.flops[part] / self.roofline.flops
        return self.bytes[part] / self.roofline.bytes if part in self.bytes else None

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: the speed of the products that the packs need, as a share of the
        measured peak (Chowdhery et al., arXiv 2204.02311, appendix B)."""
        return sum(self.flops.values()) / self.total / self.roofline.flops

    def page(self) -> str:
        """The page, in Markdown."""
        on_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_cuda else _threads()
        peak = self.roofline
        lines = [
            "# Where the time of a training step goes",
            "",
            f"{name}, torch {torch.__version__}, mean of {self.num_steps} recorded steps.",
            "",
            f"* one step: {self.total * 1e3:,.1f} ms, {self.num_tokens:,.0f} tokens, "
            f"{self.num_tokens / self.total:,.0f} tokens/s",
            f"* roofline: {_amount(peak.flops, 'FLOP/s')} in {str(peak.dtype)[6:]} products, "
            f"{_amount(peak.bytes, 'B/s')} in passes over memory",
            f"* model FLOPs utilisation: {self.utilisation:.1%} of those products",
            "",
            "| part | ms | share of step | work | achieved | at the roofline, ms "
            "| share of roofline | to gain, ms |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += ["| " + " | ".join(self._row(part)) + " |" for part in self._order()]
        lines += ["", NOTE + (ON_CUDA if on_cuda else ON_CPU), "![](breakdown.png)", ""]
        return "\n".join(lines)

    def _order(self) -> list[str]:
        return sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)

    def _row(self, part: str) -> list[str]:
        seconds, best = self.seconds[part], self.at_roofline(part)
        begin = [part, f"{seconds * 1e3:,.1f}", f"{seconds / self.total:.1%}"]
        if best is None:
            return [*begin, "", "", "", "", f"{seconds * 1e3:,.1f}"]
        unit = "FLOP" if part in self.flops else "B"
        work = self.flops.get(part) or self.bytes.get(part, 0)
        return [
            *begin,
            _amount(work, unit),
            _amount(work / seconds, unit + "/s"),
            f"{best * 1e3:,.1f}",
            f"{best / seconds:.0%}",
            f"{max(0.0, seconds - best) * 1e3:,.1f}",
        ]

    def plot(self, path: Path) -> None:
        """A bar per part, and its time at the roofline."""
        parts = self._order()[::-1]
        spent = [1e3 * self.seconds[part] for part in parts]
        best = [1e3 * (self.at_roofline(part) or 0.0) for part in parts]
        figure = new_figure(9, 0.5 * len(parts) + 1.6)
        axis = figure.subplots()
        axis.barh(parts, spent, color="C0", alpha=0.35, label="time taken")
        axis.barh(parts, best, height=0.4, color="C0", label="time at the roofline")
        for place, (part, length) in enumerate(zip(parts, spent, strict=True)):
            bound = self.at_roofline(part)
            reached = "" if bound is None else f", {bound / self.seconds[part]:.0%} of the roofline"
            text = f" {self.seconds[part] / self.total:.1%} of the step{reached}"
            axis.text(max(length, best[place]), place, text, va="center", fontsize="small")
        axis.set(
            xlabel="milliseconds per step",
            xlim=(0, 1.55 * max(*spent, *best)),
            title=f"A training step: {self.total * 1e3:,.0f} ms, "
            f"{self.utilisation:.0%} model FLOPs utilisation",
        )
        axis.legend(loc="lower right", fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
        with replacing(path) as staging:
            figure.savefig(staging, dpi=110, format="png")

    def write(self, folder: Path) -> None:
        """breakdown.md and breakdown.png."""
        write_text(folder / "breakdown.md", self.page())
        self.plot(folder / "breakdown.png")


def _threads() -> str:
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _amount(value: float, unit: str) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
