"""What a launcher such as torchrun says about this process, by environment variables."""

import os
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


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise ValueError(f"{name}: expected a number, {least} or more, found {text!r:.40}")
    return int(text)
