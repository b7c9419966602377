"""Peak memory and time of one way to compute loss and gradient."""

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks import cores
from benchmarks.baselines import plain_head, released_loss, repeat_prompts
from benchmarks.workloads import Lengths, build_model, draw
from rrhf_fast import TrainConfig
from rrhf_fast.data.forest import Pack
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.backward import backward_active
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals

# One query at a time, its prompt repeated per response.
RELEASED, PADDED, REPEATED = "released method", "padded batches", "packed, prompts repeated"
# As many queries at once as fit a pack, prompts shared.
ENGINE, CHECKPOINTED, PLAIN_HEAD = "rrhf_fast", "checkpointed layers", "with a plain head"
ACTIVE = "active part alone"
# The same for one query at a time.
ALONE, LEAN = "one query a pack", "one query a pack, checkpointed"


@dataclass(frozen=True)
class Point:
    """One measurement."""

    way: str  # one of the names above
    shape: str  # a name in `workloads.SHAPES`
    lengths: Lengths
    device: str
    vocab_size: int | None = None  # None: the shape's
    num_queries: int = 1
    max_tokens: int = 2048  # per pack
    # Between rewards and the ranks of the model's own scores; None: rewards ignore the model.
    correlation: float | None = None
    rounds: int = 0  # of timing, after the run whose memory is measured

    @property
    def num_tokens(self) -> int:
        """Tokens that the decoder encodes."""
        prompt, response, k = self.lengths.prompt, self.lengths.response, self.lengths.k
        copies = k if self.way in (RELEASED, PADDED, REPEATED) else 1
        # The released code also encodes last tokens, from which nothing is predicted.
        response -= self.way != RELEASED
        return self.num_queries * (copies * prompt + k * response)


def measure(point: Point) -> dict:
    """Measure memory in bytes and time of one loss and gradient of all queries.

    On the CPU memory is the resident set of a separate process (Linux with glibc), so `peak_bytes`
    includes Python and its libraries; on CUDA it is PyTorch's allocations, which one process can
    measure point by point, compiling layers once.

    Returns:
        `model_bytes`: weights and gradients. `extra_bytes`: the peak beyond what was held with both
        allocated. `peak_bytes`: the total. `seconds`: the median of the rounds, None without any.
        `tokens`, `loss`, and `active_fraction` if known.

    Raises:
        BrokenProcessPool: the process was killed, as the system does when memory runs out.
    """
    if point.device == "cuda":
        gc.collect()  # reference cycles of an earlier point
        torch.cuda.empty_cache()
        return _measure(point)
    with isolated() as process:
        return process.submit(_measure, point).result()


@contextmanager
def isolated() -> Iterator[ProcessPoolExecutor]:
    """A process forked from one that has imported all, its threads bound to cores."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rrhf_fast.train.backward"])
    with (
        mock.patch.dict(os.environ, cores.bound_environment()),
        ProcessPoolExecutor(1, mp_context=context) as process,
    ):
        yield process


def _measure(point: Point) -> dict:
    model, step = _prepare(point)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    watch = _watch_cuda if point.device == "cuda" else _watch_process
    read_peak = watch()
    figures = step()
    peak, extra = read_peak()
    seconds = []
    for _ in range(point.rounds):
        model.zero_grad(set_to_none=False)
        start = time.perf_counter()
        step()  # returns numbers, so it waits for the device
        seconds.append(time.perf_counter() - start)
    return figures | {
        "tokens": point.num_tokens,
        "model_bytes": sum(2 * p.numel() * p.element_size() for p in model.parameters()),
        "extra_bytes": extra,
        "peak_bytes": peak,
        "seconds": median(seconds) if seconds else None,
    }


def _prepare(point: Point) -> tuple[nn.Module, Callable[[], dict]]:
    """The model that accumulates gradients, and a function that does so once and returns the
    loss."""
    lm = build_model(point.shape, device=point.device, vocab_size=point.vocab_size)
    queries = draw(point.lengths, point.num_queries, lm.config.vocab_size)
    dtype = torch.bfloat16 if point.device == "cuda" else torch.float32
    if point.way == RELEASED:  # with none of the engine's levers, which convert layers in place
        return lm, lambda: _sum_up(
            queries, lambda query, share: share * _released(lm, query, dtype)
        )
    checkpointing = "full" if point.way in (CHECKPOINTED, LEAN) else "none"
    # The released code divides by the padded width, so all ways do here.
    config = TrainConfig(compat="official", max_tokens_per_pack=point.max_tokens)
    model = RRHFModel(
        lm,
        config,
        packing="none" if point.way == PADDED else "forest",
        max_length=4096,
        max_tokens=point.max_tokens,
        compute_dtype=dtype,
        compile=None,
        activation_checkpointing=checkpointing,
    )
    options = {}
    if model.attention is not None:
        options = {"pad_to_multiple_of": model.pad_to_multiple_of, "plan": model.plan}
        if point.correlation is not None:
            _correlate(model, queries, point.correlation)
    if point.way == REPEATED:
        packs = [repeat_prompts([query], [i], **options) for i, query in enumerate(queries)]
    else:
        alone = point.way in (PADDED, ALONE, LEAN)
        planner = PackPlanner(
            queries,
            packing="none" if point.way == PADDED else "forest",
            max_tokens_per_pack=1 if alone else point.max_tokens,
            **options,
        )
        batch = planner.batch(range(len(queries)))
        packs = batch.packs
    if point.way == ACTIVE:
        return model, lambda: _active(model, batch, config)
    packs = [pack.to(model.device) for pack in packs]
    if point.way == PLAIN_HEAD:
        return model, lambda: _sum_up(packs, partial(plain_head, model))

    def loss_of(pack: Pack, share: float) -> torch.Tensor:
        return model(pack, share=share, into_grad=True).loss  # as the trainer calls it

    return model, lambda: _sum_up(packs, loss_of)


def _sum_up(parts: list, loss_of: Callable[[object, float], torch.Tensor]) -> dict:
    """Forward and backward of each part in turn; `loss_of` gives its share in the mean over
    queries."""
    counts = [1 if isinstance(part, TokenisedQuery) else part.num_queries for part in parts]
    total = 0.0
    for part, count in zip(parts, counts, strict=True):
        loss = loss_of(part, count / sum(counts))
        loss.backward()
        total += loss.item()
    return {"loss": total}


def _released(lm: PreTrainedModel, query: TokenisedQuery, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(lm.device.type, dtype, enabled=dtype != torch.float32):
        return released_loss(lm, query)


def _active(model: RRHFModel, batch, config: TrainConfig) -> dict:
    totals = Totals(model.device)
    backward_active(model, batch, config, World(model.device), totals)
    return {"loss": totals.means()["loss"], "active_fraction": totals.active_fraction}


def _correlate(model: RRHFModel, queries: list[TokenisedQuery], correlation: float) -> None:
    """Replace rewards by the standardised ranks of the model's scores, mixed with noise."""
    rng = np.random.default_rng(0)
    planner = PackPlanner(queries, packing="forest", max_tokens_per_pack=1)
    for i, query in enumerate(queries):
        with torch.no_grad():
            scores = model(planner.build([i]).to(model.device)).logp_scores
        ranks = scores.argsort().argsort().float().cpu().numpy()
        noise = rng.standard_normal(len(ranks))
        share = (1 - correlation**2) ** 0.5
        query.rewards[:] = correlation * (ranks - ranks.mean()) / ranks.std() + share * noise


def _watch_cuda() -> Callable[[], tuple[int, int]]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def read() -> tuple[int, int]:
        peak = torch.cuda.max_memory_allocated()
        return peak, peak - before

    return read


def _watch_process() -> Callable[[], tuple[int, int]]:
    """Watch the resident set from here on: its peak, and the peak's excess over the current."""
    libc, mmap_threshold = ctypes.CDLL(None), -3
    # Blocks of this size return to the system when freed, so the peak counts tensors in use. This
    # is glibc's default, but unless set it grows with freed blocks.
    libc.mallopt(mmap_threshold, 128 * 2**10)
    libc.malloc_trim(0)  # returns memory freed while building the model
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")

    def read() -> tuple[int, int]:
        peak = _status("VmHWM")
        # Raised to its maximum, so that memory is kept for the next, timed step.
        libc.mallopt(mmap_threshold, 32 * 2**20)
        return peak, peak - before

    return read


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) * 1024
