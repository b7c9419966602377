"""A few edges' logits over the whole vocabulary, made once and used for the log-probs and for the
gradient: the Triton backend of `linear_rrhf_loss`.

What is kept of a logit z is exp(z - maximum of its tile's row) in the dtype of the states. That
rounds every probability by the same relative amount, as a rounded gradient would be; a rounded
logit would make it wrong by per cents.
"""

import torch
from torch import Tensor

from rrhf_fast.kernels import linear_logprob as kernels
from rrhf_fast.losses.matrix_sum import MatrixSum, product


class KeptLogits:
    """As `kept_logits_torch.KeptLogits`; gradients are float32."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        workspace_mb: float,
        num_edges: int,
    ):
        self.weight, self.bias = weight, bias
        self.softcap, self.logit_scale = softcap, logit_scale
        width = kernels.exps_width(len(weight))
        fitting = int(workspace_mb * 2**20) // (width * weight.itemsize)
        self.capacity = min(fitting, num_edges)
        self.width, self.room = width, None  # made when it is needed

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        """logp [E] of targets [E] after states [E, H], E at most `capacity`."""
        if self.room is None:
            self.room = states.new_empty(self.capacity, self.width)
        self.exps = self.room[: len(states)]
        logp, lse, tops = kernels.forward(
            states, self.weight, self.bias, targets, self.softcap, self.logit_scale, self.exps
        )
        self.kept = (states, targets, tops, logp, lse)
        return logp

    def add_gradients(
        self,
        grad: Tensor,
        d_states: Tensor | None,
        d_weight: MatrixSum | None,
        d_bias: Tensor | None,
    ) -> None:
        """Fill d_states [E, H] (zero before) and add to d_weight and d_bias what grad [E] = d loss
        / d logp makes of them."""
        active = grad.nonzero().squeeze(1)  # waits for the device: the products need the count
        if len(active) == 0:
            return
        states, targets, tops, logp, lse = self.kept
        sums = None
        if d_bias is not None:
            sums = torch.empty_like(d_bias)
        kernels.dlogits_of_exps(
            self.exps, sums, active, targets, tops, logp, lse, grad, len(self.weight), self.softcap,
            self.logit_scale,
        )  # fmt: skip
        dlogits = self.exps[: len(active), : len(self.weight)]
        if d_states is not None:
            d_states[active] = product(dlogits, self.weight, d_states.dtype)
        if d_weight is not None:
            d_weight.add_product(dlogits.T, states[active])
        if d_bias is not None:
            d_bias += sums
