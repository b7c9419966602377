"""The stage `iterate`: each step leaves a file, and a step whose file exists is not repeated.

output_dir/
  options.json  rounds.jsonl  rounds.png  report.html
  round-0/evaluation/                  the initial model
  round-1/samples.jsonl  scored.jsonl  model/  trained.json  evaluation/
          merged/                      with LoRA, where model/ holds adapters
  ...
"""

import gc
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from rrhf_fast.data.load import load_drafts
from rrhf_fast.data.options import OWN_FORMAT
from rrhf_fast.data.rows import Draft
from rrhf_fast.data.split import count_shared
from rrhf_fast.evaluate import evaluate
from rrhf_fast.evaluate.about import about
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.evaluate.report import is_reported, write_report
from rrhf_fast.export import export
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.iterate.config import IterateConfig, with_demo
from rrhf_fast.iterate.report import read_round, write_rounds
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import SampleConfig
from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.files import write_rows
from rrhf_fast.stages.identity import identity, refuse_pipes
from rrhf_fast.stages.journal import is_finished
from rrhf_fast.stages.next_step import after_rounds
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import Ranks, join_ranks, locked_once
from rrhf_fast.stages.run_folder import claim, complete_checkpoints, new_folder, pass_on
from rrhf_fast.stages.terminal import say_tables
from rrhf_fast.train import train


class Preempted(Exception):
    """SIGTERM or SIGUSR1 arrived during training."""


def run(config: IterateConfig) -> list[dict]:
    """See `rrhf_fast.iterate`."""
    if config.model_name_or_path is None and config.data is None:
        config = with_demo(config)
    config.validate()
    reference = config.reference_model_name_or_path or config.model_name_or_path
    with join_ranks("iterate", config) as ranks:
        output_dir = ranks.once(lambda: config.output_dir or str(new_folder()))
        config = replace(config, reference_model_name_or_path=reference, output_dir=output_dir)
        with locked_once(ranks, output_dir):
            return _rounds(config, ranks)


def _rounds(config: IterateConfig, ranks: Ranks) -> list[dict]:
    folder = ranks.once(lambda: _claim(config))
    refuse_pipes(config)
    ranks.first(lambda: _warn_of_shared_prompts(config))

    model = config.model_name_or_path
    records = [_evaluate(config, 0, model, ranks)]
    for number in range(1, config.rounds + 1):
        say(f"round {number} of {config.rounds}")
        model = _round(config, number, model, ranks)
        records.append(_evaluate(config, number, model, ranks))
        ranks.first(lambda: _report(config, folder, records))
    say(after_rounds(folder, model, config.rounds))
    return records


def _claim(config: IterateConfig) -> Path:
    # More rounds may be added to a run.
    options = {name: value for name, value in identity(config).items() if name != "rounds"}
    return claim(config.output_dir, options)


def _report(config: IterateConfig, folder: Path, records: list[dict]) -> None:
    # While a resumed run passes the rounds that it has, their report stays as it is.
    is_last = len(records) == config.rounds + 1
    if is_last or not is_reported(_evaluation(config, len(records))):
        scored = _evaluation(config, len(records) - 1) / "scored.jsonl"
        table, notes = write_rounds(folder, records, about(config, scored))
    if is_last:
        say_tables([table], notes)


def _round(config: IterateConfig, number: int, model: str, ranks: Ranks) -> str:
    """Sample from the model, score the samples and train on them; returns the trained model."""
    folder = Path(config.output_dir, f"round-{number}")
    samples, scored = folder / "samples.jsonl", folder / "scored.jsonl"
    trained = folder / "trained.json"

    def begin() -> tuple[bool, list[Path]]:
        folder.mkdir(exist_ok=True)
        return scored.exists(), [file for file in (samples, scored, trained) if is_finished(file)]

    same_rows, finished = ranks.once(begin)
    for file in finished:
        say(f"reusing {file}")
    if samples not in finished:
        data = {"data": config.data}
        if config.steps_per_round is not None:
            prompts = ranks.once(lambda: _slice(config, number, folder / "prompts.jsonl"))
            data = {"data": str(prompts), **OWN_FORMAT}
        options = {"output": str(samples), "model_name_or_path": model}
        stage = pass_on(config, SampleConfig, **options, **data)
        _print_counts("sampled", sample(replace(stage, seed=config.seed + number)))
    if scored not in finished:
        options = {"data": str(samples), "output": str(scored), "model_name_or_path": model}
        stage = pass_on(config, ScoreConfig, **options, **OWN_FORMAT)
        _print_counts("scored", score(stage))
    if trained not in finished:
        # Checkpoints of an interrupted attempt are of use only if they saw the same rows.
        resume = ranks.once(lambda: same_rows and bool(complete_checkpoints(folder / "model")))
        steps = _train(config, number, model, folder, resume=resume)

        def end() -> None:
            if config.train.use_peft:
                _merge(config, folder)
            write_rows(trained, [{"steps": steps}])

        ranks.first(end)
    return str(folder / ("merged" if config.train.use_peft else "model"))


def _merge(config: IterateConfig, folder: Path) -> None:
    """Add a round's adapters to the weights of its model: what follows starts from models."""
    merged = folder / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # of an attempt that was cut off
    code = config.trust_remote_code
    adapters = str(folder / "model")
    export(ExportConfig(adapters, str(merged), merge=True, trust_remote_code=code))
    _free()


def _warn_of_shared_prompts(config: IterateConfig) -> None:
    """Prompts seen in training say little about the model's answers to others."""
    held_out, data = (
        load_drafts(source, **config.reading())[0] for source in (config.eval_data, config.data)
    )
    if shared := count_shared(held_out, data):
        say(f"warning: {shared} of {len(held_out)} rows of eval_data have a prompt of data")


def _train(config: IterateConfig, number: int, model: str, folder: Path, *, resume: bool) -> int:
    """Train in a round's folder; returns the number of optimizer steps."""
    stage = config.train_config(number, model, folder)
    if resume:
        options = {"resume_from_checkpoint": "latest", "init_optimizer_from": None}
        stage = replace(stage, overwrite_output_dir=False, **options)
    result = train(stage)
    if result.preempted:
        raise Preempted("stopped by a signal")
    if result.interrupted:
        raise KeyboardInterrupt
    _free()
    return result.steps


def _evaluate(config: IterateConfig, number: int, model: str, ranks: Ranks) -> dict:
    """Measure a round's model, with round 0's samples as the baseline."""
    folder = _evaluation(config, number)
    if not ranks.once(lambda: is_reported(folder)):
        baseline = _evaluation(config, 0) / "scored.jsonl"
        stage = pass_on(
            config,
            EvaluateConfig,
            data=config.eval_data,
            output_dir=str(folder),
            model_name_or_path=model,
            baseline=str(baseline) if number else None,
        )
        evaluation = evaluate(stage)
        ranks.first(lambda: write_report(evaluation, folder))
        _free()
    record = ranks.once(lambda: read_round(folder, number))
    say(f"round {number}: reward {record['reward']}, perplexity {record['perplexity']}")
    return record


def _evaluation(config: IterateConfig, number: int) -> Path:
    return Path(config.output_dir, f"round-{number}", "evaluation")


def _slice(config: IterateConfig, number: int, path: Path) -> Path:
    """Write the prompts of a round of k steps: the next ones of an endlessly reshuffled dataset."""
    drafts, report = load_drafts(config.data, **config.reading())
    for line in report.lines("data"):
        say(line)
    count = config.steps_per_round * config.train.train_batch_size
    start, stop = (number - 1) * count, number * count
    order = []
    for epoch in range(stop // len(drafts) + 1):
        order += np.random.default_rng([config.seed, epoch]).permutation(len(drafts)).tolist()
    write_rows(path, [_record(drafts[i]) for i in order[start:stop]])
    return path


def _record(draft: Draft) -> dict:
    values = {f.name: getattr(draft, f.name) for f in fields(draft)}
    kept = ("prompt", "responses", "sources", "finish_reasons", "as_generated")
    return draft.others | {name: values[name] for name in kept if values[name] is not None}


def _print_counts(title: str, counts: dict[str, int]) -> None:
    totals = {name: count for name, count in counts.items() if count and ":" not in name}
    say(f"{title}: " + ", ".join(f"{count} {name}" for name, count in totals.items()))


def _free() -> None:
    """Release memory before the next stage loads its model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
