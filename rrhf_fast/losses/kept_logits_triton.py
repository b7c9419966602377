"""A few edges' logits over the whole vocabulary, computed once for the log-probs and their
gradient: the Triton backend of `linear_rrhf_loss`.

It keeps exp(z - maximum of its tile's row) per logit z, in the dtype of the states. Rounding that
changes every probability by the same relative amount, as rounding the gradient would; rounding the
logit would change it by percents.
"""

import torch
from torch import Tensor

from rrhf_fast.kernels import linear_logprob as kernels
from rrhf_fast.losses.matrix_sum import product
from rrhf_fast.losses.parts import GradientSums, LinearHead


class KeptLogits:
    """As `kept_logits_torch.KeptLogits`; gradients are float32."""

    def __init__(self, head: LinearHead, workspace_mb: float, num_edges: int):
        self.head = head
        width = kernels.exps_width(len(head.weight))
        fitting = int(workspace_mb * 2**20) // (width * head.weight.itemsize)
        self.capacity = min(fitting, num_edges)
        self.width, self.room = width, None  # allocated on first use

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        """logp [E] of targets [E] after states [E, H], E at most `capacity`."""
        if self.room is None:
            self.room = states.new_empty(self.capacity, self.width)
        self.exps = self.room[: len(states)]
        head = self.head
        logp, lse, tops = kernels.forward(
            states, head.weight, head.bias, targets, head.softcap, head.logit_scale, self.exps
        )
        self.kept = (states, targets, tops, logp, lse)
        return logp

    def add_gradients(self, grad: Tensor, sums: GradientSums) -> None:
        """Add what follows from grad [E] = d loss / d logp; the states' gradient is zero before."""
        active = grad.nonzero().squeeze(1)  # waits for the device: the products need the count
        if len(active) == 0:
            return
        states, targets, tops, logp, lse = self.kept
        d_bias = None if sums.bias is None else torch.empty_like(sums.bias)
        head = self.head
        kernels.dlogits_of_exps(
            self.exps, d_bias, active, targets, tops, logp, lse, grad, len(head.weight),
            head.softcap, head.logit_scale,
        )  # fmt: skip
        dlogits = self.exps[: len(active), : len(self.head.weight)]
        if sums.states is not None:
            sums.states[active] = product(dlogits, head.weight, sums.states.dtype)
        if sums.weight is not None:
            sums.weight.add_product(dlogits.T, states[active])
        if d_bias is not None:
            sums.bias.add_(d_bias)
