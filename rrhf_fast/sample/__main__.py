"""Add responses to rows: from models, from an endpoint, or those that the rows already hold.

python -m rrhf_fast.sample --data rows.jsonl --output sampled.jsonl --model_name_or_path M
python -m rrhf_fast.sample --config policies.yaml          # several policies and models
torchrun --nproc_per_node 8 -m rrhf_fast.sample --config policies.yaml    # prompts over 8 GPUs
python -m rrhf_fast.sample --data rows.jsonl --output sampled.jsonl --model_name_or_path M \\
    --policies '[{method: diverse_beam, temperature: 0.8}, {method: provided}]'

If it is killed, the same command resumes.
"""

from rrhf_fast.sample import SampleConfig
from rrhf_fast.stages.command import fail, how_to_resume, leave, run_command
from rrhf_fast.stages.loading import quick_imports
from rrhf_fast.stages.next_step import after_sampling
from rrhf_fast.stages.outlet import say


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 an endpoint is down, 2 a mistake in options
    or data, 75 SIGUSR1, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; under a launcher 75 for all signals
    that a scheduler sends."""
    return run_command("sample", __doc__, SampleConfig, _run, arguments)


def _run(config: SampleConfig) -> int:
    with quick_imports():  # not needed for --help or a misspelt option
        from rrhf_fast.sample.run import run
        from rrhf_fast.stages.endpoint import EndpointDown

    try:
        counts = run(config)
    except EndpointDown as error:
        return fail("sample", f"{error}; {how_to_resume(config)}", 1)
    totals = {name: count for name, count in counts.items() if count and ":" not in name}
    say(", ".join(f"{count} {name}" for name, count in totals.items()))
    say(f"rows are in {config.output}")
    has_lost = any(counts[name] for name in ("unfinished", "empty", "duplicates"))
    if has_lost and counts["unrankable"] == counts["rows"]:
        say("next: sample again, longer or more: no row has two responses to rank")
    elif not config.push_to_hub:
        say(after_sampling(config.output))
    return 0


if __name__ == "__main__":
    leave(main)
