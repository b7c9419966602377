"""The commands under one name: `rrhf-fast train ...` is `python -m rrhf_fast.train ...`.

rrhf-fast --help                                           # the commands, a line each
rrhf-fast train --help                                     # the options of one
python -m rrhf_fast train ...                              # without the script on the PATH
"""

import os
import runpy
import sys
from difflib import get_close_matches

from rrhf_fast import __version__
from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.command import leave
from rrhf_fast.stages.launcher import is_first
from rrhf_fast.stages.outlet import Outlet

COMMANDS = {
    "train": "train a causal language model on ranked responses",
    "sample": "add responses to rows: from models, an endpoint, or those that the rows hold",
    "score": "add scores to responses: by a reward model, a function, a judge or the policy",
    "evaluate": "measure a model by fresh samples of held-out prompts",
    "iterate": "sample, score, train and evaluate in rounds",
    "export": "turn a checkpoint or adapters into a folder that from_pretrained and vLLM read",
    "env": "print versions, devices and settings, for a bug report",
    "kernels.report": "compile every Triton kernel, and print registers, spills and shared memory",
    "kernels.tune": "find the fastest tiles for this GPU",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first word names, with the other words as its command line. Returns
    0 after --help or --version, and 2 where there is no such command; a command ends the process
    with its own exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        return _print(_page())
    if name == "--version":
        return _print(f"rrhf-fast {__version__}\n")
    if name in COMMANDS:
        sys.argv = [f"rrhf-fast {name}", *rest]
        # As python -m does, which also tells child processes what to import.
        runpy.run_module(f"rrhf_fast.{name}", run_name="__main__", alter_sys=True)
        return 0
    near = get_close_matches(name, COMMANDS, 1)
    how = f"did you mean {near[0]}?" if near else "rrhf-fast --help lists them"
    expected = "expected a command first" if name.startswith("-") else "no such command"
    problem = f"{one_line(name, 80)}: {expected}" if name else "expected a command, found none"
    if is_first():
        print(f"rrhf-fast: error: {problem} ({how})", file=sys.stderr)
    return 2


def _page() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rrhf-fast COMMAND [--config FILE] [--OPTION VALUE ...]\n",
            "Fast training of language models on ranked responses (RRHF).\n",
            *lines,
            "\nrrhf-fast COMMAND --help lists the options of a command.",
            "rrhf-fast COMMAND is python -m rrhf_fast.COMMAND, which torchrun needs.\n",
        ]
    )


def _print(text: str) -> int:
    out = Outlet(sys.stdout)
    out.write(text)
    out.flush()
    if out.problem is None:
        return 0
    print(f"rrhf-fast: error: standard output: {out.problem}", file=sys.stderr)
    return 1


def script() -> None:
    """Run as the console script, which finds a user's modules in the folder where it is started, as
    `python -m` does, but after all that is installed."""
    sys.path.append(os.getcwd())
    leave(main)


if __name__ == "__main__":
    script()
