"""How far a run is, in lines: for logs, where a progress bar would be thousands of them in one."""

import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_BETWEEN = 30.0


class LogLines:
    """Prints a line about the first step it is shown, then at most one every 30 seconds, and one
    about the last step."""

    def __init__(self, step: int, num_steps: int, say: Callable[[str], None]):
        """`step`: how many of `num_steps` are done already."""
        self._first, self._num_steps, self._say = step, num_steps, say
        self._started, self._next = time.monotonic(), 0.0

    def show(self, record: dict[str, float]) -> None:
        """Take the metrics of a step that is done."""
        now, step = time.monotonic(), int(record["step"])
        if now < self._next and step < self._num_steps:
            return
        self._next = now + SECONDS_BETWEEN
        elapsed = now - self._started
        left = elapsed / max(1, step - self._first) * (self._num_steps - step)
        times = f"{tqdm.format_interval(elapsed)} elapsed, {tqdm.format_interval(left)} left"
        self._say(f"step {step:,} of {self._num_steps:,}: {in_short(record)}, {times}")


def in_short(record: dict[str, float]) -> str:
    """The metrics that a watcher wants first."""
    return (
        f"loss {record['loss']:.3f}, accuracy {record['rewards/accuracies']:.2f}, "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )
