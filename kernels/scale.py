"""Multiply a gradient by a scalar on the device; do nothing if the scalar is 1."""

import torch
import triton
import triton.language as tl

BLOCK = 4096
# Enough to fill any device; each strides over the blocks. One program per block would launch a
# hundred thousand programs that read the factor and exit.
PROGRAMS = 2048


@triton.jit(do_not_specialize=["num_blocks"])
def scale_kernel(values, factor, num_values, num_blocks, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        first = tl.program_id(0).to(tl.int64)  # a head may have more values than int32 counts
        for block in range(first, num_blocks, tl.num_programs(0)):
            place = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(values + place, mask=place < num_values)
            tl.store(values + place, value * by, mask=place < num_values)


def scale(values: torch.Tensor, factor: torch.Tensor) -> None:
    """values *= factor [], in place, without synchronising. The values may be in any memory order,
    but without gaps."""
    num_blocks = triton.cdiv(values.numel(), BLOCK)
    if num_blocks:
        grid = (min(num_blocks, PROGRAMS),)
        scale_kernel[grid](values, factor, values.numel(), num_blocks, BLOCK=BLOCK)
