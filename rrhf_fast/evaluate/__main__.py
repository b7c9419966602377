"""Evaluate a model by fresh samples of held-out prompts, alone or against a baseline.

python -m rrhf_fast.evaluate --model_name_or_path M --data held_out.jsonl --output_dir eval \\
    --reward_fn package.module:function --baseline M0 --reference_model_name_or_path M0

Prints a table; writes samples.jsonl, scored.jsonl, evaluation.json, evaluation.png and report.html.
If it is killed, the same command resumes.
"""

from pathlib import Path

from rrhf_fast.evaluate import EvaluateConfig
from rrhf_fast.stages.command import fail, how_to_resume, leave, run_command
from rrhf_fast.stages.loading import quick_imports
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import join_ranks, locked_once
from rrhf_fast.stages.terminal import say_tables


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the judge is down, 2 a mistake in options
    or data, 75 SIGUSR1, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; under a launcher 75 for all signals
    that a scheduler sends."""
    return run_command("evaluate", __doc__, EvaluateConfig, _run, arguments)


def _run(config: EvaluateConfig) -> int:
    with quick_imports():  # not needed for --help or a misspelt option
        from rrhf_fast.evaluate.report import write_report
        from rrhf_fast.evaluate.run import run
        from rrhf_fast.stages.endpoint import EndpointDown

    config.validate()
    try:
        with join_ranks("evaluate", config) as ranks, locked_once(ranks, config.output_dir):
            evaluation = run(config)
            folder = Path(config.output_dir)
            ranks.first(lambda: say_tables(*write_report(evaluation, folder)))
    except EndpointDown as error:
        return fail("evaluate", f"{error}; {how_to_resume(config)}", 1)
    say(f"report.html is in {config.output_dir}")
    return 0


if __name__ == "__main__":
    leave(main)
