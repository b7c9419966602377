"""Does RRHF align? The paper's experiments in miniature, over seeds, with intervals and tests.

python -m experiments                   # all, or by name: sources rounds ...
python -m experiments smallest          # a minute; exit code 1 if its check fails
python -m experiments tuning            # not part of all, like real_model and margin_real
python -m experiments my.yaml data --models DIR --data DIR
python -m experiments --report_only --results experiments/results

Killed? Run the same command again: it resumes. A stage is identified by its options and its files'
content, not by the code that ran it: after a change of the engine use another --work. The last
command redraws tables and plots from the figures of an earlier run.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Before torch is imported: each stage uses one core.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from experiments.recipe import CONFIGS, load_experiment, read_text
from experiments.report import collect, failed_checks, update, write_index, write_results
from experiments.runner import StageFailed, all_stages, run_stages
from rrhf_fast.data.checks import one_line

EXPERIMENTS = (
    *("sources", "rounds", "alternatives", "choices", "responses"),
    *("pair_losses", "margin", "margin_demo", "margin_stories", "size", "data", "equivalence"),
    *("reasoning", "long_form", "safety", "constitution"),
)
# Some chose the learning rates, the others need a model of the user.
BY_NAME = ("tuning", "tuning_online", "tuning_tasks", "real_model", "margin_real")


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 a stage or a check failed, 2 a mistake in options or a
    YAML file, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", help=f"default all: {' '.join(EXPERIMENTS)}; or YAML files"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="stages' files")
    parser.add_argument(
        "--results", type=Path, help="folder of tables and plots; default results in --work"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, help="use only this many; default all")
    parser.add_argument("--models", type=Path, help="folder with stories260k and others")
    parser.add_argument("--data", type=Path, help="folder with pandalm_human.jsonl and others")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    parser.add_argument("--dry_run", action="store_true", help="check recipes, count stages")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except StageFailed as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to resume", 130)


def _run(options: argparse.Namespace) -> int:
    for name in ("jobs", "seeds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, found {value}")
    names = options.names or EXPERIMENTS
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    for name in names:
        if not name.endswith(".yaml") and name not in known:
            expected = f"{', '.join(known)}, or a .yaml file"
            raise ValueError(f"{name}: no such experiment (there are {expected})")
    paths = [Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml" for name in names]
    roots = {"models": options.models, "data": options.data}
    work = options.work.resolve()
    results = options.results or work / "results"
    experiments = [load_experiment(path, work, roots, options.seeds) for path in paths]
    stages = [stage for experiment in experiments for stage in experiment.results()]
    if options.dry_run:
        for experiment in experiments:
            _print_skipped(experiment)
        print(f"{len(all_stages(stages))} stages")
        return 0
    for name, folder in (("work", work), ("results", results)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{name}: {folder} cannot be a folder ({error.strerror})"
            raise ValueError(problem) from error
    if not options.report_only:
        run_stages(stages, work, options.jobs)
    problems = []
    for experiment in experiments:
        if options.report_only:
            path = results / f"{experiment.name}.json"
            if not path.exists():
                print(f"{experiment.name}: no {path.name}, left out")
                continue
            figures = json.loads(path.read_text())
            update(figures, experiment)
        else:
            _print_skipped(experiment)
            if not experiment.results():
                continue
            figures = collect(experiment, work)
        print(write_results(figures, experiment.text, results), flush=True)
        problems += failed_checks(figures, experiment.text.get("check", []))
    texts = {name: read_text(CONFIGS / f"{name}.yaml") for name in (*EXPERIMENTS, *BY_NAME)}
    write_index(texts, results)
    for problem in problems:
        _fail(problem, 1)
    return 1 if problems else 0


def _print_skipped(experiment) -> None:
    for arm in experiment.arms:
        if arm.skipped:
            print(f"{experiment.name}: {arm.name} is left out: {arm.skipped}")


def _fail(problem: object, code: int) -> int:
    print(f"experiments: error: {one_line(problem, None)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
