"""Train a causal language model on ranked responses by RRHF (arXiv 2304.05302).

python -m rrhf_fast.train                                  # the embedded demo, offline
python -m rrhf_fast.train --model_name_or_path M --train_data rows.jsonl --eval_fraction 0.1
python -m rrhf_fast.train --config config.yaml --seed 1    # options override the file
python -m rrhf_fast.train --print_config > config.yaml     # such a file, with every option
torchrun --nproc_per_node 8 -m rrhf_fast.train ...         # weights sharded over 8 GPUs

Writes the model, metrics.jsonl and training.png to output_dir. Ctrl-C stops early and saves.
"""

from rrhf_fast.stages.command import PREEMPTED, fail, how_to_resume, leave, run_command
from rrhf_fast.stages.loading import quick_imports
from rrhf_fast.stages.next_step import after_training
from rrhf_fast.stages.outlet import say
from rrhf_fast.train import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the run failed, 2 a mistake in options or
    data, 75 stopped by SIGTERM, SIGUSR1 or SIGHUP (from the first step on with a checkpoint to
    resume from), 130 Ctrl-C."""
    signals = ("SIGTERM", "SIGHUP", "SIGUSR1")
    return run_command("train", __doc__, TrainConfig, _run, arguments, preempted_by=signals)


def _run(config: TrainConfig) -> int:
    with quick_imports():  # not needed for --help or a misspelt option
        from rrhf_fast.model.save import SaveFailed
        from rrhf_fast.train.backward import OutOfMemory
        from rrhf_fast.train.prepare import with_demo
        from rrhf_fast.train.step import NotFinite
        from rrhf_fast.train.trainer import run

    try:
        result = run(config)
    except SaveFailed as error:
        return fail("train", f"{error}; {how_to_resume(config)}", 1)
    except (NotFinite, OutOfMemory) as error:
        return fail("train", error, 1)
    if result.preempted or result.interrupted:
        return PREEMPTED if result.preempted else 130
    if result.steps and not config.push_to_hub:
        config = with_demo(config) if config.model_name_or_path is None else config
        say(after_training(result.output_dir, config))
    return 0


if __name__ == "__main__":
    leave(main)
