"""Time tiles of the head's kernels on the current GPU, and write the fastest to a file.

    python -m rrhf_fast.kernels.tune --edges 8192 --hidden_size 4096 --vocab_size 128256 tiles.json
    RRHF_FAST_TILES=tiles.json python -m rrhf_fast.train ...

Takes minutes: every candidate is compiled. Tiles that fail to compile, or exceed the device's
resources, are skipped.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from rrhf_fast.kernels import linear_logprob
from rrhf_fast.kernels.configs import Tile


def candidates(capability: int) -> Iterator[Tile]:
    """Tiles to try on a device of this compute capability (90 for 9.0)."""
    sizes = itertools.product((64, 128, 256), (128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5))
    for block_m, block_n, block_k, num_warps, num_stages in sizes:
        yield Tile(block_m, block_n, block_k, num_warps, num_stages, tma=capability >= 90)


def tune(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    tiles: Iterable[Tile],
    report: Callable[[str], None] = print,
) -> list[dict]:
    """The fastest tile of each kernel for states [E, H], weight [V, H], targets [E], as rows for
    RRHF_FAST_TILES."""
    tiles = list(tiles)
    capability = linear_logprob.capability(states)
    lse, grad = torch.zeros(2, len(states), device=states.device)
    slice_ = states.new_empty(len(states), min(8192, len(weight)) // 8 * 8)
    head = (states, weight, None, targets)
    runs = {
        "forward": lambda tile: linear_logprob.forward(*head, None, 1.0, tile=tile),
        "dlogits": lambda tile: linear_logprob.dlogits(
            slice_, None, *head, lse, grad, None, 1.0, 0, tile
        ),
    }
    rows = []
    for kernel, run in runs.items():
        seconds = {}
        for tile in tiles:
            try:
                seconds[tile] = _seconds(lambda run=run, tile=tile: run(tile))
            except Exception as error:  # compiler and device raise any type
                report(f"{kernel} {tile}: {type(error).__name__}")
            else:
                report(f"{kernel} {tile}: {seconds[tile] * 1e3:.3f} ms")
        if not seconds:
            raise RuntimeError(f"{kernel}: none of {len(tiles)} tiles runs on this device")
        best = min(seconds, key=seconds.get)
        row = {"kernel": kernel, "capability": capability, "itemsize": states.itemsize}
        rows.append(row | {"tile": asdict(best)})
    return rows


def _seconds(run: Callable[[], object], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])  # the first compiles


def main() -> None:
    """Tune on random data of the given sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON output, for RRHF_FAST_TILES")
    parser.add_argument("--edges", type=int, default=8192)
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=128_256)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    shapes = ((options.edges, options.hidden_size), (options.vocab_size, options.hidden_size))
    states, weight = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    targets = torch.randint(options.vocab_size, (options.edges,), device="cuda")
    rows = tune(states, weight, targets, candidates(linear_logprob.capability(states)))
    options.file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
