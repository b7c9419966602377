"""Tile sizes, warps and stages of every kernel, by architecture and element size: data, not code.

`python -m rrhf_fast.kernels.report` compiles all of them, without a GPU, and prints registers,
spills, shared memory and matrix instructions; tests/kernels/test_static.py asserts the same.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One program computes [block_m, block_n] logits, block_k of the hidden size at a time."""

    block_m: int  # edges
    block_n: int  # tokens of the vocabulary
    block_k: int  # of the hidden size
    num_warps: int
    num_stages: int  # tiles in flight
    group_m: int = 8  # tiles of edges that share a tile of the weight in the L2 cache


# (kernel, lowest compute capability, bytes an element). The highest capability that the device has
# wins, so a newer device runs the newest row that there is.
TILES = {
    # Ampere: no TMA, mma.sync; 164 KB of shared memory on sm_80 (99 KB on sm_86 and sm_89, for
    # which 3 stages of 48 KB would be too much).
    ("forward", 80, 2): Tile(128, 128, 32, num_warps=8, num_stages=3),
    ("dlogits", 80, 2): Tile(128, 128, 32, num_warps=8, num_stages=3),
    # Float32 is for exactness: small tiles, because IEEE products run on the ordinary cores.
    ("forward", 80, 4): Tile(64, 64, 32, num_warps=8, num_stages=2),
    ("dlogits", 80, 4): Tile(64, 64, 32, num_warps=8, num_stages=2),
    # Hopper: TMA and wgmma; 128 x 256 is the largest accumulator that does not spill, and four
    # stages fill the 227 KB of shared memory. The backward stages its store there too.
    ("forward", 90, 2): Tile(128, 256, 64, num_warps=8, num_stages=4),
    ("dlogits", 90, 2): Tile(128, 256, 64, num_warps=8, num_stages=3),
    # Blackwell: the accumulator lives in tensor memory.
    ("forward", 100, 2): Tile(128, 256, 64, num_warps=8, num_stages=4),
    ("dlogits", 100, 2): Tile(128, 256, 64, num_warps=8, num_stages=3),
}


def choose(kernel: str, capability: int, itemsize: int) -> Tile:
    """The tile of a kernel ("forward", "dlogits") on a device of this compute capability (90 for
    9.0) for elements of `itemsize` bytes."""
    rows = [row for row in TILES if row[::2] == (kernel, itemsize) and row[1] <= capability]
    return TILES[max(rows)]
