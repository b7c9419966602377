"""Where the time of training steps goes: a trace, and each part's time and work.

While steps are recorded, the functions that stand for a part are wrapped in a range of its name;
before and after, nothing is. An operator belongs to the innermost range around it. One of the
backward pass belongs to the part of the forward operator whose gradient it is: autograd gives both
the same number.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from rrhf_fast.data.active import WeightedForest, kept_rows
from rrhf_fast.data.forest import Movable, PackedForest
from rrhf_fast.data.packs import Batch
from rrhf_fast.losses import rrhf_torch
from rrhf_fast.model import rrhf
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train import backward
from rrhf_fast.train.roofline import Breakdown, measure_roofline

# Steps before the recorded ones: layers compile, the optimizer makes its state.
WARMUP = 3
# Names of ranges; "communication", "other" and "idle" have none of ours.
STEPS = "training steps"
RANGES = ("data", "decoder", "attention", "head", "loss", "optimizer")
COLLECTIVES = ("FSDP::", "c10d::", "_c10d_functional::", "gloo:", "nccl:")


class StepProfiler:
    """Lets `WARMUP` steps pass, records `num_steps`, and writes trace.json.gz (for Perfetto or
    chrome://tracing), breakdown.md and breakdown.png to `folder`. `breakdown` is None until then.

    Each rank may have one; it tells of that rank alone. Works on packed forests.
    """

    def __init__(
        self,
        model: RRHFModel,
        optimizer: torch.optim.Optimizer,
        *,
        num_steps: int,
        folder: Path,
    ):
        self.model, self.optimizer = model, optimizer
        self.num_steps, self.folder = num_steps, folder
        self.breakdown: Breakdown | None = None

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the same batches. A step lasts from the asking for its batch to the asking for the
        next one, with evaluations and checkpoints in between."""
        for _, batch in zip(range(WARMUP), batches, strict=False):
            yield batch
        work, recorded = Work(self.model), 0
        with ExitStack() as recording:
            for owner, name, part in _parts_of(self.model):
                recording.enter_context(_ranged(owner, name, part, work.note))
            _wait(self.model.device)
            profile = recording.enter_context(torch.profiler.profile())
            recording.enter_context(record_function(STEPS))
            while recorded < self.num_steps:
                with record_function("data"):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch
                recorded += 1
            _wait(self.model.device)
        if recorded:
            self._write(profile, work, recorded)
        yield from batches

    def _write(self, profile: torch.profiler.profile, work: "Work", num_steps: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        total, seconds = attribute(profile.events())
        self.breakdown = Breakdown(
            total=total / num_steps,
            seconds={part: spent / num_steps for part, spent in seconds.items()},
            flops={part: count / num_steps for part, count in work.flops().items()},
            bytes={"optimizer": optimizer_bytes(self.optimizer)},
            num_tokens=work.num_tokens / num_steps,
            num_steps=num_steps,
            device=self.model.device,
            roofline=measure_roofline(self.model.device, self.model.compute_dtype),
        )
        self.breakdown.write(self.folder)


def _parts_of(model: RRHFModel) -> list[tuple[object, str, str]]:
    """(owner, name, part) of the functions that stand for a part, as their callers find them."""
    rankings = [rrhf_torch]
    if model.device.type == "cuda":
        # Imported late: triton exists on Linux only.
        from rrhf_fast.kernels import ranking

        rankings.append(ranking)
    return [
        (Movable, "to", "data"),
        (backward, "active_part", "data"),
        (backward, "join", "data"),
        (rrhf, "decode_forest", "decoder"),
        (model.attention.backend, "attend", "attention"),
        (rrhf, "linear_rrhf_loss", "head"),
        (rrhf, "linear_logprob", "head"),
        (rrhf, "rrhf_loss", "loss"),
        (backward, "_has_gradient", "loss"),
        *((ranking, name, "loss") for ranking in rankings for name in ("forward", "backward")),
        (torch.nn.utils, "get_total_norm", "optimizer"),
        (torch.nn.utils, "clip_grads_with_norm_", "optimizer"),
    ]


@contextmanager
def _ranged(owner: object, name: str, part: str, note: Callable) -> Iterator[None]:
    """Inside, calls of owner.name stand in a range, and `note` is told of them."""
    function = getattr(owner, name)

    def call(*args, **kwargs):
        with record_function(part):
            out = function(*args, **kwargs)
        note(name, args, out)
        return out

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


def attribute(events: Iterable) -> tuple[float, dict[str, float]]:
    """Seconds from the first recorded step's begin to the last one's end, and each part's share.

    On the CPU a part has the time of the training thread that is its own, Python's included. On
    CUDA it has its kernels' time; "communication" is what no other kernel hides, and "idle" when
    the device does nothing, mostly because the host is late.

    Args:
        events: of a torch profiler, with ranges of the parts' names in a range named `STEPS`.
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
    """The part of each event on the host; events stand in the order of their begins."""
    parts: dict = {}
    makers: dict[tuple[int, int], str] = {}  # part by thread and number of a forward operator
    latest = defaultdict(lambda: "other")  # part of each thread's latest backward operator
    for event in events:
        if event.name in RANGES:
            part = event.name
        elif event.name.startswith("Optimizer."):  # a range that PyTorch makes
            part = "optimizer"
        elif event.name.startswith(COLLECTIVES):
            part = "communication"
        elif event.name.startswith("autograd::engine::evaluate_function"):
            # What adds a gradient up has no forward operator. It runs right after what made it.
            maker = (event.fwd_thread, event.sequence_nr)
            part = latest[event.thread] = makers.get(maker, latest[event.thread])
        else:
            part = parts.get(event.cpu_parent, "other")
        parts[event] = part
        if event.sequence_nr >= 0 and not event.fwd_thread:
            # Several operators may bear a number; the last one to begin made the graph's node.
            makers[event.thread, event.sequence_nr] = part
    return [parts[event] for event in events]


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of what spans [begin, end) cover together; in the order of their begins."""
    length, until = 0.0, float("-inf")
    for begin, end in spans:
        length += max(0.0, end - max(begin, until))
        until = max(until, end)
    return length


class Work:
    """What the recorded steps had to compute, told by the calls that they made."""

    def __init__(self, model: RRHFModel):
        self._model = model
        self._decoded: list[tuple[PackedForest | WeightedForest, list, bool]] = []
        self._num_edges = 0
        self._with_gradient: list[torch.Tensor] = []  # bool

    def note(self, name: str, args: tuple, out: object) -> None:
        """A call of a function of `_parts_of` is done. Waits for no device."""
        if name == "decode_forest":
            _, pack, forest = args
            # A copy: with activation checkpointing the backward appends to it.
            self._decoded.append((pack, list(forest.specs), torch.is_grad_enabled()))
        elif name in ("linear_rrhf_loss", "linear_logprob"):
            _, _, rows, *_ = args
            self._num_edges += len(rows)
            if name == "linear_logprob" and torch.is_grad_enabled():
                self._with_gradient.append(torch.ones_like(rows))
        elif name == "_has_gradient":
            self._with_gradient.append(out)

    def flops(self) -> dict[str, float]:
        """Floating-point operations of the matrix products of each part, a multiply-add being two.

        Counted is what the result needs: not what is computed again in the backward, nor padding
        and hidden scores; where the active part is trained alone, its scoring counts. The backward
        of a product is two of its kind, one where a weight is frozen; of a prediction without a
        gradient there is none.
        """
        decoder = attention = 0
        forward, backward = decoder_flops(self._model.lm)
        for pack, specs, has_backward in self._decoded:
            depths = pack.position_ids[_real_rows(pack)]
            decoder += len(depths) * (forward + has_backward * backward)
            # A token sees its path, which is as long as it stands deep.
            pairs = {
                window: int((depths + 1).clamp(max=window or pack.num_tokens).sum())
                for window in {spec.window for spec in specs}
            }
            attention += (1 + 2 * has_backward) * sum(
                attention_flops(spec, pairs[spec.window]) for spec in specs
            )
        weight = self._model.head.linear.weight
        active = sum(int(flags.sum()) for flags in self._with_gradient)
        products = self._num_edges + active * (1 + weight.requires_grad)
        return {
            "decoder": decoder,
            "attention": attention,
            "head": 2 * weight.numel() * products,
        }

    @property
    def num_tokens(self) -> int:
        """Tokens of the steps' packs, padding not counted, nor those that are encoded again to
        train the active part."""
        packs = (pack for pack, *_ in self._decoded if isinstance(pack, PackedForest))
        return sum(int(_real_rows(pack).sum()) for pack in packs)


def _real_rows(pack: PackedForest | WeightedForest) -> torch.Tensor:
    return kept_rows(pack, torch.ones_like(pack.edge_rows, dtype=torch.bool))


def decoder_flops(lm: PreTrainedModel) -> tuple[float, float]:
    """Of the products with the decoder's weights, one token's forward and backward."""
    looked_up = {
        id(p)
        for m in lm.base_model.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters()
    }
    per_token = getattr(lm.config.get_text_config(), "num_experts_per_tok", None)
    forward = backward = 0
    for parameter in lm.base_model.parameters():
        if parameter.dim() < 2 or id(parameter) in looked_up:
            continue
        # Matrices of experts are stacked; a token goes through a few of them.
        used = per_token / len(parameter) if parameter.dim() == 3 and per_token else 1
        forward += 2 * parameter.numel() * used
        backward += 2 * parameter.numel() * used * (1 + parameter.requires_grad)
    return forward, backward


def attention_flops(spec: AttentionSpec, pairs: int) -> int:
    """Of one layer's forward, for so many pairs of a query and a key that it sees."""
    return 2 * pairs * spec.num_heads * (spec.head_size + spec.value_size)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """That one step has to move: gradients are read for their norm and for the update; parameters
    and moments are read and written."""
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
