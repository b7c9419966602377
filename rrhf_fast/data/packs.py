"""Which queries go into which optimizer step, and into which pack of it; packs are built
in a background thread.

A step is `train_batch_size` queries of a seeded shuffle. Its queries are dealt into as few packs as
the token budget allows; a query is never split, so one that is larger than the budget gets a pack
of its own.

With several ranks (processes) every rank makes the same plan of the whole step and builds its own
part of it, so ranks need not talk about it. All have the same number of packs, because each pack
gathers weights from every rank; where packs run out, a *filler* stands in, which counts for
nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from rrhf_fast.data.forest import Movable, Pack, PackedForest, build_forest, forest_tokens
from rrhf_fast.data.padded import build_padded, padded_tokens
from rrhf_fast.data.tokenise import TokenisedQuery

STEPS_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """One rank's part of an optimizer step."""

    packs: list[Pack]  # as many on every rank
    num_queries: int  # of the whole step, over all ranks


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

    def plan(self, query_ids: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
        """Deal these queries into packs (lists of query numbers) of at most `max_tokens` (default:
        the planner's), in an order that depends on nothing but them."""
        plan = self._plan_forest if self.packing == "forest" else self._plan_padded
        return plan(query_ids, max_tokens or self.max_tokens)

    def plan_ranks(self, query_ids: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
        """Deal these queries to ranks: for each rank its packs, as many for every rank; an empty
        one stands for a filler.

        Packs that ranks run side by side are of like size, since the slowest decides: the budget
        is lowered as long as the number of packs does not rise (MULTIFIT, Coffman et al. 1978).
        """
        packs = self.plan(query_ids)
        if num_ranks == 1:
            return [packs]
        rounds = -(-len(packs) // num_ranks)
        low, high = 0, self.max_tokens
        while high - low > 1 + high // 100:
            middle = (low + high) // 2
            tighter = self.plan(query_ids, middle)
            if len(tighter) <= rounds * num_ranks:
                packs, high = tighter, middle
            else:
                low = middle
        packs = sorted(packs, key=self.num_tokens, reverse=True)
        packs += [[]] * (rounds * num_ranks - len(packs))
        ranks = [[] for _ in range(num_ranks)]
        totals = [0] * num_ranks
        for start in range(0, len(packs), num_ranks):
            # The rank with the least so far takes the largest of the round.
            order = sorted(range(num_ranks), key=totals.__getitem__)
            for rank, pack in zip(order, packs[start : start + num_ranks], strict=True):
                ranks[rank].append(pack)
                totals[rank] += self.num_tokens(pack)
        return ranks

    def num_tokens(self, query_ids: Sequence[int]) -> int:
        """Tokens of the pack of these queries."""
        if self.packing == "forest" or not query_ids:
            return sum(self.sizes[i] for i in query_ids)
        queries = [self.queries[i] for i in query_ids]
        width = max(query.padded_width for query in queries) - 1
        return width * sum(len(query.response_ids) for query in queries)

    def build(self, query_ids: Sequence[int]) -> Pack:
        """The pack of these queries; of none, a filler."""
        if not query_ids:
            smallest = min(range(len(self.queries)), key=self.sizes.__getitem__)
            return replace(self.build([smallest]), query_ids=torch.empty(0, dtype=torch.int64))
        return self._build([self.queries[i] for i in query_ids], query_ids)

    def packs(self, query_ids: Sequence[int]) -> list[Pack]:
        """Plan and build, for one rank."""
        return self.batch(query_ids).packs

    def batch(self, query_ids: Sequence[int], rank: int = 0, num_ranks: int = 1) -> Batch:
        """Plan for all ranks, build for one."""
        packs = [self.build(ids) for ids in self.plan_ranks(query_ids, num_ranks)[rank]]
        return Batch(packs, len(query_ids))

    def _plan_forest(self, query_ids: Sequence[int], max_tokens: int) -> list[list[int]]:
        """First fit, largest first: within 11/9 of the fewest packs possible."""
        packs, room = [], []
        for i in sorted(query_ids, key=lambda i: -self.sizes[i]):
            chosen = next((p for p, left in enumerate(room) if self.sizes[i] <= left), None)
            if chosen is None:
                packs.append([])
                room.append(max_tokens)
                chosen = len(packs) - 1
            packs[chosen].append(i)
            room[chosen] -= self.sizes[i]
        return packs

    def _plan_padded(self, query_ids: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Queries of like width together, so that little is padding."""
        packs, rows = [], 0
        for i in sorted(query_ids, key=lambda i: -self.queries[i].padded_width):
            query = self.queries[i]
            # Widths fall, so the pack's first query sets its width.
            if (
                packs
                and (rows + len(query.response_ids)) * (self.queries[packs[-1][0]].padded_width - 1)
                <= max_tokens
            ):
                packs[-1].append(i)
                rows += len(query.response_ids)
            else:
                packs.append([i])
                rows = len(query.response_ids)
        return packs


def batches(
    planner: PackPlanner,
    *,
    train_batch_size: int,
    seed: int,
    num_steps: int,
    first_step: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[Batch]:
    """Yields one rank's part of one optimizer step after another, epoch after epoch, each epoch in
    its own seeded order. `first_step` steps are left out, as if they had been done."""
    per_epoch = steps_per_epoch(len(planner.queries), train_batch_size)
    order = []
    for step in range(first_step, num_steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or not order:
            order = np.random.default_rng([seed, epoch]).permutation(len(planner.queries)).tolist()
        queries = order[place * train_batch_size : (place + 1) * train_batch_size]
        yield planner.batch(queries, rank, num_ranks)


def ahead(steps: Iterator[Batch], *, pin_memory: bool) -> Iterator[Batch]:
    """The same steps, built ahead by a background thread, so that the device never waits.

    A thread will do: a pack takes milliseconds to build, and a process would bring fork, pickling
    and a limit on shared memory with it.
    """

    def build() -> Batch | None:
        batch = next(steps, None)
        if batch is None or not pin_memory:
            return batch
        return replace(batch, packs=[pack.pin_memory() for pack in batch.packs])

    with ThreadPoolExecutor(1, thread_name_prefix="packs") as worker:
        waiting = deque(worker.submit(build) for _ in range(STEPS_AHEAD))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(worker.submit(build))
            yield batch


def steps_per_epoch(num_queries: int, train_batch_size: int) -> int:
    """Optimizer steps of one epoch; the last one may hold fewer queries."""
    return -(-num_queries // train_batch_size)
