"""Sums of matrix products, for gradients that accumulate over many chunks."""

import torch
from torch import Tensor


class MatrixSum:
    """A sum of matrices, in `dtype`, or added to `total`. Without that the first term is written
    instead of added, which saves filling the sum with zeros and reading them back: two of four
    passes over a head's gradient."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        total: Tensor | None = None,
    ):
        self._is_empty = total is None
        self._total = torch.empty(shape, dtype=dtype, device=device) if total is None else total

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b."""
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
    """total = beta * total + a @ b, products summed in the dtype of `total`; beta 0 ignores what it
    held."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif beta:
        total += _rounded(a, b)
    else:
        total.copy_(_rounded(a, b))


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, summed in float32."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return _rounded(a, b).to(dtype)


def is_fast(a: Tensor) -> bool:
    """Whether a is of 16 bits on a CPU that has instructions for products of such."""
    if a.dtype != torch.bfloat16 or a.device.type != "cpu":
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _rounded(a: Tensor, b: Tensor) -> Tensor:
    """a @ b where products have one dtype: that of a and b if it is fast (each sum is then rounded
    once to 16 bits, as under autocast), else float32."""
    return a @ b if is_fast(a) else a.float() @ b.float()
