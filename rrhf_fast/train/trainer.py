"""`RRHFTrainer`: load, then step, log, evaluate and save until all steps are done."""

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from io import FileIO
from math import isnan
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rrhf_fast.data.packs import Batch, ahead, batches
from rrhf_fast.model.layers import count_given_up, count_graphs
from rrhf_fast.stages.cards import write_card
from rrhf_fast.stages.ending import is_on_all_ranks
from rrhf_fast.stages.files import append, naming, to_json
from rrhf_fast.stages.hub import pushed_files
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.reward_fn import RewardFn
from rrhf_fast.stages.terminal import say_pairs
from rrhf_fast.train.best import best_step, has_stalled, worse_than_before
from rrhf_fast.train.callbacks import Callbacks, checked_callbacks
from rrhf_fast.train.card import model_card
from rrhf_fast.train.checkpoint import Checkpoints
from rrhf_fast.train.cluster import cost_table
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import join_world, reshard
from rrhf_fast.train.evaluate import evaluate_ranking, evaluate_samples
from rrhf_fast.train.given import Given, Rows
from rrhf_fast.train.log_lines import LogLines, in_short
from rrhf_fast.train.memory import memory_table
from rrhf_fast.train.metrics import MetricsLog
from rrhf_fast.train.optimizer import build_optimizer
from rrhf_fast.train.plot import plot_training
from rrhf_fast.train.prepare import prepare, with_demo
from rrhf_fast.train.profile import StepProfiler
from rrhf_fast.train.progress import Progress, Window
from rrhf_fast.train.reference import attach_reference
from rrhf_fast.train.result import TrainResult, peak_memory_gib, say_result
from rrhf_fast.train.resume import evaluation_at, start, was_left_out
from rrhf_fast.train.roofline import product_speed
from rrhf_fast.train.samples_table import best_and_worst, samples_table
from rrhf_fast.train.save import save_model
from rrhf_fast.train.show import shown_rows
from rrhf_fast.train.signals import Signals, uninterrupted
from rrhf_fast.train.step import NotFinite, take_step

GIVEN_UP = (
    "the decoder's layers have reached PyTorch's limit on graphs (torch._dynamo.config."
    "recompile_limit) and run uncompiled where they are new, which is slower and changes no result"
)


def run(config: TrainConfig) -> TrainResult:
    """See `rrhf_fast.train`."""
    config.validate()
    if config.dry_run or config.show_tokens:
        config = with_demo(config) if config.model_name_or_path is None else config
        if config.dry_run:
            say(f"{memory_table(config)}\n\n{cost_table(config)}")
        else:
            say(shown_rows(config))
        return TrainResult(output_dir=None, metrics=[])
    with RRHFTrainer(args=config) as trainer:
        return trainer.train()


class RRHFTrainer:
    """Trains a causal language model by RRHF (arXiv 2304.05302) and saves it.

    Args:
        model: a name, a folder, or a loaded causal LM, which is trained in place with float32
            weights; default `args.model_name_or_path`, and without that the embedded demo. Frozen
            weights stay frozen.
        args: the options; default `TrainConfig()`.
        train_dataset: rows with prompt, responses and scores: a list of dicts, a
            `datasets.Dataset`, a pandas DataFrame, or what `args.train_data` takes.
        eval_dataset: held-out rows of the same kinds.
        processing_class: the tokenizer, or its name; default the model's own.
        reward_fn: reward_fn(prompts, responses) -> scores of fresh samples at each evaluation;
            default the function that `args.eval_reward_fn` names.
        callbacks: of transformers, see `rrhf_fast.train.callbacks`. Their
            `control.should_training_stop` ends training after the step at hand with a saved model;
            `should_evaluate`, `should_save` and `should_log` are obeyed too.

    Under torchrun every process makes one. It holds the lock of output_dir until it has trained.
    Used in a `with` statement it leaves the process group at the end; otherwise call `close`.

    Raises:
        ValueError: a mistake in options, files or rows.

    Example:
        >>> rows = [{"prompt": "2 + 2 =", "responses": [" 4", " 5"], "scores": [1.0, 0.0]}] * 4
        >>> options = TrainConfig(output_dir=folder, max_steps=2, train_batch_size=2)
        >>> trainer = RRHFTrainer(model=demo_model, args=options, train_dataset=rows)
        >>> trainer.train().steps
        model ...
        2
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: TrainConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_fn: RewardFn | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    ):
        if not isinstance(args, TrainConfig | None):
            raise ValueError(f"args: expected a TrainConfig, found a {type(args).__name__}")
        if args is not None and (args.dry_run or args.show_tokens):
            raise ValueError("dry_run, show_tokens: nothing is trained (use rrhf_fast.train)")
        callbacks = checked_callbacks(callbacks)
        given = Given.of(
            model=model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_fn=reward_fn,
        )
        config = given.complete(args or TrainConfig())
        config.validate()
        self._open = ExitStack()
        self.world = self._open.enter_context(join_world(config))
        try:
            self.run = prepare(config, self.world, given)
            self._open.callback(self.run.lock.close)
            self.run.model.release()
            self.log = MetricsLog(self.run.output_dir, self.run.config, writes=self.world.is_first)
            self.callbacks = Callbacks(callbacks, self.run)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        self.step = 0
        self._latest: tuple[int, dict] = (-1, {})  # step and metrics of the last evaluation
        self._logged: dict | None = None
        self._saved: list[str] = []  # the files of the model, once it is saved
        self._given_up = count_given_up()
        self._profiler: StepProfiler | None = None
        self._peak_flops: float | None = None  # on a GPU, per second
        self._bar: tqdm | None = None
        self._lines: LogLines | None = None  # in the bar's place
        self._event("on_init_end")

    def train(self) -> TrainResult:
        """Train until all steps are done, from a checkpoint if the options name one.

        Writes to `output_dir`: the model (safetensors), tokenizer and card (README.md),
        metrics.jsonl, training.png, samples.jsonl where a reward function is given, and
        checkpoints; with `push_to_hub` the model is then pushed to the hub. Ctrl-C ends training
        early and saves the model; SIGTERM and SIGUSR1 end it with a checkpoint.

        Raises:
            ValueError: the reward function misbehaves, and the model of the steps so far is saved;
                or this trainer has trained already.
            NotFinite: the loss or gradient is not finite; the last good weights are saved.
            OutOfMemory: a pack does not fit the device.
            SaveFailed: a checkpoint or the model cannot be written; earlier ones are whole.
            HubFailed: the model is saved, but could not be pushed.
        """
        if self.callbacks.given:
            raise ValueError("train: this trainer has trained already (make another)")
        with self.run.lock:
            return self._train()

    def _train(self) -> TrainResult:
        run, config = self.run, self.run.config
        optimizer, schedule = build_optimizer(run.model, config, run.num_steps)
        checkpoints = Checkpoints(run, optimizer, schedule, self.log)
        self._announce()
        progress = start(run, checkpoints, self.log)
        self.step = progress.step
        result = TrainResult(run.output_dir, metrics=self.log.records, steps=progress.step)
        self.callbacks.given = {"optimizer": optimizer, "lr_scheduler": schedule}

        steps = self._batches(optimizer)
        with Signals(self.world) as signals, self._saving(result, checkpoints, steps):
            self._event("on_train_begin")
            result.before = self._evaluate_at_start()
            checkpoints.check_best(self.step)
            result.stalled = has_stalled(self.log.records, config)
            for batch in () if result.stalled else steps:
                started = time.perf_counter()
                totals, grad_norm, problem = take_step(
                    run, batch, optimizer, self.step + 1, progress, signals
                )
                if self._profiler is not None:
                    self._profiler.add(totals)
                progress.add(totals, grad_norm, time.perf_counter() - started, problem)
                if progress.skipped == config.max_skipped_steps:
                    raise NotFinite(f"{problem}; {progress.skipped} steps in a row were skipped")
                result.steps = self.step = progress.step
                record = self._record(schedule, progress)
                schedule.step()
                self._event("on_step_end")

                # A callback ends the run as its last step would; a signal ends it to be resumed.
                is_last = self.callbacks.take("training_stop") or self.step == run.num_steps
                if is_last or self.step % run.steps_per_epoch == 0:
                    self._event("on_epoch_end")
                    is_last |= self.callbacks.take("training_stop")
                if self.callbacks.take("log") or is_last or problem or self._is_due("logging"):
                    self._log(record, progress)
                signals.release()
                is_stopped = totals.flagged and self.step < run.num_steps
                if is_stopped and config.optim == "adamw_8bit":  # cannot be resumed: keep the model
                    result.interrupted = True
                    break
                wants_evaluation = self.callbacks.take("evaluate") or self._is_due("eval")
                is_best = False
                if wants_evaluation and not is_last and not is_stopped:
                    self._evaluate()
                    result.stalled = has_stalled(self.log.records, config)
                    is_last = self.callbacks.take("training_stop") or result.stalled
                    if is_last:
                        self._log(record, progress)
                    else:
                        is_best = self._is_best()
                wants_checkpoint = self.callbacks.take("save") and config.optim != "adamw_8bit"
                is_wanted = wants_checkpoint or is_stopped or self._is_due("save")
                if is_wanted or is_best:
                    checkpoints.save(progress, only_best=not is_wanted)
                    self._event("on_save")
                checkpoints.finish(wait=is_stopped)
                result.preempted = is_stopped
                if is_stopped or (is_last and self.step < run.num_steps):
                    break
            if not (result.interrupted or result.preempted):
                checkpoints.finish()
                result.after = self._evaluate()
                if config.load_best_model_at_end:
                    self._load_best(result, checkpoints)
            self._event("on_train_end")
        result.peak_memory_gib = peak_memory_gib(self.world.device)
        say_result(result)
        self._push(result)
        return result

    def evaluate(self) -> dict[str, float]:
        """Measure the model as it is on the held-out rows, and by fresh samples where there is a
        reward function. All ranks must call.

        Returns:
            eval_loss, eval_rewards/accuracies, eval_rewards/margins, eval_reward, ...

        Raises:
            ValueError: there are no held-out rows.
        """
        if self.run.held_out is None:
            raise ValueError("eval_dataset: missing (or set eval_data or eval_fraction)")
        attach_reference(self.run, held_out_only=True)
        with self.run.model.engaged():
            measures, _ = self._measure()
            reshard(self.run.model)  # `train` may come next
            self._sync()
            self.callbacks.evaluated(measures)
        return {f"eval_{name}": value for name, value in measures.items()}

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model (or adapters) and the tokenizer as a Hugging Face folder, by default to
        the run's output_dir. All ranks must call. Raises SaveFailed."""
        save_model(self.run, output_dir and Path(output_dir))

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM that is trained; a plain Hugging Face model except while `train` and
        `evaluate` run packs, so that callbacks too can generate with it."""
        return self.run.model.lm

    def close(self) -> None:
        """Leave the process group, and unlock output_dir if that has not been done."""
        self._open.close()

    def __enter__(self) -> "RRHFTrainer":
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def _batches(self, optimizer: torch.optim.Optimizer) -> Generator[Batch]:
        """This rank's packs of each step to come, built ahead, behind a progress bar."""
        run, config, world = self.run, self.run.config, self.world
        steps = batches(
            run.train,
            train_batch_size=config.train_batch_size,
            seed=config.seed if config.data_seed is None else config.data_seed,
            num_steps=run.num_steps,
            first_step=self.step,
            rank=world.rank,
            num_ranks=world.size,
        )
        loader = ahead(steps, pin_memory=world.device.type == "cuda")
        if config.profile_steps is not None and world.is_first:
            options = {"num_steps": config.profile_steps, "folder": run.output_dir / "profile"}
            self._profiler = StepProfiler(run.model, optimizer, num_ranks=world.size, **options)
            loader = self._profiler.watch(loader)
        # None: a bar on terminals only.
        disable = None if world.is_first else True
        options = {"total": run.num_steps, "initial": self.step, "disable": disable}
        with closing(loader), tqdm(loader, unit="step", **options) as self._bar:
            if self._bar.disable:
                self._lines = LogLines(self.step, run.num_steps, world.print)
            for batch in self._bar:
                if self.step % run.steps_per_epoch == 0:
                    self._event("on_epoch_begin")
                self._event("on_step_begin")
                yield batch

    def _record(self, schedule: LRScheduler, progress: Progress) -> dict[str, float]:
        """The metrics of the step that was just taken, and means over the steps since the last
        record."""
        window, totals = progress.window, progress.window.totals
        record = {"step": self.step, "epoch": self.step / self.run.steps_per_epoch}
        record |= totals.means() | {
            "grad_norm": window.grad_norm,
            "learning_rate": float(schedule.get_last_lr()[0]),
            "num_tokens": progress.num_tokens,
            "tokens_per_second": totals.num_tokens / window.seconds,
        }
        if self.run.config.packing == "forest":
            record["active_fraction"] = totals.active_fraction
        if progress.skipped:
            record["skipped"] = progress.skipped
        if self.world.device.type == "cuda":
            if self.run.config.packing == "forest":
                peak = self._peak_flops * self.world.size
                record["mfu"] = sum(totals.flops) / window.seconds / peak
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.run.model.compiled:
            record["compiled_graphs"] = count_graphs()
            if count_given_up() > self._given_up:
                self._given_up = count_given_up()
                self._bar.write(f"warning: step {self.step}: {GIVEN_UP}")
        self._bar.set_postfix_str(in_short(record))
        return record

    def _announce(self) -> None:
        """Print what the run is about to do; on a GPU measure what it can do at best."""
        world, run = self.world, self.run
        say_pairs(run.summary)
        if run.warning is not None and world.is_first:
            print(run.warning, file=sys.stderr, flush=True)
        if world.size > 1:
            copies, shards = world.mesh.shape
            world.print(f"ranks      {world.size}, weights in {copies} copies of {shards} parts")
        if world.device.type == "cuda":
            dtype = run.model.compute_dtype
            self._peak_flops = product_speed(world.device, dtype, seconds=0.2)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _log(self, record: dict[str, float], progress: Progress) -> None:
        """Write the metrics of the steps since the last record, once."""
        if record is not self._logged:
            self._logged, progress.window = record, Window()
            self.log.write(record)
            if self._lines is not None:
                self._lines.show(record)
            self._sync()
            self.callbacks.logged(record)

    def _is_due(self, what: str) -> bool:
        """Whether logging, evaluation or saving is due after this step."""
        every = {
            "logging": self.run.config.logging_steps,
            "eval": self.run.eval_steps,
            "save": self.run.config.save_steps,
        }[what]
        return every is not None and self.step % every == 0

    def _measure(self) -> tuple[dict[str, float], list[dict]]:
        """Held-out metrics, and the fresh samples with their rewards."""
        run = self.run
        measures = evaluate_ranking(run.model, run.held_out_packs, self.world)
        if self.step == 0 and run.config.reference == "initial":  # ties, but for rounding
            tied = {"rewards/accuracies": 0.5, "rewards/margins": 0.0}
            measures |= {name: tie for name, tie in tied.items() if not isnan(measures[name])}
        if run.reward_fn is None:
            return measures, []
        rewards, samples = evaluate_samples(
            run.model, run.tokenizer, run.held_out.queries, run.reward_fn, run.config, self.world
        )
        return measures | rewards, samples

    def _evaluate(self) -> dict[str, float]:
        """Evaluate once per step at most, and log."""
        if self.run.held_out is None:
            return {}
        if self._latest[0] == self.step:
            return self._latest[1]
        measures, samples = self._measure()
        if samples and self.world.is_first:
            lines = "".join(to_json({"step": self.step, **sample}) + "\n" for sample in samples)
            file = self.run.output_dir / "samples.jsonl"
            with naming(file), FileIO(file, "a" if self.step else "w") as out:
                append(out, lines.encode())
        if samples and self.run.config.log_completions:
            shown = best_and_worst(samples)
            self.world.print(samples_table(shown, self.step))
            self.log.show(shown, self.step)
        record = {f"eval/{name}": value for name, value in measures.items()}
        self.log.write({"step": self.step} | record)
        self._latest = self.step, measures
        self._sync()
        self.callbacks.evaluated(measures)
        return measures

    def _evaluate_at_start(self) -> dict[str, float]:
        """The metrics before the first step; a resumed run has them in its records, and repeats an
        evaluation that a signal cut off."""
        if self.step == 0:
            return self._evaluate()
        records = self.log.records
        is_due = self._is_due("eval") and self.step < self.run.num_steps
        if is_due and self.world.once(lambda: was_left_out(records, self.step)):
            self._evaluate()
        return evaluation_at(records, 0)

    def _is_best(self) -> bool:
        """Whether the model after this step is wanted as that of the best evaluation so far."""
        config = self.run.config
        return config.load_best_model_at_end and best_step(self.log.records, config) == self.step

    def _load_best(self, result: TrainResult, checkpoints: Checkpoints) -> None:
        """Go back to the model of the best evaluation, if it is not that of this step."""
        best = best_step(self.log.records, self.run.config)
        if best not in (None, self.step):
            checkpoints.load_model(best)
            result.after = evaluation_at(self.log.records, best)
            self._latest = best, result.after
        result.best_step = best
        if problem := worse_than_before(result.before, result.after, self.run.config):
            self.world.print(f"warning: {problem}")

    def _plot(self) -> None:
        plot = self.run.output_dir / "training.png"
        # The other ranks wait: Slurm would take one that is done for a failure.
        self.world.once(lambda: plot_training(self.log.records, plot))

    def _push(self, result: TrainResult) -> None:
        """Push the finished model, if that was asked for, or say how to push what there is."""
        repository, folder = self.run.config.repository(), self.run.output_dir
        if repository is None:
            return
        files = [*self._saved, "training.png", "metrics.jsonl"]
        if not (result.interrupted or result.preempted):
            self.world.once(lambda: repository.push(folder, files))
            return
        how = "the run that resumes from the checkpoint pushes" if result.preempted else ""
        if self._saved:
            command = repository.command(folder, pushed_files(folder, files))
            how = f"to push this model: {command}"
        self.world.print(f"nothing was pushed to {repository.name}{how and '; '}{how}")

    def _sync(self) -> None:
        """Let callbacks know where the run is."""
        state = self.callbacks.state
        state.global_step, state.epoch = self.step, self.step / self.run.steps_per_epoch

    def _event(self, name: str, **more) -> None:
        self._sync()
        self.callbacks(name, **more)

    @contextmanager
    def _saving(
        self, result: TrainResult, checkpoints: Checkpoints, steps: Generator[Batch]
    ) -> Iterator[None]:
        """Inside, packs can be run. Whatever ends the run, keep the model of its complete steps."""
        together = True  # whether all ranks got here by the same way
        self.callbacks.state.best_metric = None
        try:
            with self.run.model.engaged():
                yield
        except KeyboardInterrupt:
            result.interrupted = True
        except NotFinite:
            raise
        except BaseException as error:
            together = self.world.size == 1 or is_on_all_ranks(error)
            raise
        finally:
            with uninterrupted():
                steps.close()  # ends the loader's thread and a profiler
                try:
                    if result.steps and together:
                        self._plot()
                        card = model_card(self.run, result)
                        self.world.once(lambda: write_card(self.run.output_dir, card))
                finally:  # last: a folder with a model is that of a finished run
                    if result.steps and together and not result.preempted:
                        self._saved = save_model(self.run)
                self.log.close()
                if result.interrupted:
                    checkpoints.finish()
