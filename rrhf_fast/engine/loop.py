"""The training loop: `train(config)` is what `python -m rrhf_fast.train` does."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from rrhf_fast.config import TrainConfig
from rrhf_fast.data.forest import Pack
from rrhf_fast.data.packs import ahead, steps_of_packs, steps_per_epoch
from rrhf_fast.engine.evaluate import Totals, evaluate_ranking, evaluate_samples
from rrhf_fast.engine.metrics import MetricsLog
from rrhf_fast.engine.optimizer import build_optimizer
from rrhf_fast.engine.plot import plot_training
from rrhf_fast.engine.prepare import Run, prepare
from rrhf_fast.model.layers import count_graphs


class NotFinite(ArithmeticError):
    """The loss or its gradient became infinite or NaN; names the rows of the step."""


@dataclass
class TrainResult:
    """What a run left behind. `before` and `after` hold the held-out metrics (empty without
    held-out rows)."""

    output_dir: Path
    metrics: list[dict]  # the records of metrics.jsonl
    steps: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def train(config: TrainConfig) -> TrainResult:
    """Train a causal language model by RRHF and save it.

    Writes to `output_dir`: the model (safetensors) and tokenizer, metrics.jsonl, training.png, and
    samples.jsonl when `eval_reward_fn` is set. Ctrl-C ends the run early and still saves.

    Raises:
        ValueError: a mistake in options, files or rows; nothing has been trained then.
        NotFinite: the loss or gradient is not finite; the weights of the last good step are saved.

    Example:
        >>> result = train(TrainConfig(max_steps=2, output_dir=folder))  # the embedded demo
        model ...
        >>> result.steps
        2
    """
    run = prepare(config)
    optimizer = build_optimizer(run.model, run.config, run.num_steps)
    log = MetricsLog(run.output_dir, run.config)
    print(run.summary, flush=True)
    result = TrainResult(run.output_dir, metrics=log.records)
    try:
        _fit(run, *optimizer, log, result)
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        with _uninterrupted():
            if result.steps:  # whatever ended the run, complete steps are worth keeping
                save_model(run)
                plot_training(log.records, run.output_dir / "training.png")
            log.close()
    print(_closing(result), flush=True)
    return result


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not cost what the first one saves."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals arrive elsewhere
        return
    before = signal.signal(signal.SIGINT, lambda *_: print("saving, please wait", flush=True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fit(
    run: Run,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    log: MetricsLog,
    result: TrainResult,
) -> None:
    """Run all steps, keeping `result` up to date."""
    config = run.config
    steps = steps_of_packs(
        run.train,
        train_batch_size=config.train_batch_size,
        seed=config.seed if config.data_seed is None else config.data_seed,
        num_steps=run.num_steps,
    )
    held_out_packs = run.held_out.packs(range(len(run.held_out.queries))) if run.held_out else []
    per_epoch = steps_per_epoch(len(run.train.queries), config.train_batch_size)
    eval_steps = config.eval_steps or per_epoch

    result.before = _evaluate(run, held_out_packs, log, 0)
    num_tokens = 0
    loader = ahead(steps, pin_memory=run.model.lm.device.type == "cuda")
    with tqdm(loader, total=run.num_steps, unit="step") as progress:
        for step, packs in enumerate(progress, 1):
            start = time.perf_counter()
            totals, grad_norm = _step(run, packs, optimizer, step)
            result.steps = step
            seconds = time.perf_counter() - start
            learning_rate = float(schedule.get_last_lr()[0])
            schedule.step()
            num_tokens += totals.num_tokens
            means = totals.means()
            speed = totals.num_tokens / seconds
            progress.set_postfix_str(
                f"loss {means['loss']:.3f}, accuracy {means['rewards/accuracies']:.2f}, "
                f"{speed:,.0f} tokens/s"
            )
            if step % config.logging_steps == 0 or step == run.num_steps:
                record = {"step": step, "epoch": step / per_epoch, **means, "grad_norm": grad_norm}
                record |= {
                    "learning_rate": learning_rate,
                    "num_tokens": num_tokens,
                    "tokens_per_second": speed,
                }
                if run.model.compiled:
                    record["compiled_graphs"] = count_graphs()
                log.write(record)
            if step % eval_steps == 0 and step < run.num_steps:
                _evaluate(run, held_out_packs, log, step)
    result.after = _evaluate(run, held_out_packs, log, result.steps)


def _step(
    run: Run, packs: Sequence[Pack], optimizer: torch.optim.Optimizer, step: int
) -> tuple[Totals, float]:
    """One optimizer step over the packs of one batch of queries; returns sums over it and the
    gradient norm."""
    model, config = run.model, run.config
    num_queries = sum(pack.num_queries for pack in packs)
    totals = Totals()
    for pack in packs:
        pack = pack.to(model.lm.device)
        out = model(pack)
        # The mean over the step's queries, however they are packed.
        (out.loss * (pack.num_queries / num_queries)).backward()
        totals.add(out, pack)
    max_norm = config.max_grad_norm or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not torch.isfinite(totals.sums[0]) or not grad_norm < float("inf"):
        optimizer.zero_grad()
        query_ids = torch.cat([pack.query_ids for pack in packs]).tolist()
        rows = ", ".join(run.train.queries[i].row.where for i in query_ids[:3])
        problem = f"loss {totals.sums[0].item() / num_queries}, gradient norm {grad_norm}"
        raise NotFinite(
            f"step {step}: {problem}; its rows include {rows} (try a lower --learning_rate)"
        )
    optimizer.step()
    optimizer.zero_grad()
    return totals, grad_norm


def _evaluate(run: Run, packs: Sequence[Pack], log: MetricsLog, step: int) -> dict[str, float]:
    if run.held_out is None:
        return {}
    measures = evaluate_ranking(run.model, packs)
    if run.reward_fn is not None:
        rewards, samples = evaluate_samples(
            run.model, run.tokenizer, run.held_out.queries, run.reward_fn, run.config
        )
        measures |= rewards
        with (run.output_dir / "samples.jsonl").open("a" if step else "w") as file:
            file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
    log.write({"step": step} | {f"eval/{name}": value for name, value in measures.items()})
    return measures


def save_model(run: Run) -> None:
    """Write model and tokenizer beside the target, then move each file into place: no file is ever
    half-written."""
    staging = run.output_dir / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    with run.model.generation():  # the saved config must name an attention that others have
        run.model.lm.save_pretrained(staging)
    run.tokenizer.save_pretrained(staging)
    umask = os.umask(0)
    os.umask(umask)
    names = {path.name for path in staging.iterdir()}
    for path in sorted(staging.iterdir()):
        path.chmod(0o666 & ~umask)  # safetensors keeps its files to their owner
        os.replace(path, run.output_dir / path.name)
    for pattern in ("model*.safetensors", "model.safetensors.index.json"):
        for path in run.output_dir.glob(pattern):
            if path.name not in names:  # of an earlier run, cut into other files
                path.unlink()
    staging.rmdir()


def _closing(result: TrainResult) -> str:
    names = {
        "rewards/accuracies": "held-out ranking accuracy",
        "reward": "held-out reward of fresh samples",
        "response_length": "tokens of a fresh sample",
        "loss": "held-out loss",
    }
    lines = [
        f"{title:<34} {result.before[name]:8.3f} -> {result.after[name]:8.3f}"
        for name, title in names.items()
        if name in result.before and name in result.after
    ]
    state = "stopped early" if result.interrupted else "done"
    saved = "model and metrics are in" if result.steps else "nothing was trained, no model is in"
    return "\n".join([*lines, f"{state} after {result.steps} steps; {saved} {result.output_dir}"])
