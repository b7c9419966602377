"""Public loss functions: log-probs from the head without logits, the RRHF ranking loss, and both
in one sweep."""

from rrhf_fast.losses.linear_logprob import linear_logprob
from rrhf_fast.losses.linear_rrhf import linear_rrhf_loss
from rrhf_fast.losses.rrhf import RRHFLoss, rrhf_loss

__all__ = ["RRHFLoss", "linear_logprob", "linear_rrhf_loss", "rrhf_loss"]
