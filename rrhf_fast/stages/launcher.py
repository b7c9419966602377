"""What a launcher, torchrun or Slurm's srun, says about this process by environment variables."""

import os
import re
from typing import NamedTuple


class Launched(NamedTuple):
    """This process's position: without a launcher, the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    by_launcher: bool = False


def launched() -> Launched:
    """The position that the environment gives. Raises ValueError, with the variable's name, for
    what is no number, and for ranks that cannot be."""
    _adopt_srun()
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1, least=1)
    by_launcher = "RANK" in os.environ
    if size > 1 and not by_launcher:
        raise ValueError(f"RANK: missing, but WORLD_SIZE is {size} (torchrun sets both)")
    if rank >= size:
        raise ValueError(f"RANK: expected less than WORLD_SIZE, {size}, found {rank}")
    if by_launcher and _number("MASTER_PORT", 0) > 65535:
        raise ValueError(f"MASTER_PORT: expected a port, found {os.environ['MASTER_PORT']}")
    # Without a launcher others may have set it, to -1 for example.
    return Launched(rank, size, _number("LOCAL_RANK", 0) if by_launcher else 0, by_launcher)


def is_first() -> bool:
    """Whether this process speaks for the run: the first rank, or the only process."""
    try:
        return launched().rank == 0
    except ValueError:  # whoever needs more says so
        return True


def _adopt_srun() -> None:
    """Set the variables that PyTorch reads, as torchrun does, from those of srun: without them
    every task of a step would be a run of its own, and all would write the same files. Variables
    that are set already stay: torchrun under srun, or a script that sets them itself."""
    env = os.environ
    if "RANK" in env or _number("SLURM_STEP_NUM_TASKS", 1) == 1:
        return
    own = _number("SLURM_JOB_ID", 0) * 10 + _number("SLURM_STEP_ID", 0)  # jobs may share a machine
    ours = {
        "RANK": env.get("SLURM_PROCID", ""),
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env.get("SLURM_LOCALID", ""),
        "MASTER_ADDR": _first_host(env.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": str(20000 + own % 20000),
    }
    for name, value in ours.items():
        env.setdefault(name, value)


def _first_host(hosts: str) -> str:
    """The first host of one of Slurm's lists, such as gpu[07-09,12]-ib,login1: gpu07-ib."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", hosts).group()
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise ValueError(f"{name}: expected a number, {least} or more, found {text!r:.40}")
    return int(text)
