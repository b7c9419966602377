"""Train a causal language model by RRHF.

python -m rrhf_fast.train                                  # the embedded demo, offline
python -m rrhf_fast.train --model_name_or_path M --train_data rows.jsonl --eval_fraction 0.1
python -m rrhf_fast.train --config config.yaml --seed 1    # options override the file
python -m rrhf_fast.train --print_config                   # every option's value, as YAML
"""

import sys
from types import ModuleType

from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    set_parsing_settings,
)

from rrhf_fast.config import TrainConfig


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of the description, which are commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.strip()


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """Options of the command line (default: this process's) as a config; raises ArgumentError."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m rrhf_fast.train",
        description=__doc__,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,  # a later option could change what an abbreviation means
    )
    parser.add_argument("--config", action="config", help="YAML file of options.")
    parser.add_class_arguments(TrainConfig)
    options = parser.parse_args(arguments).as_dict()
    options.pop("config")
    return TrainConfig(**options)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the run failed, 2 a mistake in options or
    data, 130 Ctrl-C."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # the loop catches those that come later
        return _fail("interrupted before training began", 130)


def _run(arguments: list[str] | None) -> int:
    try:
        config = parse_config(arguments)
        # Heavy, and not needed for --help or a misspelt option.
        from rrhf_fast.engine.loop import NotFinite, train
    except (ArgumentError, ValueError) as error:
        return _fail(error, 2)
    try:
        return 130 if train(config).interrupted else 0
    except ValueError as error:
        return _fail(error, 2)
    except NotFinite as error:
        return _fail(error, 1)


def _fail(problem: object, code: int) -> int:
    print(f"rrhf_fast.train: error: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


class _CallableModule(ModuleType):
    """`rrhf_fast.train` is this module and the function that it runs, whichever was imported
    first."""

    def __call__(self, config: TrainConfig):
        from rrhf_fast.engine.loop import train

        return train(config)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
