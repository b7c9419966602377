"""Sums of matrix products, for gradients that accumulate over many chunks."""

import torch
from torch import Tensor


class MatrixSum:
    """A sum of matrices, in `dtype`. The first term is written instead of added, which saves
    filling the sum with zeros and reading them back: two of four passes over a head's gradient."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self._total = torch.empty(shape, dtype=dtype, device=device)
        self._is_empty = True

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b, all sums in the sum's dtype."""
        beta, self._is_empty = int(not self._is_empty), False
        add_product(self._total, a, b, beta=beta)

    def add(self, term: Tensor) -> None:
        """Add a matrix."""
        if self._is_empty:
            self._total.copy_(term)
        else:
            self._total += term
        self._is_empty = False

    def value(self) -> Tensor:
        """The sum; zeros if nothing was added."""
        return self._total.zero_() if self._is_empty else self._total


def add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: int = 1) -> None:
    """total = beta * total + a @ b, all sums in the dtype of `total`; beta 0 ignores what it
    held."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # the interpreter: the CPU's products have one dtype
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in float32 and rounded once to dtype."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)
