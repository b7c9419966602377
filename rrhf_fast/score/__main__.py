"""Add scores to the responses of rows: by a reward model, a function, a judge or the policy itself.

python -m rrhf_fast.score --data sampled.jsonl --output scored.jsonl --reward_model_name_or_path R
python -m rrhf_fast.score --data sampled.jsonl --output scored.jsonl --reward_fn package.module:fn
python -m rrhf_fast.score --data sampled.jsonl --output scored.jsonl --judge_model gpt-4o-mini
torchrun --nproc_per_node 8 -m rrhf_fast.score --config score.yaml        # responses over 8 GPUs
python -m rrhf_fast.score --data sampled.jsonl --output scored.jsonl --model_name_or_path M \\
    --policy_as_reward true

If it is killed, the same command resumes.
"""

from rrhf_fast.score import ScoreConfig
from rrhf_fast.stages.command import fail, how_to_resume, leave, run_command
from rrhf_fast.stages.loading import quick_imports
from rrhf_fast.stages.next_step import after_scoring
from rrhf_fast.stages.outlet import say


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the judge is down, 2 a mistake in options
    or data, 75 SIGUSR1, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; under a launcher 75 for all signals
    that a scheduler sends."""
    return run_command("score", __doc__, ScoreConfig, _run, arguments)


def _run(config: ScoreConfig) -> int:
    with quick_imports():  # not needed for --help or a misspelt option
        from rrhf_fast.score.run import run
        from rrhf_fast.stages.endpoint import EndpointDown

    try:
        counts = run(config)
    except EndpointDown as error:
        return fail("score", f"{error}; {how_to_resume(config)}", 1)
    totals = {name: count for name, count in counts.items() if count and ":" not in name}
    say(", ".join(f"{count} {name}" for name, count in totals.items()))
    say(f"rows are in {config.output}")
    if counts["unrankable"] == counts["rows"]:
        say("next: sample more, or other, responses: no row has two with different scores")
    elif not config.push_to_hub:
        model, has_unrankable = config.model_name_or_path, counts["unrankable"] > 0
        say(after_scoring(config.output, model, has_unrankable=has_unrankable))
    return 0


if __name__ == "__main__":
    leave(main)
