"""The padded layout: one row per response, each after its own copy of the prompt, padded on the
right.

It costs k copies of the prompt and the padding, and is correct for causal models, because a token
never sees the padding to its right. Where the longest row decides how all are rotated (longrope
beyond its window), `RRHFModel` takes the rows one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rrhf_fast.data.forest import Pack, offsets
from rrhf_fast.data.tokenise import TokenisedQuery


@dataclass(frozen=True)
class PaddedBatch(Pack):
    """A pack whose `input_ids` are [S, T]; the row of an edge is s * T + t."""

    # Made from lengths, so the pad token may equal EOS.
    attention_mask: torch.Tensor  # [S, T] int64, 1 on tokens


def padded_tokens(query: TokenisedQuery) -> int:
    """Return k * (P + max R - 1), the tokens of a pack of this query alone. Last tokens are only
    predicted, not encoded."""
    return len(query.response_ids) * (query.padded_width - 1)


def build_padded(
    queries: Sequence[TokenisedQuery],
    query_ids: Sequence[int] | None = None,
    *,
    pad_token_id: int = 0,
) -> PaddedBatch:
    """Lay queries out as one padded batch; arguments as for `build_forest`."""
    width = max(query.padded_width for query in queries) - 1
    num_rows = sum(len(query.response_ids) for query in queries)
    input_ids = np.full((num_rows, width), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((num_rows, width), dtype=np.int64)
    edge_rows, lengths, row = [], [], 0
    for query in queries:
        prompt_length = len(query.prompt_ids)
        for ids in query.response_ids:
            end = prompt_length + len(ids) - 1
            input_ids[row, :prompt_length] = query.prompt_ids
            input_ids[row, prompt_length:end] = ids[:-1]
            attention_mask[row, :end] = 1
            edge_rows.append(row * width + np.arange(prompt_length - 1, end))
            lengths.append(len(ids))
            row += 1
    return PaddedBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        edge_rows=torch.from_numpy(np.concatenate(edge_rows)),
        edge_targets=torch.from_numpy(
            np.concatenate([ids for query in queries for ids in query.response_ids])
        ).long(),
        path_edges=torch.arange(sum(lengths)),
        path_offsets=offsets(lengths),
        group_offsets=offsets([len(query.response_ids) for query in queries]),
        rewards=torch.from_numpy(np.concatenate([query.rewards for query in queries])),
        prompt_lengths=torch.tensor([len(query.prompt_ids) for query in queries]),
        query_ids=torch.tensor(query_ids if query_ids is not None else range(len(queries))),
    )
