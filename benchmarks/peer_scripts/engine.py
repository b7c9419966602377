"""This project's step, as its trainer takes it, behind the gate of its peers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.peer_scripts.gate import NO_CLIPPING, Gate, main
from benchmarks.workloads import planner_for
from rrhf_fast import TrainConfig
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.rrhf import RRHFModel
from rrhf_fast.train import step
from rrhf_fast.train.distributed import World
from rrhf_fast.train.optimizer import build_optimizer
from rrhf_fast.train.progress import Progress
from rrhf_fast.train.signals import Signals


def run(gate: Gate) -> None:
    """Compute the reference's log-probs if the loss has them, and take steps on all rows."""
    job = gate.job
    config = replace(
        TrainConfig(),
        max_tokens_per_pack=job["max_tokens"],
        max_grad_norm=NO_CLIPPING,
        **job["loss"],
    )
    device = torch.device(job["device"])
    model = RRHFModel(
        load_model(job["model"]).to(device),
        config,
        max_length=4096,
        max_tokens=job["max_tokens"],
        compute_dtype=getattr(torch, job["dtype"]),
        compile=None,
    )
    queries = [_query(row) for row in job["rows"]]
    planner = planner_for(model, queries, job["max_tokens"])
    batch = planner.batch(range(len(queries)))
    setting = f"packs of up to {job['max_tokens']:,} tokens"
    facts = {"setting": setting, "attention": model.attention.name}
    if config.reference == "initial":
        shifts = [torch.tensor(row) for row in job["shifts"]]
        _references(model, batch)  # the first pass is slower
        before, facts["reference_seconds"] = gate.timed(_references, model, batch)
        packs = [
            replace(pack, reference_logps=logps + torch.cat([shifts[i] for i in pack.query_ids]))
            for pack, logps in zip(batch.packs, before, strict=True)
        ]
        batch = replace(batch, packs=packs)
    gate.describe(**facts)
    _take_steps(gate, model, config, batch)


def _query(row: dict) -> TokenisedQuery:
    prompt, *responses = (np.array(ids, np.int32) for ids in (row["prompt"], *row["responses"]))
    return TokenisedQuery(prompt, responses, np.array(row["rewards"], np.float32))


def _references(model: RRHFModel, batch) -> list[torch.Tensor]:
    return [model.response_logps(pack.to(model.device)).cpu() for pack in batch.packs]


def _take_steps(gate: Gate, model: RRHFModel, config: TrainConfig, batch) -> None:
    """Take the same step for each "go": at a rate of 0 the weights stay."""
    optimizer, _ = build_optimizer(model, replace(config, learning_rate=0.0), 1)
    world = World(model.device)
    around, progress = SimpleNamespace(model=model, world=world, config=config), Progress()
    gradient_norm, signals = step.gradient_norm, Signals(world)

    def marked(of: RRHFModel) -> torch.Tensor:
        gate.gradients(model.lm.named_parameters())
        return gradient_norm(of)

    step.gradient_norm = marked
    while True:
        gate.wait()
        totals, _, problem = step.take_step(around, batch, optimizer, 1, progress, signals)
        if problem is not None:
            raise ArithmeticError(problem)
        gate.count(totals.means()["loss"], totals.num_tokens)
        gate.end()
        # A running mean in the trainer, which the same step over and over leads to.
        progress.active_fraction = totals.active_fraction


if __name__ == "__main__":
    main(run)
