"""Where a step's time goes: every operator in its part, every product counted."""

import gzip
import json

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.profile_step import profile as profile_benchmark
from benchmarks.workloads import PAPER, Lengths, draw
from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.losses import linear_rrhf
from rrhf_fast.model import forest_sdpa
from rrhf_fast.model.active_rows import use_all_rows
from rrhf_fast.model.flops import Costs, attention_flops, decoder_flops
from rrhf_fast.model.lora import add_lora
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.spans import PARTS, span
from rrhf_fast.train import profile
from rrhf_fast.train.backward import backward_active, backward_whole
from rrhf_fast.train.distributed import World
from rrhf_fast.train.evaluate import Totals
from rrhf_fast.train.optimizer import build_optimizer, clipped_step, gradient_norm
from rrhf_fast.train.profile import (
    STEPS,
    StepProfiler,
    assign_parts,
    attribute,
    optimizer_bytes,
)
from rrhf_fast.train.roofline import Roofline


def small_model(config, device="cpu"):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=997, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    options = {"activation_checkpointing": config.activation_checkpointing}
    lm = LlamaForCausalLM(shape).to(device).eval()
    return RRHFModel(lm, config, max_length=256, **options)


def small_batch(model, count=4):
    queries = draw(Lengths(12, 9, 5), count, 997)
    planner = PackPlanner(queries, packing="forest", max_tokens_per_pack=100, plan=model.plan)
    return planner.batch(range(count))


@pytest.fixture
def roofline(monkeypatch):
    """One that needs no measurement."""
    found = Roofline(torch.float32, 1e12, 1e11)
    monkeypatch.setattr(profile, "measure_roofline", lambda *_: found)


def record(tmp_path, monkeypatch, model, config, compute, num_steps=2):
    """The profiler after `num_steps` steps, and its events."""
    optimizer, _ = build_optimizer(model, config, 10)
    profiler = StepProfiler(model, optimizer, num_steps=num_steps, folder=tmp_path)
    events = []
    keep = lambda found: events.extend(found) or attribute(found)  # noqa: E731
    monkeypatch.setattr(profile, "attribute", keep)
    for batch in profiler.watch(small_batch(model) for _ in range(20)):
        totals = Totals(model.device)
        compute(model, batch, config, World(model.device), totals)
        clipped_step(optimizer, gradient_norm(model).item(), 1.0)
        optimizer.zero_grad()
        profiler.add(totals)
        if profiler.breakdown is not None:
            break
    return profiler, events


FORWARD_AND_BACKWARD = {
    "attention": [
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "decoder": ["aten::embedding", "EmbeddingBackward0", "aten::silu", "aten::silu_backward"],
    "optimizer": ["aten::_fused_adamw_", "aten::_foreach_norm"],
}
HEAD = {
    backward_whole: ["_LinearRRHF", "_LinearRRHFBackward"],
    backward_active: ["ChunkedLinearLogprob", "ChunkedLinearLogprobBackward"],
}


@pytest.mark.parametrize("compute", [backward_whole, backward_active])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_operators_belong_to_their_part(tmp_path, monkeypatch, roofline, compute, checkpointing):
    config = TrainConfig(activation_checkpointing=checkpointing, max_tokens_per_pack=100)
    profiler, events = record(tmp_path, monkeypatch, small_model(config), config, compute)
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    parts = {}
    for event, part in zip(events, assign_parts(events), strict=True):
        parts.setdefault(event.name, set()).add(part)
    for part, names in (FORWARD_AND_BACKWARD | {"head": HEAD[compute]}).items():
        for name in names:
            assert parts[name] == {part}, name
    # Sums of gradients, too; in the active way, those of the edges' log-probs.
    engine = "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"
    assert parts[engine] <= {"decoder", "head", "loss"}

    breakdown = profiler.breakdown
    assert sum(breakdown.seconds.values()) == pytest.approx(breakdown.total, rel=0.03)
    assert all(breakdown.seconds[part] > 0 for part in PARTS)
    assert breakdown.seconds["other"] < breakdown.total / 4
    assert 0 < breakdown.utilisation < 1


def test_ranges_exist_only_while_a_profiler_runs(tmp_path, monkeypatch):
    """Also after a recorded step that failed."""
    config = TrainConfig()
    model = small_model(config)

    def has_range():
        with span("data") as found:
            return found is not None

    def compute(*args):
        seen.append(has_range())
        if len(seen) > 3:
            raise RuntimeError
        backward_whole(*args)

    seen = []
    with pytest.raises(RuntimeError):
        record(tmp_path, monkeypatch, model, config, compute)
    assert seen == [False] * 3 + [True]
    assert not has_range()


@pytest.mark.parametrize("compute", [backward_whole, backward_active])
def test_flops_are_those_that_pytorch_counts(monkeypatch, compute):
    """All products but attention's, whose padding and hidden scores PyTorch counts."""
    config = TrainConfig(max_tokens_per_pack=100)
    model = small_model(config)
    use_all_rows(model.lm)  # the count is that of the formula, and skipping rows needs less
    batch, totals = small_batch(model), Totals()
    # A counter does not look into an operator.
    monkeypatch.setattr(linear_rrhf, "linear_rrhf_op", linear_rrhf.linear_rrhf_op._init_fn)

    def addmm_flops(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: addmm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with sdpa_kernel(SDPBackend.MATH), counter:
        compute(model, batch, config, World(torch.device("cpu")), totals)
    counts = counter.get_flop_counts()["Global"]
    attention = counts.pop(torch.ops.aten.bmm)
    found = totals.flops
    expected = found.decoder + found.head
    if compute is backward_active:  # which makes the logits a second time
        product = 2 * model.head.linear.weight.numel()
        num_edges = sum(len(pack.edge_rows) for pack in batch.packs)
        # Scored all, then forward and two products of the backward for those with a gradient.
        with_gradient, rest = divmod(found.head / product - num_edges, 3)
        assert with_gradient > 0 and rest == 0
        expected += product * with_gradient
    assert sum(counts.values()) == expected
    assert 0 < found.attention < attention


def test_attention_is_counted_by_what_is_seen(monkeypatch):
    config = TrainConfig()
    model = small_model(config)
    pack = small_batch(model, 1).packs[0]
    (spec,) = set(model.attention_specs)
    # A layer's attention alone: some versions of RoPE are batched products, too.
    q, k, v = (
        torch.randn(1, heads, pack.num_tokens, size, requires_grad=True)
        for heads, size in (
            (spec.num_heads, spec.head_size),
            (spec.num_kv_heads, spec.head_size),
            (spec.num_kv_heads, spec.value_size),
        )
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forest_sdpa.attend(q, k, v, pack.plan).sum().backward()
    padded = sum(
        len(b.query_depths) * b.query_depths.shape[1] * b.num_keys for b in pack.plan.buckets
    )
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert counted == 3 * attention_flops(spec, padded)
    rows = torch.arange(pack.num_tokens)
    seen = (rows <= rows[:, None]) & (rows[:, None] < pack.subtree_end)
    # A model that cannot run yet knows what its first layers ask for.
    assert Costs.of(model.lm, model.attention_specs[:1], model.head) == model.costs
    found = model.costs.of_pack(pack, 0).attention
    assert found == 2 * 3 * attention_flops(spec, int(seen.sum()))


def test_frozen_weights_have_no_gradient_to_compute():
    lm = small_model(TrainConfig()).lm
    forward, back = decoder_flops(lm)
    assert back == 2 * forward
    add_lora(lm, TrainConfig(lora_r=1))
    adapted = decoder_flops(lm)
    added = adapted[0] - forward
    assert 0 < added < forward / 4 and adapted[1] == forward + 2 * added


def test_optimizer_bytes():
    config = TrainConfig()
    model = small_model(config)
    optimizer, _ = build_optimizer(model, config, 1)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    # Two reads of the gradient; parameter and two moments, read and written.
    assert optimizer_bytes(optimizer) == 32 * sum(p.numel() for p in model.parameters())


def test_device_time():
    """Parts get their kernels' time; a collective counts only where no other kernel hides it."""

    def event(id, name, start, end, device=DeviceType.CPU, sequence=-1, forward=0, kernels=()):
        made = FunctionEvent(
            id=id, name=name, thread=2 if forward else 1, start_us=start * 1e6, end_us=end * 1e6,
            sequence_nr=sequence, fwd_thread=forward, device_type=device, use_device="cuda",
        )  # fmt: skip
        for kernel, seconds in kernels:
            made.append_kernel(kernel, 0, seconds * 1e6)
        return made

    backward = "autograd::engine::evaluate_function: "
    events = EventList(
        [
            event(1, STEPS, 0, 20),
            event(2, "decoder", 1, 3),
            event(3, "aten::mm", 1.5, 2, sequence=7, kernels=[("gemm", 3)]),
            event(4, "attention", 2.1, 2.5),
            event(5, "flash", 2.2, 2.3, sequence=8, kernels=[("flash_fwd", 2)]),
            event(6, backward + "Flash", 4, 5, sequence=8, forward=1),
            event(7, "flash_backward", 4.1, 4.5, forward=1, kernels=[("flash_bwd", 4)]),
            event(8, backward + "Mm", 5, 6, sequence=7, forward=1, kernels=[("gemm", 1)]),
            event(9, "FSDP::reduce", 6, 7, kernels=[("ncclReduce", 6)]),
            event(15, "FSDP::copy_out", 7, 8, kernels=[("copy", 1)]),
            event(10, "gemm", 2, 5, DeviceType.CUDA),
            event(11, "flash_fwd", 5, 7, DeviceType.CUDA),
            event(12, "flash_bwd", 8, 12, DeviceType.CUDA),
            event(13, "ncclReduce", 10, 16, DeviceType.CUDA),
            event(14, "gemm", 12, 13, DeviceType.CUDA),
            event(16, "copy", 16, 17, DeviceType.CUDA),
        ],
        use_device="cuda",
    )
    events._build_tree()
    total, seconds = attribute(events)
    assert total == pytest.approx(20)
    expected = {"decoder": 4, "attention": 6, "communication": 4, "idle": 6}
    assert {part: spent for part, spent in seconds.items() if spent} == pytest.approx(expected)


def run(folder, **options):
    return train(
        TrainConfig(
            model_name_or_path=str(demo.MODEL_DIR), train_data=str(demo.TRAIN_FILE),
            train_batch_size=4, learning_rate=1e-3, output_dir=str(folder), **options,
        )
    )  # fmt: skip


def test_a_profiled_run_is_the_same_run(tmp_path, roofline):
    plain = run(tmp_path / "plain", max_steps=6)
    profiled = run(tmp_path / "profiled", max_steps=6, profile_steps=2)
    speeds = {"tokens_per_second"}
    for one, other in zip(plain.metrics, profiled.metrics, strict=True):
        assert {k: v for k, v in one.items() if k not in speeds} == {
            k: v for k, v in other.items() if k not in speeds
        }
    folder = tmp_path / "profiled" / "profile"
    assert (folder / "breakdown.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "breakdown.md").read_text()
    assert "mean of 2 recorded steps" in page
    assert all(f"| {part} |" in page for part in PARTS)
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {STEPS, *PARTS} <= names


def test_runs_that_cannot_be_profiled(tmp_path):
    with pytest.raises(ValueError, match="profile_steps: .* more than 3 steps, found 3"):
        run(tmp_path, max_steps=3, profile_steps=1)
    with pytest.raises(ValueError, match="profile_steps: works on forests only"):
        run(tmp_path, packing="none", profile_steps=1)


def test_the_benchmark_profiles_whole_steps(tmp_path):
    breakdown = profile_benchmark(preset="smoke", device="cpu", out=tmp_path, num_queries=1)
    assert breakdown.num_tokens == PAPER.prompt + PAPER.k * (PAPER.response - 1)
    assert all(breakdown.seconds[part] > 0 for part in PARTS)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    config = TrainConfig()
    model = small_model(config, device="cuda")
    profiler, _ = record(tmp_path, monkeypatch, model, config, backward_whole)
    seconds = profiler.breakdown.seconds
    assert sum(seconds.values()) == pytest.approx(profiler.breakdown.total, rel=0.03)
    assert all(seconds[part] > 0 for part in ("decoder", "attention", "head", "optimizer", "idle"))
