"""The training loop: `train(config)` is what `python -m rrhf_fast.train` does."""

import itertools
import json
import os
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

from rrhf_fast.data.forest import Pack
from rrhf_fast.data.packs import Batch, ahead, batches, steps_per_epoch
from rrhf_fast.model.layers import count_given_up, count_graphs
from rrhf_fast.stages.run_folder import find_checkpoint
from rrhf_fast.train.backward import (
    backward_active,
    backward_whole,
    is_worthwhile,
)
from rrhf_fast.train.checkpoint import Checkpoints, Progress, changed_options
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World, is_on_all_ranks, join_world
from rrhf_fast.train.evaluate import Totals, evaluate_ranking, evaluate_samples
from rrhf_fast.train.memory import memory_table
from rrhf_fast.train.metrics import MetricsLog
from rrhf_fast.train.optimizer import build_optimizer, clipped_step, gradient_norm
from rrhf_fast.train.plot import plot_training
from rrhf_fast.train.prepare import Run, prepare, with_demo
from rrhf_fast.train.profile import StepProfiler
from rrhf_fast.train.save import save_model
from rrhf_fast.train.show import shown_rows

GIVEN_UP = (
    "the decoder's layers have reached PyTorch's limit on graphs (torch._dynamo.config."
    "recompile_limit) and run uncompiled where they are new, which is slower and changes no result"
)


class NotFinite(ArithmeticError):
    """The loss or its gradient was infinite or NaN for several steps in a row; names the rows."""


@dataclass
class TrainResult:
    """What a run left behind. `before` and `after` hold the held-out metrics (empty without
    held-out rows)."""

    output_dir: Path | None  # None after a dry run
    metrics: list[dict]  # the records of metrics.jsonl
    steps: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False  # by Ctrl-C, or a signal to adamw_8bit; the model is saved
    preempted: bool = False  # by SIGTERM or SIGUSR1; a checkpoint is saved


def run(config: TrainConfig) -> TrainResult:
    """See `rrhf_fast.train`."""
    config.validate()
    if config.dry_run or config.show_tokens:
        config = with_demo(config) if config.model_name_or_path is None else config
        print(memory_table(config) if config.dry_run else shown_rows(config))
        return TrainResult(output_dir=None, metrics=[])
    with join_world(config) as world:
        run = prepare(config, world)
        optimizer, schedule = build_optimizer(run.model, run.config, run.num_steps)
        checkpoints = Checkpoints(run, optimizer, schedule)
        log = MetricsLog(run.output_dir, run.config, writes=world.is_first)
        _print(world, run.summary)
        if world.size > 1:
            copies, shards = world.mesh.shape
            _print(world, f"ranks      {world.size}, weights in {copies} copies of {shards} parts")
        progress = _start(run, checkpoints, log)
        result = TrainResult(run.output_dir, metrics=log.records, steps=progress.step)
        with Signals(world) as signals:
            plot = run.output_dir / "training.png"
            together = True  # whether all ranks got here by the same way
            try:
                _fit(run, optimizer, schedule, checkpoints, progress, log, result, signals)
            except KeyboardInterrupt:
                result.interrupted = True
            except NotFinite:
                raise
            except BaseException as error:
                together = world.size == 1 or is_on_all_ranks(error)
                raise
            finally:
                with _uninterrupted():
                    # Whatever ended the run, complete steps are worth keeping.
                    if result.steps and together and not result.preempted:
                        save_model(run)
                    if result.steps and together:
                        # The other ranks wait: Slurm would take one that is done for a failure.
                        world.once(lambda: plot_training(log.records, plot))
                    log.close()
                    if result.interrupted:
                        checkpoints.finish()
        _print(world, _closing(result))
    return result


class Signals:
    """SIGTERM and SIGUSR1 (with several ranks also Ctrl-C, which one rank cannot obey alone) ask
    the loop to stop after the step at hand. A single rank's Ctrl-C is a KeyboardInterrupt, put off
    from `hold` to `release`: half an update is no model."""

    def __init__(self, world: World):
        self.stop = False
        self._alone = world.size == 1
        self._names = [signal.SIGTERM]
        if hasattr(signal, "SIGUSR1"):  # not on Windows
            self._names.append(signal.SIGUSR1)
        # What a background job ignores, or a notebook treats in its own way, stays so.
        if not self._alone or signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._names.append(signal.SIGINT)
        self._held = self._interrupted = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # signals arrive nowhere else
            self._before = {name: signal.signal(name, self._handle) for name in self._names}
        return self

    def __exit__(self, *_):
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def hold(self) -> None:
        """Put a Ctrl-C off until `release`."""
        self._held = True

    def release(self) -> None:
        """Raise KeyboardInterrupt if there was a Ctrl-C since `hold`."""
        self._held = False
        if self._interrupted:
            raise KeyboardInterrupt

    def _handle(self, number: int, _) -> None:
        if number != signal.SIGINT or not self._alone:
            self.stop = True
        elif self._held:
            self._interrupted = True
        else:
            raise KeyboardInterrupt


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


def _start(run: Run, checkpoints: Checkpoints, log: MetricsLog) -> Progress:
    """Resume from the checkpoint that the config names, or start afresh."""
    config, world = run.config, run.world
    name = config.resume_from_checkpoint or config.init_optimizer_from
    option = "resume_from_checkpoint" if config.resume_from_checkpoint else "init_optimizer_from"
    folder = world.once(lambda: name and find_checkpoint(name, run.output_dir, option))
    if folder is None or option == "init_optimizer_from":
        if folder is not None:
            checkpoints.load_optimizer(folder)
        elif name is not None:
            _print(world, f"resume     no checkpoint in {run.output_dir} yet: starting afresh")
        checkpoints.clear(keep_complete=False)
        return Progress()
    checkpoints.clear(keep_complete=True)
    progress, lengths = checkpoints.resume(folder)
    log.resume(lengths.get("metrics.jsonl", 0))
    samples = run.output_dir / "samples.jsonl"
    if world.is_first and samples.exists():
        os.truncate(samples, min(samples.stat().st_size, lengths.get("samples.jsonl", 0)))
    changes = changed_options(folder, config)
    _print(world, f"resume     {folder}" + (f", with changes: {changes}" if changes else ""))
    return progress


def _fit(
    run: Run,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    checkpoints: Checkpoints,
    progress: Progress,
    log: MetricsLog,
    result: TrainResult,
    signals: Signals,
) -> None:
    """Run all steps from `progress` on, keeping it and `result` up to date."""
    given_up = count_given_up()
    config, world = run.config, run.world
    place = {"rank": world.rank, "num_ranks": world.size}
    steps = batches(
        run.train,
        train_batch_size=config.train_batch_size,
        seed=config.seed if config.data_seed is None else config.data_seed,
        num_steps=run.num_steps,
        first_step=progress.step,
        **place,
    )
    held_out_packs = []
    if run.held_out is not None:
        queries = range(len(run.held_out.queries))
        held_out_packs = run.held_out.batch(queries, **place).packs
    per_epoch = steps_per_epoch(len(run.train.queries), config.train_batch_size)
    eval_steps = config.eval_steps or per_epoch

    if progress.step == 0:
        result.before = _evaluate(run, held_out_packs, log, 0)
    else:
        result.before = _first_evaluation(log.records)
        is_due = progress.step % eval_steps == 0 and progress.step < run.num_steps
        if is_due and world.once(lambda: _was_left_out(log.records, progress.step)):
            _evaluate(run, held_out_packs, log, progress.step)
    loader = ahead(steps, pin_memory=world.device.type == "cuda")
    profiler = None
    if config.profile_steps is not None and world.is_first:
        options = {"num_steps": config.profile_steps, "folder": run.output_dir / "profile"}
        profiler = StepProfiler(run.model, optimizer, num_ranks=world.size, **options)
        loader = profiler.watch(loader)
    bar = {"total": run.num_steps, "initial": progress.step, "disable": not world.is_first}
    with tqdm(loader, unit="step", **bar) as progress_bar:
        for step, batch in enumerate(progress_bar, progress.step + 1):
            start = time.perf_counter()
            totals, grad_norm, problem = take_step(run, batch, optimizer, step, progress, signals)
            if profiler is not None:
                profiler.add(totals)
            progress.skipped = progress.skipped + 1 if problem else 0
            if progress.skipped == config.max_skipped_steps:
                raise NotFinite(f"{problem}; {progress.skipped} steps in a row were skipped")
            result.steps = progress.step = step
            progress.num_tokens += totals.num_tokens
            record = {"step": step, "epoch": step / per_epoch, **totals.means()} | {
                "grad_norm": grad_norm,
                "learning_rate": float(schedule.get_last_lr()[0]),
                "num_tokens": progress.num_tokens,
                "tokens_per_second": totals.num_tokens / (time.perf_counter() - start),
            }
            schedule.step()
            progress_bar.set_postfix_str(
                f"loss {record['loss']:.3f}, accuracy {record['rewards/accuracies']:.2f}, "
                f"{record['tokens_per_second']:,.0f} tokens/s"
            )
            if config.packing == "forest":
                record["active_fraction"] = totals.active_fraction
                progress.update(totals.active_fraction)
            if problem:
                record["skipped"] = progress.skipped
            if world.device.type == "cuda":
                record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if run.model.compiled:
                record["compiled_graphs"] = count_graphs()
                if count_given_up() > given_up:
                    given_up = count_given_up()
                    progress_bar.write(f"warning: step {step}: {GIVEN_UP}")
            if step % config.logging_steps == 0 or step == run.num_steps or problem:
                log.write(record)
            signals.release()
            stopped = totals.flagged and step < run.num_steps
            if stopped and config.optim == "adamw_8bit":  # nothing to resume from, hence a model
                result.interrupted = True
                return
            if step % eval_steps == 0 and step < run.num_steps and not stopped:
                _evaluate(run, held_out_packs, log, step)
            if stopped or (config.save_steps and step % config.save_steps == 0):
                checkpoints.save(progress)
            checkpoints.finish(wait=stopped)
            if stopped:
                result.preempted = True
                return
    checkpoints.finish()
    result.after = _evaluate(run, held_out_packs, log, result.steps)


def take_step(
    run: Run,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    step: int,
    progress: Progress,
    signals: Signals,
) -> tuple[Totals, float, str | None]:
    """One optimizer step over the packs of one batch of queries; returns sums over all ranks'
    packs, the gradient norm, and why the step was skipped, if it was."""
    model, world = run.model, run.world
    totals = Totals(model.device)
    backward = (
        backward_active if is_worthwhile(run.config, progress.active_fraction) else backward_whole
    )
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
    ids = run.world.gather([i for pack in packs for i in pack.query_ids.tolist()])
    some = itertools.islice(itertools.chain.from_iterable(ids), 3)
    rows = ", ".join(run.train.queries[i].row.where for i in some)
    problem = f"loss {totals.means()['loss']}, gradient norm {grad_norm}"
    return f"step {step}: {problem}; its rows include {rows} (try a lower --learning_rate)"


def _evaluate(run: Run, packs: Sequence[Pack], log: MetricsLog, step: int) -> dict[str, float]:
    if run.held_out is None:
        return {}
    measures = evaluate_ranking(run.model, packs, run.world)
    if run.reward_fn is not None:
        rewards, samples = evaluate_samples(
            run.model, run.tokenizer, run.held_out.queries, run.reward_fn, run.config, run.world
        )
        measures |= rewards
        if run.world.is_first:
            with (run.output_dir / "samples.jsonl").open("a" if step else "w") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
    log.write({"step": step} | {f"eval/{name}": value for name, value in measures.items()})
    return measures


def _first_evaluation(records: list[dict]) -> dict[str, float]:
    """The held-out metrics before the first step, from the records of the run's earlier part."""
    first = next((record for record in records if record["step"] == 0), {})
    return {
        name.removeprefix("eval/"): value
        for name, value in first.items()
        if name != "step" and value is not None
    }


def _was_left_out(records: list[dict], step: int) -> bool:
    """Whether a signal cut off the evaluation after this step, in the run's earlier part."""
    here = [record for record in records if record["step"] == step]
    return bool(records) and not any(key.startswith("eval/") for r in here for key in r)


def _print(world: World, text: str) -> None:
    if world.is_first:
        print(text, flush=True)


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
    if result.preempted:
        state, saved = "stopped by a signal", f"checkpoint-{result.steps} to resume from is in"
    return "\n".join([*lines, f"{state} after {result.steps} steps; {saved} {result.output_dir}"])
