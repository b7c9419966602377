"""Train a causal language model by RRHF.

python -m rrhf_fast.train                                  # the embedded demo, offline
python -m rrhf_fast.train --model_name_or_path M --train_data rows.jsonl --eval_fraction 0.1
python -m rrhf_fast.train --config config.yaml --seed 1    # options override the file
python -m rrhf_fast.train --print_config                   # every option's value, as YAML
torchrun --nproc_per_node 8 -m rrhf_fast.train ...         # weights sharded over 8 GPUs
"""

import sys
from types import ModuleType

from rrhf_fast.command import PREEMPTED, fail, leave, run_command
from rrhf_fast.config import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the run failed, 2 a mistake in options or
    data, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint to resume from, 130 Ctrl-C."""
    return run_command("train", __doc__, TrainConfig, _run, arguments, many_processes=True)


def _run(config: TrainConfig) -> int:
    # Heavy, and not needed for --help or a misspelt option.
    from rrhf_fast.engine.backward import OutOfMemory
    from rrhf_fast.engine.loop import NotFinite, train
    from rrhf_fast.engine.save import SaveFailed

    try:
        result = train(config)
    except (NotFinite, OutOfMemory, SaveFailed) as error:
        return fail("train", error, 1)
    return PREEMPTED if result.preempted else 130 if result.interrupted else 0


class _CallableModule(ModuleType):
    """`rrhf_fast.train` is this module and the function that it runs, whichever was imported
    first."""

    def __call__(self, config: TrainConfig):
        from rrhf_fast.engine.loop import train

        return train(config)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    leave(main)
