"""Options of the loss."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le


@dataclass
class LossConfig:
    """The loss: rank_weight * L_rank + sft_weight * L_sft (RRHF, arXiv 2304.05302)"""

    length_penalty: Annotated[float, Ge(0), Le(100)] = 1.0
    """Exponent a in the score of a response, p = (sum of its log-probs) / length**a: 1 compares
    responses by their mean log-prob; 0 by the sum, which is lower for longer ones."""
    rank_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the ranking loss. A higher weight improves ranking accuracy; whether it also raises
    the reward of samples depends on the rows: try 1, 3 and 10 and compare samples."""
    sft_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the negative log-likelihood of the best response. Without it (0) samples became
    short and earned hardly more reward than before training."""
    sft_reduction: Literal["sum", "mean"] = "sum"
    """Over the tokens of the best response: their sum, as in the paper, or their mean, which gives
    the ranking loss more weight."""
    margin: Annotated[float, Ge(0)] = 0.0
    """By how much, in units of p, the better response of a pair has to score higher for the pair to
    add no loss."""
    compat: Literal["none", "official"] = "none"
    """official: the arithmetic of the released code of the paper, to compare with it. Each response
    counts as long as the padded rows of its prompt (prompt plus longest response, end token
    included), and the SFT part is a mean over that length."""
