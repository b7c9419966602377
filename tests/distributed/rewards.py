"""A slow reward function that leaves a trace of each call: files in the folder TRACES."""

import os
import time
from pathlib import Path


def slow(prompts: list, responses: list[str]) -> list[float]:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "alone"))
    with Path(os.environ["TRACES"], f"{rank}.{os.getpid()}").open("a") as trace:
        trace.write("".join(f"{response!r}\n" for response in responses))
    time.sleep(0.1)
    return [float(len(response)) for response in responses]


def fails_on_rank_1(prompts: list, responses: list[str]) -> list[float]:
    if os.environ.get("RANK") == "1":
        raise KeyError("oops")
    return slow(prompts, responses)
