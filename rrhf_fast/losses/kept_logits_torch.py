"""A few edges' logits over the whole vocabulary, made once and used for the log-probs and for the
gradient: the torch backend of `linear_rrhf_loss`."""

import torch
from torch import Tensor

from rrhf_fast.losses.linear_logprob_torch import chunk_logits
from rrhf_fast.losses.matrix_sum import MatrixSum


class KeptLogits:
    """The head, and room for the logits of `capacity` edges at a time, of `num_edges` in all.

    `forward` fills the room; `add_gradients` turns it into the gradient of the logits in place, so
    each forward allows one.
    """

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
        copies = 1 if softcap is None else 2  # the slope of the cap needs as much again
        fitting = int(workspace_mb * 2**20) // (len(weight) * weight.itemsize * copies)
        self.capacity = min(fitting, num_edges)
        self.room: Tensor | None = None  # made when it is needed

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        """logp [E] of targets [E] after states [E, H], E at most `capacity`."""
        if self.room is None:
            self.room = states.new_empty(self.capacity, len(self.weight))
        z = chunk_logits(
            states, self.weight, self.bias, slice(None), self.softcap, self.logit_scale,
            out=self.room[: len(states)],
        )  # fmt: skip
        top = z.amax(1)
        target = z.gather(1, targets[:, None]).squeeze(1)
        total = z.sub_(top[:, None]).exp_().sum(1)
        self.kept = (states, targets, z, top, total, target)
        return (target - top) - total.log()

    def add_gradients(
        self,
        grad: Tensor,
        d_states: Tensor | None,
        d_weight: MatrixSum | None,
        d_bias: Tensor | None,
    ) -> None:
        """Fill d_states [E, H] (zero before) and add to d_weight and d_bias what grad [E] = d loss
        / d logp makes of them."""
        active = grad.nonzero().squeeze(1)
        if len(active) == 0:
            return
        states, targets, exps, top, total, target = self.kept
        exps, top, total = _move_up(exps, active), top[active], total[active]
        rows, targets = torch.arange(len(active), device=grad.device), targets[active]
        slope = None
        if self.softcap is not None:
            # What underflowed has no gradient, but its logarithm would be infinite. The target has
            # one, however small its exponential.
            z = exps.clamp(min=torch.finfo(exps.dtype).tiny).log_().add_(top[:, None])
            z[rows, targets] = target[active]
            slope = z.div_(self.softcap).square_().neg_().add_(1)
        # grad * (onehot - softmax), in place of the exponentials.
        upstream = grad[active] * self.logit_scale
        d_z = exps.mul_((-upstream / total)[:, None])
        d_z[rows, targets] += upstream
        if slope is not None:
            d_z *= slope
        if d_states is not None:
            d_states[active] = d_z @ self.weight
        if d_weight is not None:
            d_weight.add_product(d_z.T, states[active])
        if d_bias is not None:
            d_bias += d_z.sum(0)


def _move_up(rows: Tensor, active: Tensor, block: int = 64) -> Tensor:
    """rows[active], in place: `active` rises, so no block overwrites a later one's."""
    for i in range(0, len(active), block):
        source = active[i : i + block]
        if source[-1] != i + len(source) - 1:  # else they stand where they belong
            rows[i : i + len(source)] = rows[source]
    return rows[: len(active)]
