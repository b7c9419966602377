"""Evaluate a model by fresh samples of held-out prompts, alone or against a baseline.

python -m rrhf_fast.evaluate --model_name_or_path M --data held_out.jsonl --output_dir eval \\
    --reward_fn package.module:function --baseline M0 --reference_model_name_or_path M0

Prints a table; writes samples.jsonl, scored.jsonl, evaluation.json, evaluation.png and report.html.
If it is killed, the same command resumes.
"""

from pathlib import Path

from rrhf_fast.evaluate import EvaluateConfig, evaluate
from rrhf_fast.stages.command import fail, how_to_resume, leave, run_command
from rrhf_fast.stages.lock import locked
from rrhf_fast.stages.outlet import say


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the judge is down, 2 a mistake in options
    or data, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    return run_command("evaluate", __doc__, EvaluateConfig, _run, arguments)


def _run(config: EvaluateConfig) -> int:
    # Heavy, and not needed for --help or a misspelt option.
    from rrhf_fast.evaluate.report import write_report
    from rrhf_fast.stages.endpoint import EndpointDown

    config.validate()
    with locked(config.output_dir):
        try:
            evaluation = evaluate(config)
        except EndpointDown as error:
            return fail("evaluate", f"{error}; {how_to_resume(config)}", 1)
        say(write_report(evaluation, Path(config.output_dir)))
    say(f"report.html is in {config.output_dir}")
    return 0


if __name__ == "__main__":
    leave(main)
