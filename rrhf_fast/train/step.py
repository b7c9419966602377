"""One optimizer step: the gradient of a batch's packs, its norm, and the update."""

import itertools
from collections.abc import Sequence

import torch

from rrhf_fast.data.forest import Pack
from rrhf_fast.data.packs import Batch
from rrhf_fast.train.backward import backward_active, backward_whole, is_worthwhile
from rrhf_fast.train.evaluate import Totals
from rrhf_fast.train.optimizer import clipped_step, gradient_norm
from rrhf_fast.train.prepare import Run
from rrhf_fast.train.progress import Progress
from rrhf_fast.train.signals import Signals


class NotFinite(ArithmeticError):
    """The loss or its gradient was infinite or NaN for several steps in a row; names the rows."""


def take_step(
    run: Run,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    step: int,
    progress: Progress,
    signals: Signals,
) -> tuple[Totals, float, str | None]:
    """Take one optimizer step on a batch of queries.

    Returns:
        The sums over the packs of all ranks, the gradient norm, and why the update was skipped
        (None if it was not).
    """
    model, world = run.model, run.world
    totals = Totals(model.device)
    is_active = is_worthwhile(run.config, progress.active_fraction, model.row_skipping)
    backward = backward_active if is_active else backward_whole
    backward(model, batch, run.config, world, totals)
    if signals.stop:
        totals.flag()
    world.sum(totals.sums)
    norm = gradient_norm(model)
    # The one wait for the device: from here on, sums are on the host.
    read = torch.cat([totals.sums, norm.reshape(1).to(totals.sums)]).cpu()
    totals.sums, grad_norm = read[:-1], read[-1].item()
    problem = None
    if totals.is_finite and grad_norm < float("inf"):
        signals.hold()
        clipped_step(optimizer, grad_norm, run.config.max_grad_norm or float("inf"))
    else:
        problem = _not_finite(run, batch.packs, totals, grad_norm, step)
    optimizer.zero_grad()
    return totals, grad_norm, problem


def _not_finite(
    run: Run, packs: Sequence[Pack], totals: Totals, grad_norm: float, step: int
) -> str:
    """What was not finite, and a few of the step's rows."""
    ids = run.world.gather([i for pack in packs for i in pack.query_ids.tolist()])
    some = itertools.islice(itertools.chain.from_iterable(ids), 3)
    rows = ", ".join(map(run.train.queries.where, some))
    problem = f"loss {totals.means()['loss']}, gradient norm {grad_norm}"
    return f"step {step}: {problem}; its rows include {rows} (try a lower --learning_rate)"
