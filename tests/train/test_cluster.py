"""The estimate of time on 1 to 1,024 GPUs: hand-computed examples, and the packs of training."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rrhf_fast import TrainConfig, demo
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.train import cluster
from rrhf_fast.train.__main__ import main
from rrhf_fast.train.cluster import (
    Machine,
    Sample,
    Shapes,
    Transfers,
    Work,
    cost,
    cost_table,
    read_sample,
)
from rrhf_fast.train.memory import NUM_GPUS

MODEL = str(demo.MODEL_DIR)
# Round numbers: 1 TFLOP/s, 1 GB/s, no latency.
PLAIN = Machine(
    tflops=1, mfu=1, memory_gb_per_second=1, nvlink_gb_per_second=1, network_gb_per_second=1,
    hop_microseconds=1e-9,
)  # fmt: skip


def query(prompt, *responses):
    """A query of these lengths, whose responses have no token in common."""
    ids = [np.full(length, i, dtype=np.int32) for i, length in enumerate(responses)]
    return TokenisedQuery(np.zeros(prompt, dtype=np.int32), ids, np.arange(len(ids), dtype=float))


def tiny(kind=LlamaForCausalLM, config=LlamaConfig, **options):
    with torch.device("meta"):
        return kind(
            config(
                vocab_size=10, hidden_size=8, intermediate_size=6, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, **options,
            )
        )  # fmt: skip


def work_of(lm, queries, config=None, **options):
    config = config or TrainConfig()
    planner = PackPlanner(queries, packing=config.packing, max_tokens_per_pack=100)
    return Work(Shapes.of(lm, config).costs, planner, **{"recomputes": False} | options)


# Weights of a layer: queries and output 2 x 8 x 8, keys and values 2 x 8 x 4, MLP 3 x 8 x 6.
LAYER = 2 * 64 + 2 * 32 + 3 * 48


def test_operations_of_a_pack_by_hand():
    queries = [query(3, 2, 4), query(1, 1)]
    tokens, predictions = 3 + 1 + 3, 2 + 4
    # The prompt's tokens see 1, 2, 3; those of the responses 4; and 4, 5, 6.
    pairs = 6 + 4 + 15
    decoder = 2 * 3 * 2 * LAYER * tokens  # 2 layers; forward and twice as much back; multiply, add
    attention = 2 * 3 * 2 * 2 * (4 + 4) * pairs  # 2 heads of size 4, keys and values
    head = 2 * 3 * 8 * 10 * predictions
    work = work_of(tiny(), queries)
    assert work.flops([0]) == decoder + attention + head
    # Packs add up, and an empty one is the smallest query.
    assert work.flops([0, 1]) == work.flops([0]) + work.flops([1])
    assert work.flops([]) == work.flops([1])
    again = work_of(tiny(), queries, recomputes=True)
    assert again.flops([0]) == decoder * 4 / 3 + attention * 4 / 3 + head


def test_padded_rows_are_computed_whole():
    work = work_of(tiny(), [query(3, 2, 4)], TrainConfig(packing="none"))
    pairs = 10 + 21  # of rows of 4 and 6 tokens
    decoder, head = 2 * 3 * 2 * LAYER * 2 * 6, 2 * 3 * 8 * 10 * (2 + 4)
    assert work.flops([0]) == decoder + 2 * 3 * 2 * 2 * (4 + 4) * pairs + head


def test_a_window_bounds_what_tokens_see():
    lm = tiny(MistralForCausalLM, MistralConfig, sliding_window=2)
    whole, windowed = (work_of(model, [query(3, 4)]) for model in (tiny(), lm))
    # 1 + 2 + 3 + 4 + 5 + 6 pairs, or 1 + 2 + 2 + 2 + 2 + 2.
    assert whole.flops([0]) - windowed.flops([0]) == 2 * 3 * 2 * 2 * (4 + 4) * (21 - 11)


def test_collectives_by_hand():
    machine = Machine(gpus_per_node=8, nvlink_gb_per_second=100, network_gb_per_second=10)
    hop = machine.hop_microseconds * 1e-6
    assert machine.collective(8e9, 8) == pytest.approx(7 / 100 + 7 * hop)
    # Half of it enters each of 2 machines, over 8 x 10 GB/s; on 4 machines three quarters.
    assert machine.collective(8e9, 16) == pytest.approx(max(7.5 / 100, 4 / 80) + 15 * hop)
    slow = replace(machine, network_gb_per_second=1)
    assert slow.collective(8e9, 32) == pytest.approx(6 / 8 + 31 * hop)


@given(st.floats(1, 1e12), st.integers(0, 9))
def test_collectives_take_longer_with_more_bytes_and_more_gpus(num_bytes, power):
    machine, num_gpus = Machine(), 2**power
    seconds = machine.collective(num_bytes, num_gpus)
    assert machine.collective(2 * num_bytes, num_gpus) >= seconds
    assert machine.collective(num_bytes, 2 * num_gpus) >= seconds


def transfers(config=None, *, shards, replicas=1):
    config = config or TrainConfig()
    return Transfers.of(tiny(), config, PLAIN, torch.bfloat16, shards, replicas)


def test_transfers_by_hand():
    layer = LAYER + 2 * 8  # with norms
    rest = 2 * 80 + 8  # embeddings, head and norm
    once = 0.75e-9  # of a byte to 4 GPUs
    moved = transfers(shards=4)
    # bfloat16 for forward and backward, gradients in float32.
    assert moved.per_pack == pytest.approx((2 * layer * (2 * 2 + 4) + rest * (2 + 4)) * once)
    assert moved.exposed == pytest.approx((2 * (rest + layer) + 4 * layer) * once)
    assert moved.per_step == pytest.approx(40 * (2 * layer + rest) / 4 * 1e-9)
    kept = transfers(TrainConfig(reshard_after_forward=False), shards=4)
    gathered = (2 * layer + rest) * (2 + 4) * once
    assert kept.per_pack == 0 and kept.per_step == pytest.approx(moved.per_step + gathered)
    copies = transfers(shards=4, replicas=2)
    summed = 2 * 4 * (2 * layer + rest) / 4 / 2 * 1e-9
    assert copies.per_step == pytest.approx(moved.per_step + summed)
    assert transfers(shards=1).per_pack == 0


def costs(queries, num_gpus, machine=PLAIN, **options):
    options = {"max_tokens_per_pack": 20, "train_batch_size": 8} | options
    config, lm = TrainConfig(**options), tiny()
    return cost(Shapes.of(lm, config), config, Sample(queries, None), machine, num_gpus)


def test_a_step_by_hand(monkeypatch):
    monkeypatch.setattr(cluster, "HOST", 0)
    queries = [query(4, 4, 4)] * 8  # 10 tokens each, two a pack
    one = work_of(tiny(), queries).flops([0])
    state = 40 * (2 * (LAYER + 16) + 168) * 1e-9
    alone = costs(queries, 1)
    assert alone.on_gpus == pytest.approx(8 * one / 1e12 + state)
    assert alone.num_tokens == 80 and alone.full_batch == 2
    fast = replace(PLAIN, nvlink_gb_per_second=1e9)
    on_four = costs(queries, 4, fast)
    assert on_four.on_gpus == pytest.approx(2 * one / 1e12 + state / 4, rel=1e-3)
    assert on_four.full_batch == 8
    # Half of 16 GPUs have no query: their fillers take as long.
    on_16 = costs(queries, 16, replace(fast, gpus_per_node=16))
    assert on_16.on_gpus == pytest.approx(one / 1e12 + state / 16, rel=1e-3)
    assert on_16.limit in ("batch", "data")  # the latter is measured
    # All wait for the largest pack.
    uneven = [query(16, 4, 4), query(4, 4, 4)]
    largest = work_of(tiny(), uneven).flops([0])
    on_two = costs(uneven, 2, fast, train_batch_size=2)
    assert on_two.on_gpus == pytest.approx(largest / 1e12 + state / 2, rel=1e-3)
    share = (largest + one) / (2 * largest)
    assert on_two.busy == pytest.approx(
        share * largest / 1e12 / max(on_two.on_gpus, on_two.on_host), rel=1e-3
    )
    monkeypatch.setattr(cluster, "HOST", 1)
    assert costs(queries, 2).on_gpus == pytest.approx(2 * 2 * 1, rel=1e-2)  # packs, layers
    assert costs(queries, 2, replace(PLAIN, hop_microseconds=1e6)).limit == "network"
    idle = costs(queries, 16, replace(PLAIN, hop_microseconds=1e6))
    assert idle.limit == "batch" and idle.busy < 1e-3


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)), min_size=1),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 12),
)
def test_packs_are_those_that_training_deals(lengths, num_gpus, batch):
    queries = [query(*of_query) for of_query in lengths]
    config = TrainConfig(max_tokens_per_pack=40, train_batch_size=batch, max_steps=1)
    lm, sample = tiny(), Sample(queries, 100)
    fast = replace(PLAIN, nvlink_gb_per_second=1e9, memory_gb_per_second=1e9)
    found = cost(Shapes.of(lm, config), config, sample, fast, num_gpus)
    planner = PackPlanner(queries, packing="forest", max_tokens_per_pack=40)
    (ids,) = cluster._batches(config, sample, 1)
    assert len(ids) == batch
    ranks = planner.deal(ids, num_gpus)
    assert found.num_tokens == sum(planner.num_tokens(pack) for rank in ranks for pack in rank)
    host = len(ranks[0]) * 2 * cluster.HOST  # which is slower than such packs
    assert found.on_gpus == pytest.approx(host, rel=1e-3)


def test_a_step_has_at_most_all_queries():
    config = TrainConfig(train_batch_size=64)
    sample = Sample([query(3, 2, 2)] * 5, 10)
    assert sample.batch(config) == 10 and replace(sample, num_queries=None).batch(config) == 64
    assert [len(batch) for batch in cluster._batches(config, sample, 1)] == [10] * 8


def test_a_part_of_a_large_batch_stands_for_all(monkeypatch):
    queries = [query(i % 7 + 1, 4, 4) for i in range(64)]
    options = {"train_batch_size": 64, "max_tokens_per_pack": 64, "max_steps": 1}
    whole = [costs(queries, num_gpus, **options) for num_gpus in (1, 2, 16)]
    monkeypatch.setattr(cluster, "DEALT", 16)
    for one, part in zip(whole, (costs(queries, n, **options) for n in (1, 2, 16)), strict=True):
        assert part.num_tokens == pytest.approx(one.num_tokens, rel=0.2)
        assert part.on_gpus == pytest.approx(one.on_gpus, rel=0.5)
        assert part.limit == one.limit or {part.limit, one.limit} <= {"host", "network", "data"}


@pytest.mark.parametrize("options", [{}, {"use_peft": True}, {"data_parallel_replicate": 4}])
def test_more_gpus_never_take_more_memory_or_more_time_for_compute(options):
    config, lm = TrainConfig(train_batch_size=4096, max_steps=1, **options), empty_model(MODEL)
    if config.use_peft:
        cluster.add_lora(lm, config)
    shapes = Shapes.of(lm, config)
    machine = Machine(nvlink_gb_per_second=1e8, network_gb_per_second=1e8, hop_microseconds=1e-6)
    sample = Sample([query(i % 50 + 30, 40, 40) for i in range(100)], 10**6)
    rows = [cost(shapes, config, sample, machine, n) for n in (2, 4, 8, 16, 32, 64)]
    for fewer, more in pairwise(rows):
        assert more.memory <= fewer.memory
        assert more.on_gpus <= fewer.on_gpus * 1.001
        assert 0 <= more.busy <= 1


def test_the_sample_is_bounded_and_all_rows_are_counted(monkeypatch):
    config = TrainConfig(model_name_or_path=MODEL, train_data=str(demo.TRAIN_FILE))
    every = read_sample(config, empty_model(MODEL))
    assert len(every.queries) == every.num_queries == 448
    monkeypatch.setattr(cluster, "SAMPLE", 10)
    few = read_sample(replace(config, eval_fraction=0.25), empty_model(MODEL))
    assert len(few.queries) == 10 and few.num_queries == 336
    for one, other in zip(few.queries, every.queries, strict=False):
        assert np.array_equal(one.prompt_ids, other.prompt_ids)
    (alone,) = read_sample(replace(config, train_data=None), empty_model(MODEL)).queries
    assert alone.padded_width == min(2048, empty_model(MODEL).config.max_position_embeddings)


def test_the_table(monkeypatch, capsys):
    options = ["--dry_run=true", f"--model_name_or_path={MODEL}"]
    data = [f"--train_data={demo.TRAIN_FILE}", "--num_train_epochs=2", "--train_batch_size=56"]
    assert main([*options, *data]) == 0
    title, head, *rows = capsys.readouterr().out.partition("Time: ")[2].splitlines()
    assert title.startswith("448 queries, prompts of 18 tokens, 6.0 responses of 33; 56 queries")
    assert head.split()[:4] == ["GPUs", "s/step", "queries/s", "tokens/s"]
    table = [row.replace(",", "").split() for row in rows[: len(NUM_GPUS)]]
    assert [int(row[0]) for row in table] == list(NUM_GPUS)
    assert len({len(row) for row in rows[: len(NUM_GPUS)]}) == 1
    for row in table:
        seconds, epoch, whole = float(row[1]), float(row[6]), float(row[7])
        assert epoch == pytest.approx(8 * seconds / 3600, rel=0.06)
        assert whole == pytest.approx(2 * epoch, rel=0.06)
    assert "does not fit" not in "".join(rows) and "783 TFLOP/s" in "".join(rows)

    assert main([*options, "--dry_run_machine", "{memory_gib: 1, tflops: 100}"]) == 0
    text = capsys.readouterr().out.partition("Time: ")[2]
    assert text.startswith("no train_data") and "* does not fit 1 GiB" in text
    assert "100 TFLOP/s" in text

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cluster, "product_speed", lambda *_, **__: 5e14)
    properties = SimpleNamespace(total_memory=3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert Machine.of({"mfu": 0.5}) == Machine(tflops=500, memory_gib=3, mfu=0.5)
    assert "500 TFLOP/s" in cost_table(TrainConfig(model_name_or_path=MODEL))


@pytest.mark.parametrize(
    "value", ["{flops: 3}", "{tflops: 0}", "{mfu: -1}", "{mfu: .inf}", "{mfu: x}", "[3]"]
)
def test_a_machine_that_cannot_be(value, capsys):
    options = ["--dry_run=true", f"--model_name_or_path={MODEL}", "--dry_run_machine", value]
    assert main(options) == 2
    assert "rrhf_fast.train: error: dry_run_machine: " in capsys.readouterr().err


def test_transfers_are_counted_once():
    """On a network that is slower than everything else a pack takes as long as its transfers."""
    lm, config = tiny(), TrainConfig(train_batch_size=8, max_tokens_per_pack=100)
    slow = replace(PLAIN, network_gb_per_second=1e-9, nvlink_gb_per_second=1e-9)
    transfers = Transfers.of(lm, config, slow, torch.bfloat16, 8, 1)
    sample = Sample([query(3, 2, 4)] * 8, 8)
    packs = 1  # of each of 8 ranks, one query each
    row = cost(Shapes.of(lm, config), config, sample, slow, 8)
    expected = packs * transfers.per_pack + transfers.per_step
    assert transfers.exposed > 0 and row.on_gpus == pytest.approx(expected, rel=1e-3)
