"""The packed forest: many queries in one flat token stream, each a tree of prompt and responses.

The prompt is the trunk and occurs once; responses that begin alike share those tokens too. Tokens
are in depth-first order, so one integer per token describes attention:

    key j is visible to query i   <=>   j <= i < subtree_end[j]

The last token of a leaf is only predicted, never an input, so it is not in the pack.

Legend: N tokens in the pack, E edges (distinct predictions), R response tokens counted once per
response, S responses, G queries (groups).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch

from rrhf_fast.data.tokenise import TokenisedQuery


class Movable:
    """A dataclass whose tensors move together, including those of Movables and tuples in it."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`. Copying from pinned memory does not wait."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, function: Callable) -> Self:
        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(moved(item) for item in value)
            if isinstance(value, Movable):
                return value._each(function)
            return function(value) if isinstance(value, torch.Tensor) else value

        parts = {f.name: moved(getattr(self, f.name)) for f in fields(self) if f.init}
        return replace(self, **parts)


@dataclass(frozen=True)
class Pack(Movable):
    """A micro-batch of whole queries as the loss needs it, whatever the layout of the tokens."""

    input_ids: torch.Tensor  # int64, the tokens that the decoder reads
    edge_rows: torch.Tensor  # [E] int64, the row (flat index of a token) that predicts ...
    edge_targets: torch.Tensor  # [E] int64, ... this token
    path_edges: torch.Tensor  # [R] int64, the edges along each response, in token order
    # Response s owns path_edges[path_offsets[s]:path_offsets[s+1]],
    # query g the responses group_offsets[g]:group_offsets[g+1].
    path_offsets: torch.Tensor  # [S+1] int64
    group_offsets: torch.Tensor  # [G+1] int64
    rewards: torch.Tensor  # [S] float32
    prompt_lengths: torch.Tensor  # [G] int64, tokens of each prompt
    query_ids: torch.Tensor  # [G] int64, the caller's number of each query; empty in a filler
    # [S] float32, the sum of each response's log-probs under a reference model, if there is one.
    reference_logps: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    def num_tokens(self) -> int:
        """Tokens that the decoder encodes, padding included."""
        return self.input_ids.numel()

    @property
    def num_queries(self) -> int:
        """G; 0 for a filler, which runs alongside other ranks' packs and adds nothing."""
        return len(self.query_ids)


@dataclass(frozen=True)
class PackedForest(Pack):
    """A pack whose `input_ids` are [N], in depth-first order."""

    position_ids: torch.Tensor  # [N] int64, depth in the tree = the position unpacked
    subtree_end: torch.Tensor  # [N] int32, one past the last token below token j
    # Cumulative (edges, responses, path tokens) before each query and in total: G+1 triples on the
    # host, so that the loss need not wait for a device.
    bounds: tuple[tuple[int, int, int], ...] | None = None
    # The attention backend's plan for this pack, made on the host while packs are built, where the
    # device need not wait for it.
    plan: Movable | None = None


@dataclass(frozen=True)
class _Trie:
    """The responses of one query as a trie in depth-first order: n nodes, one per edge."""

    tokens: np.ndarray  # [n] the token of each node
    depths: np.ndarray  # [n] 0 for a response's first token
    ends: np.ndarray  # [n] one past the last node of the subtree
    parents: np.ndarray  # [n] the parent node, -1 below the prompt
    is_leaf: np.ndarray  # [n] bool
    paths: list[np.ndarray]  # k arrays: the nodes along each response, in the row's order


def forest_tokens(query: TokenisedQuery, *, share_prefixes: bool = True) -> int:
    """Return the tokens that the query takes in a pack, without building it."""
    if not share_prefixes:
        return len(query.prompt_ids) + sum(len(ids) - 1 for ids in query.response_ids)
    order, common = _sorted_with_common_prefix(query.response_ids)
    lengths = [len(query.response_ids[i]) for i in order]
    nodes = sum(length - shared for length, shared in zip(lengths, common, strict=True))
    # Response i ends in a leaf unless it equals, or is continued by, the next one in sorted order.
    continued = sum(shared == length for length, shared in zip(lengths, common[1:], strict=False))
    return len(query.prompt_ids) + nodes - (len(lengths) - continued)


def build_forest(
    queries: Sequence[TokenisedQuery],
    query_ids: Sequence[int] | None = None,
    *,
    share_prefixes: bool = True,
    pad_to_multiple_of: int = 1,
    plan: Callable[[PackedForest], Movable] | None = None,
) -> PackedForest:
    """Lay queries out as one packed forest.

    Args:
        queries: prompts and responses of at least one token each.
        query_ids: a number for each query, kept in the pack for messages; default 0, 1, ...
        share_prefixes: False repeats the prefixes that responses have in common (for tests and
            benchmarks).
        pad_to_multiple_of: N becomes a multiple of this. The padding rows are at the end, see only
            themselves and predict nothing.
        plan: makes the pack's `plan` of attention.

    Returns:
        The pack, on the CPU. Costs about a microsecond per token on one core.
    """
    inputs, positions, ends, edge_rows, edge_targets = [], [], [], [], []
    path_edges, path_lengths, group_sizes = [], [], []
    num_rows = num_edges = num_path_tokens = 0
    bounds = [(0, 0, 0)]
    for query in queries:
        prompt_length = len(query.prompt_ids)
        trie = _build_trie(query.response_ids, share_prefixes)
        # Leaves have no row, so the row of inner node v is first_row + rows_before[v].
        inner = ~trie.is_leaf
        rows_before = np.concatenate([[0], np.cumsum(inner)])
        first_row = num_rows + prompt_length
        tree_end = first_row + rows_before[-1]
        # Rows: the prompt, then the inner nodes.
        inputs += [query.prompt_ids, trie.tokens[inner]]
        positions += [np.arange(prompt_length), prompt_length + trie.depths[inner]]
        ends += [np.full(prompt_length, tree_end), first_row + rows_before[trie.ends[inner]]]
        # Edges: every node is predicted by its parent, or by the last token of the prompt.
        edge_rows.append(
            np.where(trie.parents < 0, first_row - 1, first_row + rows_before[trie.parents])
        )
        edge_targets.append(trie.tokens)
        # Responses: the edges along each of them.
        path_edges += [num_edges + path for path in trie.paths]
        path_lengths += [len(path) for path in trie.paths]
        group_sizes.append(len(trie.paths))
        num_rows, num_edges = int(tree_end), num_edges + len(trie.tokens)
        num_path_tokens += sum(map(len, trie.paths))
        bounds.append((num_edges, len(path_lengths), num_path_tokens))
    padding = -num_rows % pad_to_multiple_of
    inputs.append(np.zeros(padding, np.int64))
    positions.append(np.zeros(padding, np.int64))
    ends.append(num_rows + 1 + np.arange(padding))

    def tensor(arrays: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(dtype)

    pack = PackedForest(
        input_ids=tensor(inputs),
        position_ids=tensor(positions),
        subtree_end=tensor(ends, torch.int32),
        edge_rows=tensor(edge_rows),
        edge_targets=tensor(edge_targets),
        path_edges=tensor(path_edges),
        path_offsets=offsets(path_lengths),
        group_offsets=offsets(group_sizes),
        rewards=torch.from_numpy(np.concatenate([query.rewards for query in queries])),
        prompt_lengths=torch.tensor([len(query.prompt_ids) for query in queries]),
        query_ids=torch.tensor(query_ids if query_ids is not None else range(len(queries))),
        bounds=tuple(bounds),
    )
    return pack if plan is None else replace(pack, plan=plan(pack))


def _build_trie(responses: Sequence[np.ndarray], share_prefixes: bool) -> _Trie:
    """Build the trie by adding responses in sorted order. Each adds the nodes after its common
    prefix with the one before it, so nodes come out in depth-first order."""
    if share_prefixes:
        order, common = _sorted_with_common_prefix(responses)
    else:
        order, common = range(len(responses)), [0] * len(responses)
    longest = max(len(ids) for ids in responses)
    on_path = np.full(longest, -1)  # on_path[d] = the node at depth d of the current response
    tokens, depths, parents, paths = [], [], [], [None] * len(responses)
    ends = np.empty(sum(len(ids) for ids in responses), dtype=np.int64)
    num_nodes = open_depth = 0
    for i, shared in zip(order, common, strict=True):
        length = len(responses[i])
        ends[on_path[shared:open_depth]] = num_nodes  # these subtrees are complete
        new = np.arange(num_nodes, num_nodes + length - shared)
        on_path[shared:length] = new
        tokens.append(responses[i][shared:])
        depths.append(np.arange(shared, length))
        parents.append(
            on_path[shared - 1 : length - 1].copy() if shared else np.append(-1, new[:-1])
        )
        paths[i] = on_path[:length].copy()
        num_nodes, open_depth = num_nodes + len(new), length
    ends[on_path[:open_depth]] = num_nodes
    ends = ends[:num_nodes]
    return _Trie(
        tokens=np.concatenate(tokens),
        depths=np.concatenate(depths),
        ends=ends,
        parents=np.concatenate(parents),
        is_leaf=ends == np.arange(1, num_nodes + 1),
        paths=paths,
    )


def _sorted_with_common_prefix(responses: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Return the lexicographic order of the responses, and the length of the prefix that each
    shares with the one before it in that order."""
    # Big-endian bytes compare as the tokens do.
    keys = [ids.astype(">u4").tobytes() for ids in responses]
    order = sorted(range(len(responses)), key=keys.__getitem__)
    common = [0]
    for before, here in pairwise(order):
        length = min(len(responses[before]), len(responses[here]))
        differs = responses[before][:length] != responses[here][:length]
        first = int(differs.argmax()) if length else 0
        common.append(first if length and differs[first] else length)
    return order, common


def offsets(lengths: Sequence[int]) -> torch.Tensor:
    """Return the start of each span of these lengths, and the end of the last: [len + 1] int64."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
