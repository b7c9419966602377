"""Queries -> optimizer steps and their packs, which a background thread builds.

A step is `train_batch_size` queries of a seeded shuffle, grouped into as few packs as the token
budget allows. A query is never split, so one that exceeds the budget gets a pack of its own.

With several ranks (processes), every rank deals the packs of the whole step to all ranks in the
same way and builds only its own, which needs no communication. All ranks get the same number of
packs, because each pack gathers weights from every rank; *fillers*, which add nothing to the loss,
make up the number.
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

    packs: list[Pack]  # the same number on every rank
    num_queries: int  # of the whole step, over all ranks


class PackPlanner:
    """Groups queries into packs of one layout, deals packs to ranks, and builds them. `packing` is
    "forest" or "none" (the padded layout)."""

    def __init__(
        self,
        queries: Sequence[TokenisedQuery],
        *,
        packing: str,
        max_tokens_per_pack: int,
        pad_token_id: int = 0,
        pad_to_multiple_of: int = 1,
        plan: Callable[[PackedForest], Movable] | None = None,
        sizes: np.ndarray | None = None,
    ):
        """`sizes`: the tokens of each query in a pack, if they are known. For `pad_to_multiple_of`
        and `plan`, see `build_forest`."""
        self.queries = queries
        self.max_tokens = max_tokens_per_pack
        self.packing = packing
        if sizes is None:
            tokens = forest_tokens if packing == "forest" else padded_tokens
            sizes = np.array([tokens(query) for query in queries], dtype=np.int64)
        self.sizes = sizes
        # Numbers of queries -> the `reference_logps` of their pack.
        self.reference: Callable[[Sequence[int]], torch.Tensor] | None = None
        self._build: Callable[..., Pack] = (
            partial(build_forest, pad_to_multiple_of=pad_to_multiple_of, plan=plan)
            if packing == "forest"
            else partial(build_padded, pad_token_id=pad_token_id)
        )

    def group(self, query_ids: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
        """Group these queries into packs (lists of query numbers) of at most `max_tokens` (default:
        the planner's). The result depends only on the queries and their order."""
        group = self._group_forest if self.packing == "forest" else self._group_padded
        return group(query_ids, max_tokens or self.max_tokens)

    def deal(self, query_ids: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
        """Group these queries into packs and deal these to ranks. Returns the packs of each rank,
        the same number for all; an empty pack stands for a filler.

        Packs that run at the same time have similar sizes, because all ranks wait for the largest:
        the budget is lowered as long as no rank needs another pack (MULTIFIT, Coffman et al. 1978).
        """
        packs = self.group(query_ids)
        if num_ranks == 1:
            return [packs]
        rounds = -(-len(packs) // num_ranks)
        # Find the smallest budget that needs no further round, within 1 %.
        low, high = 0, self.max_tokens
        while high - low > 1 + high // 100:
            middle = (low + high) // 2
            smaller = self.group(query_ids, middle)
            if len(smaller) <= rounds * num_ranks:
                packs, high = smaller, middle
            else:
                low = middle
        packs = sorted(packs, key=self.num_tokens, reverse=True)
        packs += [[]] * (rounds * num_ranks - len(packs))
        ranks = [[] for _ in range(num_ranks)]
        totals = [0] * num_ranks
        for start in range(0, len(packs), num_ranks):
            # The rank with the fewest tokens so far gets the largest pack of the round.
            order = sorted(range(num_ranks), key=totals.__getitem__)
            for rank, pack in zip(order, packs[start : start + num_ranks], strict=True):
                ranks[rank].append(pack)
                totals[rank] += self.num_tokens(pack)
        return ranks

    def num_tokens(self, query_ids: Sequence[int]) -> int:
        """Return the tokens of the pack of these queries."""
        if self.packing == "forest" or not query_ids:
            return int(self.sizes[list(query_ids)].sum()) if query_ids else 0
        queries = [self.queries[i] for i in query_ids]
        width = max(query.padded_width for query in queries) - 1
        return width * sum(len(query.response_ids) for query in queries)

    def build(self, query_ids: Sequence[int]) -> Pack:
        """Build the pack of these queries; a filler if there are none."""
        if not query_ids:
            smallest = int(self.sizes.argmin())
            return replace(self.build([smallest]), query_ids=torch.empty(0, dtype=torch.int64))
        pack = self._build([self.queries[i] for i in query_ids], query_ids)
        if self.reference is None:
            return pack
        return replace(pack, reference_logps=self.reference(query_ids))

    def packs(self, query_ids: Sequence[int]) -> list[Pack]:
        """Group these queries and build all packs, for one rank."""
        return self.batch(query_ids).packs

    def batch(self, query_ids: Sequence[int], rank: int = 0, num_ranks: int = 1) -> Batch:
        """Deal these queries to all ranks and build the packs of one."""
        packs = [self.build(ids) for ids in self.deal(query_ids, num_ranks)[rank]]
        return Batch(packs, len(query_ids))

    def _group_forest(self, query_ids: Sequence[int], max_tokens: int) -> list[list[int]]:
        """First fit, largest first: at most 11/9 of the fewest packs possible."""
        packs, room = [], []
        sizes = dict(zip(query_ids, self.sizes[list(query_ids)].tolist(), strict=True))
        for i in sorted(query_ids, key=lambda i: -sizes[i]):
            chosen = next((p for p, left in enumerate(room) if sizes[i] <= left), None)
            if chosen is None:
                packs.append([])
                room.append(max_tokens)
                chosen = len(packs) - 1
            packs[chosen].append(i)
            room[chosen] -= sizes[i]
        return packs

    def _group_padded(self, query_ids: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Group queries of similar width, so that there is little padding."""
        packs, rows = [], 0
        for i in sorted(query_ids, key=lambda i: -self.queries[i].padded_width):
            query = self.queries[i]
            # The pack's first query is its widest.
            width = self.queries[packs[-1][0] if packs else i].padded_width - 1
            if packs and (rows + len(query.response_ids)) * width <= max_tokens:
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
    """Yield one rank's part of each optimizer step, from `first_step` to `num_steps`. Each epoch
    has its own seeded order, so a resumed run sees the same steps."""
    per_epoch = steps_per_epoch(len(planner.queries), train_batch_size)
    order = None
    for step in range(first_step, num_steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or order is None:
            order = np.random.default_rng([seed, epoch]).permutation(len(planner.queries))
        queries = order[place * train_batch_size : (place + 1) * train_batch_size]
        yield planner.batch(queries.tolist(), rank, num_ranks)


def ahead(steps: Iterator[Batch], *, pin_memory: bool) -> Iterator[Batch]:
    """Yield the same steps, built ahead in a background thread, so that the device need not wait.

    A pack takes only milliseconds to build, and a process would need fork, pickling and shared
    memory.
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
    """Return the optimizer steps per epoch; the last one may have fewer queries."""
    return -(-num_queries // train_batch_size)
