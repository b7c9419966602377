"""Estimate what a run takes on 1 to 1,024 GPUs, for `--dry_run`: arithmetic on the model's shapes,
the lengths of rows, and a GPU with its network.

The packs of some steps are dealt as training would deal them, for each number of GPUs. All ranks
take part in the transfers of each pack, so a pack takes as long as the largest that runs at the
same time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from rrhf_fast.data.load import load_rows
from rrhf_fast.data.packs import PackPlanner, steps_per_epoch
from rrhf_fast.data.sources import InMemory, read_records
from rrhf_fast.data.tokenise import TokenisedQuery, tokenise_rows
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.decoder import attention, load_tokenizer, max_positions
from rrhf_fast.model.flops import Costs
from rrhf_fast.model.layers import decoder_layers
from rrhf_fast.model.lora import add_lora
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.memory import (
    activation_line,
    estimate,
    fitting_tokens,
    gpu_counts,
    parameter_counts,
)
from rrhf_fast.train.roofline import product_speed

# Rows to read lengths from, queries to deal at once, and steps to deal, at most.
SAMPLE, DEALT, STEPS = 1000, 2048, 8
# Seconds of the host per layer and pack: packs of 2,048 tokens of a model of 16 layers take 95 ms
# however fast the GPU is (docs/speed.md).
HOST = 0.095 / 16
# AdamW and the gradient's norm read and write this many bytes per trained parameter.
OPTIMIZER_BYTES = 40
_FLOAT32 = 67 / 989  # of the speed in bfloat16, by the data sheet


@dataclass(frozen=True)
class Machine:
    """A GPU and its network: an H100 SXM in machines of 8. Sources are in docs/scale.md."""

    tflops: float = 783  # per second in a large bfloat16 product; 989 in the data sheet
    mfu: float = 0.62  # share of these that training reaches
    memory_gib: float = 80
    memory_gb_per_second: float = 3350
    gpus_per_node: float = 8
    nvlink_gb_per_second: float = 450  # each way
    network_gb_per_second: float = 50  # of each GPU, to other machines
    hop_microseconds: float = 5  # from one GPU to the next in a collective

    @classmethod
    def of(cls, options: dict[str, float]) -> "Machine":
        """The GPU of this process, if there is one, else an H100; with these values instead. Raises
        ValueError for others than numbers above 0 by these names."""
        names = [field.name for field in fields(cls)]
        for name, value in options.items():
            if name not in names or type(value) not in (int, float) or not 0 < value < 1e9:
                expected = f"numbers above 0 by the names {', '.join(names)}"
                raise ValueError(f"dry_run_machine: expected {expected}, found {name}: {value!r}")
        found = {}
        if torch.cuda.is_available():
            device = torch.device("cuda")
            found = {
                "tflops": product_speed(device, torch.bfloat16, seconds=0.2) / 1e12,
                "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
            }
        return cls(**found | options)

    def collective(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds to gather this much on all of these GPUs, or to reduce and scatter it. It passes
        all GPUs of a machine in turn, and enters each machine once, over the network of all its
        GPUs."""
        nodes = -(-num_gpus // self.gpus_per_node)
        inside = num_bytes * (1 - 1 / num_gpus) / (self.nvlink_gb_per_second * 1e9)
        network = min(num_gpus, self.gpus_per_node) * self.network_gb_per_second * 1e9
        between = num_bytes * (1 - 1 / nodes) / network
        return max(inside, between) + (num_gpus - 1) * self.hop_microseconds * 1e-6


@dataclass(frozen=True)
class Sample:
    """Queries to know lengths from; they stand for all `num_queries` (None: unknown)."""

    queries: Sequence[TokenisedQuery]
    num_queries: int | None

    def batch(self, config: TrainConfig) -> int:
        """Queries per optimizer step."""
        return min(config.train_batch_size, self.num_queries or config.train_batch_size)


@dataclass(frozen=True)
class Shapes:
    """What is known of a model on the meta device."""

    lm: PreTrainedModel
    dtype: torch.dtype  # of the decoder's arithmetic
    activations: Callable[[int], float]  # bytes of a pack of this many tokens
    costs: Costs

    @classmethod
    def of(cls, lm: PreTrainedModel, config: TrainConfig) -> "Shapes":
        """Raises ValueError for a model whose shapes depend on its data."""
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        activations = activation_line(lm, config, dtype)
        head = SimpleNamespace(linear=lm.get_output_embeddings())
        return cls(lm, dtype, activations, Costs.of(lm, _attention_specs(lm), head))


@dataclass(frozen=True)
class Cost:
    """One optimizer step on a number of GPUs, on average."""

    num_gpus: int
    on_gpus: float  # seconds
    on_host: float  # seconds to deal and build its packs, beside those on GPUs
    busy: float  # share of all GPUs' time that is spent on tokens of the batch
    limit: str  # what the time is spent on
    num_tokens: float
    memory: float  # bytes per GPU
    full_batch: int  # queries that fill a pack on each GPU

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.on_gpus, self.on_host)


def cost_table(config: TrainConfig, sample: Sample | None = None) -> str:
    """The estimate for a config on 1 to 1,024 GPUs, with `sample` or a sample of its train_data.
    Raises the ValueErrors of loading and reading."""
    machine = Machine.of(config.dry_run_machine)
    lm = empty_model(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    sample = sample or read_sample(config, lm)
    if config.use_peft:
        add_lora(lm, config)
    shapes = Shapes.of(lm, config)
    costs = [cost(shapes, config, sample, machine, num_gpus) for num_gpus in gpu_counts(config)]
    batch, queries = sample.batch(config), sample.queries
    per_epoch = sample.num_queries and steps_per_epoch(sample.num_queries, batch)
    run = config.max_steps or (per_epoch and max(1, round(config.num_train_epochs * per_epoch)))
    prompt = np.mean([len(query.prompt_ids) for query in queries])
    response = np.mean([len(ids) for query in queries for ids in query.response_ids])
    k = np.mean([len(query.response_ids) for query in queries])
    count = "no train_data" if sample.num_queries is None else f"{sample.num_queries:,} queries"
    lines = [
        f"Time: {count}, prompts of {prompt:,.0f} tokens, {k:.1f} responses of {response:,.0f}; "
        f"{batch:,} queries per step",
        f"{'GPUs':>5}{'s/step':>10}{'queries/s':>11}{'tokens/s':>12}{'busy':>6}{'limit':>9}"
        f"{'h/epoch':>9}{'h/run':>9}{'GiB/GPU':>9}{'full batch':>12}",
    ]
    for row in costs:
        epoch, whole = (_hours(steps, row.seconds) for steps in (per_epoch, run))
        full = "*" if row.memory > machine.memory_gib * 2**30 else " "
        lines.append(
            f"{row.num_gpus:>5,}{row.seconds:>10.3f}{batch / row.seconds:>11,.1f}"
            f"{row.num_tokens / row.seconds:>12,.0f}{row.busy:>6.0%}{row.limit:>9}"
            f"{epoch:>9}{whole:>9}{row.memory / 2**30:>8.1f}{full}{row.full_batch:>12,}"
        )
    if any(row.memory > machine.memory_gib * 2**30 for row in costs):
        lines.append(f"* does not fit {machine.memory_gib:g} GiB")
    if config.cpu_offload:
        lines.append("cpu_offload: the times are those without it; it makes steps longer")
    return "\n".join([*lines, *_assumptions(machine, config)])


def _hours(steps: int | None, seconds: float) -> str:
    hours = (steps or 0) * seconds / 3600
    return "-" if steps is None else f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def _assumptions(machine: Machine, config: TrainConfig) -> list[str]:
    slower = [name for name in ("use_dora", "load_in_4bit") if getattr(config, name)]
    not_counted = [f"Not counted: the work that {' and '.join(slower)} adds."] if slower else []
    return [
        *not_counted,
        f"Assumed: {machine.tflops:g} TFLOP/s in large products, {machine.mfu:.0%} of them reached "
        f"(as measured with Llama-3.2-1B on one H200) and {HOST * 1e3:.1f} ms of the host per "
        "layer and pack; every token has a gradient.",
        f"NVLink {machine.nvlink_gb_per_second:g} GB/s, network {machine.network_gb_per_second:g} "
        f"GB/s per GPU, {machine.gpus_per_node:g} GPUs per machine; transfers run beside the "
        "compute but for the first and last of a pack. No run on several GPUs has been measured.",
        "busy: share of GPU time spent on the batch; the rest: unequal packs, ranks without one, "
        "transfers. full batch: a --train_batch_size that fills a pack on each GPU.",
    ]


def read_sample(config: TrainConfig, lm: PreTrainedModel) -> Sample:
    """The first 1,000 rows of train_data in tokens, and a count of all. Without train_data, a query
    of 4 responses; prompt and response take half of max_length each."""
    max_length = min(config.max_length, max_positions(lm) or config.max_length)
    if config.train_data is None:
        half = max_length // 2
        responses = [np.full(half, i, dtype=np.int32) for i in range(4)]
        prompt = np.zeros(max_length - half, dtype=np.int32)
        return Sample([TokenisedQuery(prompt, responses, np.zeros(4, np.float32))], None)
    sources = config.train_data if isinstance(config.train_data, list) else [config.train_data]
    records = (record for source in sources for _, record in read_records(source))
    first = list(islice(records, SAMPLE))
    rows, report = load_rows(
        InMemory("train_data", first),
        use_responses=config.use_responses,
        stop_strings=config.stop_strings,
        **config.reading(),
    )
    queries, _ = tokenise_rows(
        rows,
        load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code),
        report,
        max_length=max_length,
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
        chat_template_kwargs=config.chat_template_kwargs,
        on_bad_rows=config.on_bad_rows,
    )
    count = len(first) + sum(1 for _ in records)
    share = (1 - config.eval_fraction) * len(queries) / len(first)
    return Sample(queries, max(1, round(count * share)))


def cost(
    shapes: Shapes, config: TrainConfig, sample: Sample, machine: Machine, num_gpus: int
) -> Cost:
    """The cost of a step on this many GPUs."""
    lm, dtype, activations = shapes.lm, shapes.dtype, shapes.activations
    shards = _shards(config, num_gpus)
    tokens = config.max_tokens_per_pack
    if tokens == "auto":
        room = machine.memory_gib * 2**30
        tokens = fitting_tokens(lm, config, dtype, shards, activations, memory=room)
    planner = PackPlanner(sample.queries, packing=config.packing, max_tokens_per_pack=tokens)
    work = Work(shapes.costs, planner, config.activation_checkpointing == "full")
    transfers = Transfers.of(lm, config, machine, dtype, shards, num_gpus // shards)
    speed = machine.tflops * 1e12 * machine.mfu * (1 if dtype == torch.bfloat16 else _FLOAT32)
    host = HOST * len(decoder_layers(lm))

    # Of a large batch a part is dealt, to a part of the ranks.
    thinned = -(-sample.batch(config) // DEALT)
    ranks = max(1, num_gpus // thinned)
    batches = _batches(config, sample, thinned)
    rounds, dealing, building = _dealt(planner, batches, ranks)
    seconds = np.array([[work.flops(pack) / speed for pack in packs] for packs in rounds])
    is_real = np.array([[len(pack) > 0 for pack in packs] for packs in rounds])
    longest = seconds.max(axis=1)
    hidden = max(host, transfers.per_pack - transfers.exposed)
    waited = np.maximum(longest, hidden) + transfers.exposed
    per_step = thinned / len(batches)  # from what was dealt to a step
    on_gpus = waited.sum() * per_step * ranks / num_gpus + transfers.per_step
    on_host = thinned * (dealing + building * ranks / num_gpus)
    limits = {"compute": longest.mean(), "host": host, "network": transfers.per_pack}
    limit = "batch" if is_real.mean() < 0.75 else max(limits, key=limits.get)
    return Cost(
        num_gpus,
        on_gpus=on_gpus,
        on_host=on_host,
        busy=seconds[is_real].sum() * per_step / (num_gpus * max(on_gpus, on_host)),
        limit="data" if on_host > on_gpus else limit,
        num_tokens=sum(map(planner.num_tokens, chain(*rounds))) * per_step,
        memory=sum(astuple(estimate(lm, config, dtype, shards, activations(tokens)))),
        full_batch=num_gpus * max(1, int(tokens / np.mean(planner.sizes))),
    )


def _dealt(
    planner: PackPlanner, batches: list[list[int]], ranks: int
) -> tuple[list[Sequence[list[int]]], float, float]:
    """The packs of these batches that run at the same time, one per rank; and the seconds in which
    the first rank deals a batch, and in which it builds its own packs, medians."""
    rounds, seconds = [], []
    for query_ids in batches:
        started = time.perf_counter()
        packs = planner.deal(query_ids, ranks)
        dealt = time.perf_counter()
        rounds += zip(*packs, strict=True)
        for pack in packs[0]:
            planner.build(pack)
        seconds.append((dealt - started, time.perf_counter() - dealt))
    dealing, building = np.median(seconds, axis=0).tolist()
    return rounds, dealing, building


def _shards(config: TrainConfig, num_gpus: int) -> int:
    """Ranks that share one copy of the weights."""
    shards = config.data_parallel_shard or num_gpus // config.data_parallel_replicate
    return max(1, min(shards, num_gpus))


def _batches(config: TrainConfig, sample: Sample, thinned: int) -> list[list[int]]:
    """The query numbers of some steps; a small sample is gone through repeatedly."""
    size, count = -(-sample.batch(config) // thinned), len(sample.queries)
    steps = max(1, min(STEPS, DEALT // size, config.max_steps or STEPS))
    generator = np.random.default_rng(config.seed)
    passes = -(-steps * size // count)
    order = np.concatenate([generator.permutation(count) for _ in range(passes)]).tolist()
    return [order[i * size : (i + 1) * size] for i in range(steps)]


@dataclass(frozen=True)
class Work:
    """Floating-point operations of packs."""

    costs: Costs
    planner: PackPlanner
    recomputes: bool

    def flops(self, query_ids: Sequence[int]) -> float:
        """Operations of a pack, forward and backward; those of a filler's query if it is empty."""
        if not len(query_ids):
            query_ids = [int(np.argmin(self.planner.sizes))]
        costs, again = self.costs, int(self.recomputes)
        per_token = costs.decoder_forward * (1 + again) + costs.decoder_backward
        products = 1 + costs.head_products_back
        queries = [self.planner.queries[i] for i in query_ids]
        predictions = sum(len(ids) for query in queries for ids in query.response_ids)
        return (
            per_token * self.planner.num_tokens(query_ids)
            + (3 + again) * sum(map(self._attention, queries))
            + products * costs.head_product * predictions
        )

    def _attention(self, query: TokenisedQuery) -> float:
        """Operations of attention's forward: a token sees its prompt and what is before it."""
        total, prompt, is_forest = 0.0, len(query.prompt_ids), self.planner.packing == "forest"
        for window, per_pair in self.costs.attention.items():
            shared = is_forest * _pairs(prompt, window)
            of_rows = (_pairs(prompt + len(ids) - 1, window) for ids in query.response_ids)
            total += per_pair * (shared + sum(pairs - shared for pairs in of_rows))
        return total


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, in a sequence of this length."""
    whole = min(length, window or length)
    return whole * (whole + 1) // 2 + (length - whole) * whole


def _attention_specs(lm: PreTrainedModel) -> list[AttentionSpec]:
    """What the layers request of their attention; `lm` is on the meta device."""
    _specs.clear()
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    with attention(lm, "rrhf_specs"), torch.no_grad():
        lm.base_model(input_ids=ids, position_ids=torch.arange(8, device="meta")[None])
    return list(_specs)


_specs: list[AttentionSpec] = []


def _note_spec(module, query, key, value, attention_mask=None, sliding_window=None, **_):
    sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    _specs.append(AttentionSpec(*sizes, window=sliding_window))
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return out, None


AttentionInterface.register("rrhf_specs", _note_spec)


@dataclass(frozen=True)
class Transfers:
    """Seconds of communication."""

    per_pack: float
    exposed: float  # of these, while no GPU can compute
    per_step: float  # at the end, with the optimizer's passes over its state

    @classmethod
    def of(
        cls,
        lm: PreTrainedModel,
        config: TrainConfig,
        machine: Machine,
        dtype: torch.dtype,
        shards: int,
        replicas: int,
    ) -> "Transfers":
        """FSDP2 gathers each layer in `dtype` for forward and again for backward, and scatters its
        gradient in float32; what is outside layers is gathered once per pack. Without
        reshard_after_forward all of this happens once per step. Copies of the weights sum their
        shards of the gradient once per step."""
        layers = [parameter_counts(layer) for layer in decoder_layers(lm)]
        every, trained = parameter_counts(lm)
        rest = every - sum(a for a, _ in layers), trained - sum(t for _, t in layers)

        def gather(count: int) -> float:
            return machine.collective(dtype.itemsize * count, shards) if shards > 1 else 0

        def scatter(count: int) -> float:
            return machine.collective(4 * count, shards) if shards > 1 and count else 0

        times = 2 if config.reshard_after_forward else 1
        pack = sum(times * gather(a) + scatter(t) for a, t in layers)
        pack += gather(rest[0]) + scatter(rest[1])
        exposed = gather(rest[0]) + gather(layers[0][0]) + scatter(layers[0][1])
        step = OPTIMIZER_BYTES * trained / shards / (machine.memory_gb_per_second * 1e9)
        if replicas > 1:
            speed = machine.network_gb_per_second
            if shards * replicas <= machine.gpus_per_node:
                speed = machine.nvlink_gb_per_second
            step += 2 * 4 * trained / shards * (1 - 1 / replicas) / (speed * 1e9)
            step += 2 * (replicas - 1) * machine.hop_microseconds * 1e-6
        if not config.reshard_after_forward:
            return cls(per_pack=0, exposed=0, per_step=step + pack)
        return cls(per_pack=pack, exposed=exposed, per_step=step)
