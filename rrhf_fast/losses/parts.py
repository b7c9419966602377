"""The groups of tensors that the loss functions and their backends hand on.

Legend: E edges, R response tokens, S responses, G queries (groups), V vocabulary, H hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rrhf_fast.losses.matrix_sum import MatrixSum


class Layout(NamedTuple):
    """Response s owns the log-probs path_edges[path_offsets[s]:path_offsets[s+1]], query g the
    responses group_offsets[g]:group_offsets[g+1]."""

    path_edges: Tensor  # [R] int64
    path_offsets: Tensor  # [S+1] int64
    group_offsets: Tensor  # [G+1] int64


class Scales(NamedTuple):
    """What turns a response's sum of log-probs into its score and into its SFT loss."""

    score: Tensor  # [S] factor of the score p
    sft: Tensor  # [S] factor of the SFT loss
    reference: Tensor  # [S] the score under the reference model, or 0


class PairLoss(NamedTuple):
    """The loss phi(d) of a pair, where d = beta * (x_better - x_worse) and x = p - reference."""

    kind: str  # hinge, logistic or squared: see `rrhf_loss`
    beta: float
    margin: float


class Ranking(NamedTuple):
    """What a backend computes per query and per response; only the losses carry gradients."""

    rank_loss: Tensor  # [G]
    sft_loss: Tensor  # [G]
    logp_scores: Tensor  # [S]
    slopes: Tensor  # [S] d rank_loss / d logp_scores
    best: Tensor  # [G] int64
    num_pairs: Tensor  # [G] int64
    num_correct: Tensor  # [G] int64
    margins: Tensor  # [G]

    @classmethod
    def empty(cls, scores: Tensor, num_queries: int) -> "Ranking":
        """Without values, for responses as in `scores` [S], whose dtype the losses have."""
        group = [scores.new_empty(num_queries) for _ in range(3)]
        count = [torch.empty_like(group[0], dtype=torch.int64) for _ in range(3)]
        response = [torch.empty_like(scores) for _ in range(2)]
        return cls(*group[:2], *response, *count, group[2])


class LinearHead(NamedTuple):
    """How hidden states become logits; see `linear_logprob`."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


class Wants(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


class GradientSums(NamedTuple):
    """The gradients that are needed, while one chunk of edges after the other adds to them."""

    states: Tensor | None  # [E, H]
    weight: MatrixSum | None  # [V, H]
    bias: Tensor | None  # [V]
