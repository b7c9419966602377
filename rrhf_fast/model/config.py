"""Options of the loss."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class LossConfig:
    """The RRHF loss (arXiv 2304.05302): rank_weight * L_rank + sft_weight * L_sft."""

    length_penalty: float = 1.0
    """Exponent of the response length in the score p: 1 is the mean log-prob, 0 the sum. 0 orders
    the mean log-probs worse at equal reward (experiments/results/choices.md)."""
    rank_weight: float = 1.0
    """Weight of the pairwise ranking loss. 1 never cost much reward; more ranks better, but gives
    less reward in choices.md and more for the stories of data.md."""
    sft_weight: float = 1.0
    """Weight of the likelihood of the best response. At 0 samples became short and earned hardly
    more than before (alternatives.md)."""
    sft_reduction: Literal["sum", "mean"] = "sum"
    """Over the best response's tokens: their sum (the paper) or their mean, which acts as a larger
    rank_weight: less reward in choices.md, more for the stories of data.md."""
    margin: float = 0.0
    """Added inside the hinge, in units of p."""
    compat: Literal["none", "official"] = "none"
    """"official" reproduces the released code's loss: every response's length is the width of the
    query's padded rows, prompt plus longest response (end token included), and the SFT part is a
    mean over that width."""
