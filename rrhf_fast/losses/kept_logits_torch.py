"""A few edges' logits over the whole vocabulary, computed once for the log-probs and their
gradient: the torch backend of `linear_rrhf_loss`.

Logits and all that follows from them elementwise are at least float32. The backward's products of
bfloat16 states are in bfloat16 where the processor has instructions for them.
"""

import torch
from torch import Tensor

from rrhf_fast.losses.linear_logprob_torch import chunk_logits
from rrhf_fast.losses.matrix_sum import is_fast, product
from rrhf_fast.losses.parts import GradientSums, LinearHead


class KeptLogits:
    """The head, and room for the logits of `capacity` edges at a time, of `num_edges` in all.

    `forward` fills the room; `add_gradients` turns it into the gradient of the logits in place, so
    it can be called once per forward.
    """

    def __init__(self, head: LinearHead, workspace_mb: float, num_edges: int):
        self.head = head
        copies = 1 if head.softcap is None else 2  # the slope of the cap needs as much again
        fitting = int(workspace_mb * 2**20) // (len(head.weight) * head.weight.itemsize * copies)
        self.capacity = min(fitting, num_edges)
        self.room: Tensor | None = None  # allocated on first use
        self.weight: Tensor | None = None  # in the dtype of the backward's products

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        """logp [E] of targets [E] after states [E, H], E at most `capacity`."""
        if self.room is None:
            self.room = self.head.weight.new_empty(self.capacity, len(self.head.weight))
        wide = states.to(self.room.dtype)
        z = chunk_logits(wide, self.head, slice(None), out=self.room[: len(states)])
        top = z.amax(1)
        target = z.gather(1, targets[:, None]).squeeze(1)
        total = z.sub_(top[:, None]).exp_().sum(1)
        self.kept = (states, targets, z, top, total, target)
        return (target - top) - total.log()

    def add_gradients(self, grad: Tensor, sums: GradientSums) -> None:
        """Add what follows from grad [E] = d loss / d logp; the states' gradient is zero before."""
        active = grad.nonzero().squeeze(1)
        if len(active) == 0:
            return
        states, targets, exps, top, total, target = self.kept
        exps, top, total = _move_up(exps, active), top[active], total[active]
        rows, targets = torch.arange(len(active), device=grad.device), targets[active]
        slope = None
        if self.head.softcap is not None:
            # An exponential that underflowed has no gradient, but its logarithm would be infinite.
            # The target has one, however small its exponential.
            z = exps.clamp(min=torch.finfo(exps.dtype).tiny).log_().add_(top[:, None])
            z[rows, targets] = target[active]
            slope = z.div_(self.head.softcap).square_().neg_().add_(1)
        # grad * (onehot - softmax), in place of the exponentials.
        upstream = grad[active] * self.head.logit_scale
        d_z = exps.mul_((-upstream / total)[:, None])
        d_z[rows, targets] += upstream
        if slope is not None:
            d_z *= slope
        if sums.bias is not None:
            sums.bias.add_(d_z.sum(0))
        dtype = states.dtype if is_fast(states) else d_z.dtype
        d_z = d_z.to(dtype)
        if sums.states is not None:
            if self.weight is None:
                self.weight = self.head.weight.to(dtype)
            sums.states[active] = product(d_z, self.weight, sums.states.dtype)
        if sums.weight is not None:
            sums.weight.add_product(d_z.T, states[active].to(dtype))


def _move_up(rows: Tensor, active: Tensor, block: int = 64) -> Tensor:
    """rows[active], in place: `active` rises, so no block overwrites a later one's."""
    for i in range(0, len(active), block):
        source = active[i : i + block]
        if source[-1] != i + len(source) - 1:  # else they are in place already
            rows[i : i + len(source)] = rows[source]
    return rows[: len(active)]
