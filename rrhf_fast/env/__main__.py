"""Print what a bug report needs: versions, devices, threads, attention, settings.

rrhf-fast env
rrhf-fast env --json

Nothing is sent anywhere. Of environment variables the names are printed, and the values of a few
that hold numbers.
"""

from dataclasses import dataclass

from rrhf_fast.stages.command import leave, run_command
from rrhf_fast.stages.files import to_json
from rrhf_fast.stages.loading import quick_imports
from rrhf_fast.stages.outlet import say


@dataclass
class EnvConfig:
    """Output"""

    json: bool = False
    """Print JSON."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 for a mistake in options."""
    return run_command("env", __doc__, EnvConfig, _run, arguments)


def _run(config: EnvConfig) -> int:
    with quick_imports():  # of torchao, which prints warnings; not needed for --help
        from rrhf_fast.env.facts import as_text, facts

        found = facts()
    say(to_json(found, indent=2) if config.json else as_text(found))
    return 0


if __name__ == "__main__":
    leave(main)
