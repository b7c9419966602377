"""Options of the loss."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le


@dataclass
class LossConfig:
    """The loss: rank_weight * L_rank + sft_weight * L_sft (RRHF, arXiv 2304.05302)"""

    length_penalty: Annotated[float, Ge(0), Le(100)] = 1.0
    """Exponent a in the score of a response, p = (sum of its log-probs) / length**a: 1 compares
    responses by their mean log-prob; 0 by the sum, which is lower for longer ones."""
    rank_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the ranking loss. 1 suits rows with good provided responses; for a model's own
    samples try a margin first, then 10 with it, and compare samples at the temperature you will
    use."""
    sft_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the negative log-likelihood of the best response. Without it (0) and with
    the plain hinge samples became short and earned hardly more reward than before training."""
    sft_reduction: Literal["sum", "mean"] = "sum"
    """Over the tokens of the best response: their sum, as in the paper, or their mean, which gives
    the ranking loss more weight."""
    pair_loss: Literal["hinge", "logistic", "squared"] = "hinge"
    """Loss of a pair as a function of d, beta times by how much the better response scores higher.
    hinge: max(0, margin - d), the paper's. logistic: log(1 + exp(margin - d)), as in DPO and SimPO.
    squared: (margin - d)**2, as in IPO."""
    margin: Annotated[float, Ge(0)] = 0.0
    """By how much the better response of a pair should score higher, in units of d. 0 suits good
    provided responses and scores of right or wrong, 1 other samples of the model's own, whose pairs
    are close."""
    beta: Annotated[float, Gt(0)] = 1.0
    """Factor of the scores that pairs compare."""
    reference: Literal["none", "initial"] = "none"
    """initial: pairs compare by how much each score rose since before the first step (of a round,
    for iterate), as in DPO and IPO; the scores of that time are computed once and kept, so no
    second model is loaded."""
    rank_reduction: Literal["sum", "mean"] = "sum"
    """Over the pairs of a prompt: their sum, as in the paper, or their mean."""
    compat: Literal["none", "official"] = "none"
    """official: the arithmetic of the released code of the paper, to compare with it. Each response
    counts as long as the padded rows of its prompt (prompt plus longest response, end token
    included), and the SFT part is a mean over that length."""
