"""Public loss functions: log-probs off the head without logits, and the RRHF ranking loss."""

from rrhf_fast.losses.linear_logprob import linear_logprob
from rrhf_fast.losses.rrhf import RRHFLoss, rrhf_loss

__all__ = ["RRHFLoss", "linear_logprob", "rrhf_loss"]
