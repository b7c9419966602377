"""Where the time of one optimizer step goes: packs, forward, backward, clipping and update.

Here packs are built within the step, so that their cost shows; `train` builds them in a concurrent
thread (`--profile_steps` profiles that)."""

from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.machine import compute_dtype as dtype_of
from benchmarks.workloads import PACK_TOKENS, PAPER, build_model, draw, fill, planner_for, real
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World
from rrhf_fast.train.optimizer import build_optimizer
from rrhf_fast.train.prepare import Run
from rrhf_fast.train.profile import WARMUP, StepProfiler
from rrhf_fast.train.progress import Progress
from rrhf_fast.train.roofline import Breakdown
from rrhf_fast.train.signals import Signals
from rrhf_fast.train.step import take_step

SHAPES = {
    "cpu": {"smoke": "tiny", "paper": "SmolLM2-135M", "full": "SmolLM2-135M"},
    "cuda": {"smoke": "tiny", "paper": "Llama-3.2-1B", "full": "Llama-3.2-3B"},
}


def profile(
    *,
    preset: str,
    device: str,
    out: Path,
    model: str | None = None,
    data: str | None = None,
    num_queries: int | None = None,
    max_tokens_per_pack: int | None = None,
    num_steps: int = 2,
    compute_dtype: str | None = None,
    engine_options: dict | None = None,
) -> Breakdown:
    """Profile steps of `num_queries` queries (default: enough for four packs on a GPU, else 8) of
    the paper's lengths, or of `data` (JSONL rows) in the tokens of `model`; write trace.json.gz,
    breakdown.md and breakdown.png to `out`. `compute_dtype` is as for `step.run`; `engine_options`
    go to `RRHFModel`."""
    max_tokens = max_tokens_per_pack or PACK_TOKENS[device]
    num_queries = num_queries or (fill(PAPER, max_tokens) if device == "cuda" else 8)
    options = {"compile": None, "max_tokens": max_tokens} | (engine_options or {})
    options["compute_dtype"] = getattr(torch, compute_dtype) if compute_dtype else dtype_of(device)
    config = TrainConfig(
        train_batch_size=num_queries,
        max_tokens_per_pack=max_tokens,
        activation_checkpointing=options.get("activation_checkpointing", "none"),
    )
    if data is not None:
        lm, queries = load_model(model).to(device), real(data, model, num_queries)
    else:
        lm = build_model(SHAPES[device][preset], device=device)
        queries = draw(PAPER, num_queries, lm.config.vocab_size)
    engine = RRHFModel(lm, config, max_length=4096, **options)
    planner = planner_for(engine, queries, max_tokens)
    count = WARMUP + num_steps
    world = World(engine.device)
    run = Run(
        config=config, world=world, output_dir=out, checkpoint=None, model=engine,
        save_dtype=torch.float32, tokenizer=None, train=planner, held_out=None, reward_fn=None,
        num_steps=count, summary={}, warning=None, lock=ExitStack(),
    )  # fmt: skip
    optimizer, _ = build_optimizer(engine, config, count)
    progress, signals = Progress(), Signals(world)
    profiler = StepProfiler(engine, optimizer, num_steps=num_steps, folder=out)
    batches = (planner.batch(range(len(queries))) for _ in range(count))
    for number, batch in enumerate(profiler.watch(batches), 1):
        totals, norm, problem = take_step(run, batch, optimizer, number, progress, signals)
        progress.add(totals, norm, 0.0, problem)  # the profiler has the times
        profiler.add(totals)
    return profiler.breakdown
