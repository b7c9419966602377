"""How a command ends: its last line and its exit code."""

import re
import sys
import time

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.launcher import is_first

# EX_TEMPFAIL of sysexits.h: try again later.
PREEMPTED = 75
# Seconds that ranks other than the first wait before they report a problem.
_WAIT = 10
# Characters of an error line, at most, and of a word in it.
_LONGEST_LINE, _LONGEST_WORD = 2000, 400


def how_to_resume(config: object) -> str:
    """What to do after a command stopped half-way, for its error line."""
    how = ", without --overwrite" if getattr(config, "overwrite", False) else ""
    if getattr(config, "output_dir", "") is None:
        how = ", with its --output_dir"
    if getattr(config, "resume_from_checkpoint", "latest") != "latest":
        how += ", with --resume_from_checkpoint latest"
    return f"what is done is kept: run the same command again{how}"


def fail(name: str, problem: object, code: int) -> int:
    """Print the problem as one line; returns the exit code. Nearly always all ranks have the same
    problem. The first one reports it, and the launcher ends the others while they wait."""
    if not is_first():
        time.sleep(_WAIT)
        if isinstance(problem, BaseException) and is_on_all_ranks(problem):
            return code
    text = re.sub(rf"\S{{{_LONGEST_WORD},}}", _shortened, one_line(problem, None))
    if len(text) > _LONGEST_LINE:
        text = f"{text[: _LONGEST_LINE - 3]}..."
    print(f"rrhf_fast.{name}: error: {text}", file=sys.stderr)
    return code


def _shortened(word: re.Match) -> str:
    return f"{word[0][:100]}...{word[0][-100:]}"


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether `Ranks` raised this error on every rank, so that the ranks are still in step."""
    return getattr(error, "on_all_ranks", False)
