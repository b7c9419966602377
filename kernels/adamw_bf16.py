"""One AdamW update of one tensor with bfloat16 moments, in one pass over memory.

    g = gradient / grad_scale
    m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

A float32 parameter and its gradient take 20 bytes of traffic per element: 12 read, 8 written.
Moments are stored with stochastic rounding, using the Philox generator (Salmon et al. 2011): the
random bits depend only on (seed, step, index of the tensor, position in the tensor), so there is no
state to keep.
"""

import torch
import triton
import triton.language as tl

# A Philox call yields 4 x 32 random bits and an element needs 2 x 16, so a program updates four
# blocks of this size. Each of its 128 threads accesses 4 elements at once, 16 bytes of float32;
# 8 would take two accesses and three times the registers.
BLOCK = 512
NUM_WARPS = 4


@triton.jit
def _round_at_random(x, noise):
    """float32 -> bfloat16, given 16 random bits as int32."""
    # bfloat16 is the upper half of a float32's bits. Noise added to the lower half carries with a
    # probability proportional to it. Clearing the lower half leaves nothing for the cast to round.
    bits = (x.to(tl.int32, bitcast=True) + noise) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _update_block(
    parameter, gradient, exp_avg, exp_avg_sq, place, mask, noise, inverse_scale,
    beta1, weight1, beta2, weight2, correction2, eps, rate, decay,
):  # fmt: skip
    p = tl.load(parameter + place, mask=mask).to(tl.float32)
    g = tl.load(gradient + place, mask=mask).to(tl.float32) * inverse_scale
    m = tl.load(exp_avg + place, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq + place, mask=mask).to(tl.float32)
    m = beta1 * m + weight1 * g
    v = beta2 * v + weight2 * (g * g)
    p = decay * p - rate * (m / (tl.sqrt(v * correction2) + eps))
    tl.store(parameter + place, p.to(parameter.dtype.element_ty), mask=mask)
    tl.store(exp_avg + place, _round_at_random(m, (noise & 0xFFFF).to(tl.int32)), mask=mask)
    tl.store(exp_avg_sq + place, _round_at_random(v, (noise >> 16).to(tl.int32)), mask=mask)


# Sizes and counts must not be compiled in: each new value would be a new kernel, and without type
# annotations so would each new type.
@triton.jit(do_not_specialize=["num_elements", "seed", "step", "index"])
def update_kernel(
    parameter, gradient, exp_avg, exp_avg_sq, grad_scale,
    num_elements: tl.int64, seed: tl.uint64, step: tl.int32, index: tl.int32,
    beta1: tl.float32, weight1: tl.float32, beta2: tl.float32, weight2: tl.float32,
    correction2: tl.float32, eps: tl.float32, rate: tl.float32, decay: tl.float32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros_like(lanes)
    noise = tl.philox(seed, lanes, zeros + program, zeros + index, zeros + step)
    inverse_scale = 1.0 / tl.load(grad_scale)
    first = program.to(tl.int64) * (4 * BLOCK)
    # No mask for full blocks: a mask not known to end at a multiple of 16 bytes would reduce every
    # access to one element.
    if first + 4 * BLOCK <= num_elements:
        for i in tl.static_range(4):
            _update_block(
                parameter, gradient, exp_avg, exp_avg_sq, first + i * BLOCK + lanes, None,
                noise[i], inverse_scale, beta1, weight1, beta2, weight2, correction2, eps, rate,
                decay,
            )  # fmt: skip
    else:
        for i in tl.static_range(4):
            place = first + i * BLOCK + lanes
            _update_block(
                parameter, gradient, exp_avg, exp_avg_sq, place, place < num_elements,
                noise[i], inverse_scale, beta1, weight1, beta2, weight2, correction2, eps, rate,
                decay,
            )  # fmt: skip


def update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_scale: torch.Tensor | None,
    *,
    step: int,
    index: int,
    seed: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update parameter and moments (bfloat16) in place; all contiguous and of equal shape.

    Parameter and gradient are float32, bfloat16 or float16. The gradient is divided by
    `grad_scale`, a float32 scalar on the device. `step` (from 1), `index` (of the tensor) and
    `seed` (64 bits) select the random numbers.
    """
    tensors = (parameter, gradient, exp_avg, exp_avg_sq)
    assert all(t.is_contiguous() and t.shape == parameter.shape for t in tensors)
    assert exp_avg.dtype == exp_avg_sq.dtype == torch.bfloat16
    if parameter.numel() == 0:
        return
    if grad_scale is None:
        # A None argument would be a second variant of the kernel, compiled in mid-run.
        grad_scale = parameter.new_ones((), dtype=torch.float32)
    beta1, beta2 = betas
    update_kernel[(triton.cdiv(parameter.numel(), 4 * BLOCK),)](
        *tensors, grad_scale, parameter.numel(), seed, step, index,
        beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta2**step), eps, lr / (1 - beta1**step),
        1 - lr * weight_decay,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
