"""Run the whole method in rounds: sample, score, train, evaluate, and again with the new model.

python -m rrhf_fast.iterate                                # the embedded demo, offline
python -m rrhf_fast.iterate --model_name_or_path M --data rows.jsonl --eval_data held_out.jsonl \\
    --reward_model_name_or_path R --rounds 3 --output_dir out --train.learning_rate 1e-5
python -m rrhf_fast.iterate --config rounds.yaml --kl_coef 0.01 --steps_per_round 32

If it is killed, the same command with its --output_dir resumes.
"""

from rrhf_fast.iterate import IterateConfig
from rrhf_fast.stages.command import PREEMPTED, fail, leave, run_command
from rrhf_fast.stages.loading import quick_imports


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 a stage failed, 2 a mistake in options or
    data, 75 stopped by SIGUSR1, and by SIGTERM or SIGHUP while training or among several processes,
    130 Ctrl-C, 143 and 129 SIGTERM and SIGHUP elsewhere."""
    return run_command("iterate", __doc__, IterateConfig, _run, arguments)


def _run(config: IterateConfig) -> int:
    with quick_imports():  # not needed for --help or a misspelt option
        from rrhf_fast.iterate.run import Preempted, run
        from rrhf_fast.model.save import SaveFailed
        from rrhf_fast.stages.endpoint import EndpointDown
        from rrhf_fast.train.backward import OutOfMemory
        from rrhf_fast.train.step import NotFinite

    try:
        run(config)
    except (EndpointDown, NotFinite, OutOfMemory, SaveFailed, Preempted) as error:
        again = "what is done is kept: run the same command again, with its --output_dir"
        return fail("iterate", f"{error}; {again}", PREEMPTED if type(error) is Preempted else 1)
    return 0


if __name__ == "__main__":
    leave(main)
