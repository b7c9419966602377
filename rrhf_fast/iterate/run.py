"""The rounds: every stage leaves a file, and a stage whose file is there is done.

output_dir/
  options.json  rounds.jsonl  rounds.png  report.html
  round-0/evaluation/                  the model as it came
  round-1/samples.jsonl  scored.jsonl  model/  trained.json  evaluation/
  ...
"""

import gc
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from rrhf_fast.data.load import load_drafts
from rrhf_fast.data.options import OWN_FORMAT
from rrhf_fast.data.rows import Draft
from rrhf_fast.data.split import count_shared
from rrhf_fast.evaluate import evaluate
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.evaluate.report import write_report
from rrhf_fast.evaluate.run import claim, pass_on
from rrhf_fast.iterate.config import IterateConfig, with_demo
from rrhf_fast.iterate.report import read_round, write_rounds
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import SampleConfig
from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.identity import identity
from rrhf_fast.stages.journal import write_rows
from rrhf_fast.stages.run_folder import complete_checkpoints
from rrhf_fast.train import train


class Preempted(Exception):
    """SIGTERM or SIGUSR1 came while a round was trained."""


def run(config: IterateConfig) -> list[dict]:
    """See `rrhf_fast.iterate`."""
    if config.model_name_or_path is None and config.data is None:
        config = with_demo(config)
    config.validate()
    reference = config.reference_model_name_or_path or config.model_name_or_path
    output_dir = config.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    config = replace(config, reference_model_name_or_path=reference, output_dir=output_dir)
    # More rounds are no other run.
    folder = claim(
        output_dir,
        {name: value for name, value in identity(config).items() if name != "rounds"},
    )
    _warn_of_shared_prompts(config)
    records, model = [_evaluate(config, 0, config.model_name_or_path)], config.model_name_or_path
    for number in range(1, config.rounds + 1):
        here = folder / f"round-{number}"
        here.mkdir(exist_ok=True)
        _say(f"round {number} of {config.rounds}")
        samples, scored = here / "samples.jsonl", here / "scored.jsonl"
        same_rows = scored.exists()
        for file in (samples, scored, here / "trained.json"):
            if file.exists():
                _say(f"reusing {file}")
        if not samples.exists():
            data = {"data": config.data}
            if config.steps_per_round is not None:
                prompts = _slice(config, number, here / "prompts.jsonl")
                data = {"data": str(prompts), **OWN_FORMAT}
            stage = pass_on(
                config, SampleConfig, output=str(samples), model_name_or_path=model, **data
            )
            _report("sampled", sample(replace(stage, seed=config.seed + number)))
        if not scored.exists():
            stage = pass_on(
                config,
                ScoreConfig,
                data=str(samples),
                output=str(scored),
                model_name_or_path=model,
                **OWN_FORMAT,
            )
            _report("scored", score(stage))
        if not (here / "trained.json").exists():
            _train(config, number, model, here, go_on=same_rows)
        model = str(here / "model")
        records.append(_evaluate(config, number, model))
        table = write_rounds(folder, records)
    _say(table)
    return records


def _warn_of_shared_prompts(config: IterateConfig) -> None:
    """What is measured on prompts that are trained on says little about others."""
    held_out, data = (
        load_drafts(source, **config.reading())[0] for source in (config.eval_data, config.data)
    )
    if shared := count_shared(held_out, data):
        _say(f"warning: {shared} of {len(held_out)} rows of eval_data have a prompt of data")


def _train(config: IterateConfig, number: int, model: str, here: Path, *, go_on: bool) -> None:
    stage = config.train_config(number, model, here)
    if go_on and complete_checkpoints(here / "model"):  # of an attempt that was interrupted
        more = {"resume_from_checkpoint": "latest", "init_optimizer_from": None}
        stage = replace(stage, overwrite_output_dir=False, **more)
    result = train(stage)
    if result.preempted:
        raise Preempted("stopped by a signal")
    if result.interrupted:
        raise KeyboardInterrupt
    write_rows(here / "trained.json", [{"steps": result.steps}])
    _free()


def _evaluate(config: IterateConfig, number: int, model: str) -> dict:
    """Measures of a round's model, against round 0's samples."""
    folder = Path(config.output_dir, f"round-{number}", "evaluation")
    if not (folder / "evaluation.json").exists():
        baseline = Path(config.output_dir, "round-0", "evaluation", "scored.jsonl")
        stage = pass_on(
            config,
            EvaluateConfig,
            data=config.eval_data,
            output_dir=str(folder),
            model_name_or_path=model,
            baseline=str(baseline) if number else None,
        )
        write_report(evaluate(stage), folder)
        _free()
    record = read_round(folder, number)
    _say(f"round {number}: reward {record['reward']}, perplexity {record['perplexity']}")
    return record


def _slice(config: IterateConfig, number: int, path: Path) -> Path:
    """The prompts of one round of k steps: the next ones of a shuffle, over and over."""
    drafts, _ = load_drafts(config.data, **config.reading())
    count = config.steps_per_round * config.train.train_batch_size
    start, stop = (number - 1) * count, number * count
    order = []
    for epoch in range(stop // len(drafts) + 1):
        order += np.random.default_rng([config.seed, epoch]).permutation(len(drafts)).tolist()
    write_rows(path, [_record(drafts[i]) for i in order[start:stop]])
    return path


def _record(draft: Draft) -> dict:
    named = {f.name: getattr(draft, f.name) for f in fields(draft)}
    kept = ("prompt", "responses", "sources", "finish_reasons", "as_generated")
    return draft.others | {name: named[name] for name in kept if named[name] is not None}


def _report(what: str, counts: dict[str, int]) -> None:
    _say(f"{what}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))


def _say(text: str) -> None:
    print(text, flush=True)


def _free() -> None:
    """The next stage loads a model of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
