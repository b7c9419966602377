"""Which queries go into which optimizer step, and into which pack of it; packs are built
in a background thread.

A step is `train_batch_size` queries of a seeded shuffle. Its queries are dealt into as few packs as
the token budget allows; a query is never split, so one that is larger than the budget gets a pack
of its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from rrhf_fast.data.forest import Movable, Pack, PackedForest, build_forest, forest_tokens
from rrhf_fast.data.padded import build_padded, padded_tokens
from rrhf_fast.data.tokenise import TokenisedQuery

STEPS_AHEAD = 4


class PackPlanner:
    """Deals queries into packs of one layout: `packing` is "forest" or "none" (the padded
    layout)."""

    def __init__(
        self,
        queries: Sequence[TokenisedQuery],
        *,
        packing: str,
        max_tokens_per_pack: int,
        pad_token_id: int = 0,
        pad_to_multiple_of: int = 1,
        plan: Callable[[PackedForest], Movable] | None = None,
    ):
        """`pad_to_multiple_of` and `plan` are those of `build_forest`."""
        self.queries = queries
        self.max_tokens = max_tokens_per_pack
        self.packing = packing
        self.sizes = [
            (forest_tokens if packing == "forest" else padded_tokens)(query) for query in queries
        ]
        self._build: Callable[..., Pack] = (
            partial(build_forest, pad_to_multiple_of=pad_to_multiple_of, plan=plan)
            if packing == "forest"
            else partial(build_padded, pad_token_id=pad_token_id)
        )

    def plan(self, query_ids: Sequence[int]) -> list[list[int]]:
        """Deal these queries into packs (lists of query numbers), in an order that depends on
        nothing but them."""
        return (
            self._plan_forest(query_ids)
            if self.packing == "forest"
            else self._plan_padded(query_ids)
        )

    def build(self, query_ids: Sequence[int]) -> Pack:
        """The pack of these queries."""
        return self._build([self.queries[i] for i in query_ids], query_ids)

    def packs(self, query_ids: Sequence[int]) -> list[Pack]:
        """Plan and build."""
        return [self.build(ids) for ids in self.plan(query_ids)]

    def _plan_forest(self, query_ids: Sequence[int]) -> list[list[int]]:
        """First fit, largest first: within 11/9 of the fewest packs possible."""
        packs, room = [], []
        for i in sorted(query_ids, key=lambda i: -self.sizes[i]):
            chosen = next((p for p, left in enumerate(room) if self.sizes[i] <= left), None)
            if chosen is None:
                packs.append([])
                room.append(self.max_tokens)
                chosen = len(packs) - 1
            packs[chosen].append(i)
            room[chosen] -= self.sizes[i]
        return packs

    def _plan_padded(self, query_ids: Sequence[int]) -> list[list[int]]:
        """Queries of like width together, so that little is padding."""
        packs, rows = [], 0
        for i in sorted(query_ids, key=lambda i: -self.queries[i].padded_width):
            query = self.queries[i]
            # Widths fall, so the pack's first query sets its width.
            if (
                packs
                and (rows + len(query.response_ids)) * (self.queries[packs[-1][0]].padded_width - 1)
                <= self.max_tokens
            ):
                packs[-1].append(i)
                rows += len(query.response_ids)
            else:
                packs.append([i])
                rows = len(query.response_ids)
        return packs


def steps_of_packs(
    planner: PackPlanner, *, train_batch_size: int, seed: int, num_steps: int
) -> Iterator[list[Pack]]:
    """Yields the packs of one optimizer step after another, epoch after epoch, each epoch in its
    own seeded order."""
    left, epoch = num_steps, 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(planner.queries)).tolist()
        for start in range(0, len(order), train_batch_size):
            if left == 0:
                return
            yield planner.packs(order[start : start + train_batch_size])
            left -= 1
        epoch += 1


def ahead(steps: Iterator[list[Pack]], *, pin_memory: bool) -> Iterator[list[Pack]]:
    """The same steps, built ahead by a background thread, so that the device never waits.

    A thread will do: a pack takes milliseconds to build, and a process would bring fork, pickling
    and a limit on shared memory with it.
    """

    def build() -> list[Pack] | None:
        packs = next(steps, None)
        return [pack.pin_memory() for pack in packs] if packs and pin_memory else packs

    with ThreadPoolExecutor(1, thread_name_prefix="packs") as worker:
        waiting = deque(worker.submit(build) for _ in range(STEPS_AHEAD))
        while (packs := waiting.popleft().result()) is not None:
            waiting.append(worker.submit(build))
            yield packs


def steps_per_epoch(num_queries: int, train_batch_size: int) -> int:
    """Optimizer steps of one epoch; the last one may hold fewer queries."""
    return -(-num_queries // train_batch_size)
