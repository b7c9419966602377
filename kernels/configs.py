"""Tile sizes, warps and stages of every kernel, by architecture and element size: data, not code.

`python -m rrhf_fast.kernels.report` compiles all of them, without a GPU, and prints registers,
spills, shared memory and matrix instructions; tests/kernels/test_static.py asserts the same.
`python -m rrhf_fast.kernels.tune` times other tiles on the current GPU and writes the fastest to a
file; RRHF_FAST_TILES=file overrides the tiles below with it.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Tile:
    """One program computes [block_m, block_n] logits, block_k hidden units at a time."""

    block_m: int  # edges
    block_n: int  # tokens of the vocabulary
    block_k: int  # hidden units
    num_warps: int
    num_stages: int  # tiles in flight
    tma: bool = True  # load through the tensor memory accelerator (Hopper and newer)
    group_m: int = 8  # tiles of edges that share a tile of the weight in the L2 cache


# (kernel, compute capability of the family's first member, bytes per element).
TILES = {
    # Ampere has no TMA. The largest tiles that do not spill, even with a bias or a softcap; their
    # 96 KB of shared memory also fit consumer cards (8.6, 8.9, 12.0).
    ("forward", 80, 2): Tile(128, 128, 64, num_warps=8, num_stages=4, tma=False),
    ("dlogits", 80, 2): Tile(128, 128, 64, num_warps=8, num_stages=4, tma=False),
    # Float32 is for exactness. Small tiles, because IEEE products run on the ordinary cores, which
    # hold operands in registers.
    ("forward", 80, 4): Tile(64, 64, 16, num_warps=8, num_stages=2, tma=False),
    ("dlogits", 80, 4): Tile(64, 64, 16, num_warps=8, num_stages=2, tma=False),
    # Hopper: TMA and wgmma. 128 x 256 is the largest accumulator that does not spill, and four
    # stages of it fill the shared memory.
    ("forward", 90, 2): Tile(128, 256, 64, num_warps=8, num_stages=4),
    ("dlogits", 90, 2): Tile(128, 256, 64, num_warps=8, num_stages=4),
    # Blackwell: the accumulator is in tensor memory, but the epilogue reads it into registers,
    # where 128 x 256 spills.
    ("forward", 100, 2): Tile(128, 128, 64, num_warps=8, num_stages=4),
    ("dlogits", 100, 2): Tile(128, 128, 64, num_warps=4, num_stages=4),
}


def choose(kernel: str, capability: int, itemsize: int) -> Tile:
    """The tile of a kernel ("forward", "dlogits") on a device of this compute capability (90 for
    9.0) for elements of `itemsize` bytes.

    Consumer Blackwell (12.x) has neither tensor memory nor 227 KB of shared memory, so it uses
    Ampere's rows, as does every device not listed.
    """
    family = {9: 90, 10: 100}.get(capability // 10, 80)
    tuned = _tuned_tiles(os.environ.get("RRHF_FAST_TILES"))
    if (kernel, capability, itemsize) in tuned:
        return tuned[kernel, capability, itemsize]
    return TILES.get((kernel, family, itemsize)) or TILES[kernel, 80, itemsize]


@cache
def _tuned_tiles(file: str | None) -> dict[tuple[str, int, int], Tile]:
    """Read the output of `tune`: a list of {"kernel", "capability", "itemsize", "tile"}."""
    if not file:
        return {}
    try:
        return {
            (row["kernel"], row["capability"], row["itemsize"]): Tile(**row["tile"])
            for row in json.loads(Path(file).read_text())
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        expected = "expected a file written by `python -m rrhf_fast.kernels.tune`"
        raise ValueError(f"RRHF_FAST_TILES: {file}: {expected} ({error})") from error
