"""Token log-probs from hidden states and the head's weight, without a logits tensor."""

import torch

from rrhf_fast.losses.linear_logprob_torch import ChunkedLinearLogprob
from rrhf_fast.losses.rrhf import check_backend

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> torch.Tensor:
    """log P(targets[e] | hidden[rows[e]]) under the head, differentiable in hidden, weight, bias.

        logits = (hidden[rows] @ weight.T + bias) * logit_scale
        logits = softcap * tanh(logits / softcap)                  if softcap is given
        logp   = logits[targets] - logsumexp(logits)

    No [E, V] tensor exists at any time. The backward skips edges whose upstream gradient is
    exactly 0.

    Args:
        hidden: [N, H] bfloat16, float16, float32 or (torch only) float64.
        weight: [V, H]; the kernels cast it to hidden's dtype, torch to at least float32.
        rows, targets: [E] int64; a row may occur several times. No target is ignored: one outside
            [0, V), such as -100, is an error on the CPU; elsewhere, where a check would wait for
            the device, its log-prob is NaN.
        bias: [V] or None.
        softcap, logit_scale: as in Gemma 2 and Cohere; see the formula.
        backend: "triton" (H a multiple of 8), "torch", or "auto": the kernels for CUDA tensors
            that they take, torch for all others.
        workspace_mb: MiB for a slice of the vocabulary; default 512 for the kernels, 64 for torch.

    Returns:
        [E] float32 (float64 for float64 input). Sums and exponentials are at least float32,
        whatever the input dtype.

    Raises:
        ValueError: an argument that does not fit; names it, what it is and what was expected.
    """
    check_shapes(hidden, weight, rows, targets, bias)
    backend = choose_backend(backend, hidden)
    arguments = (hidden, weight, bias, rows, targets, softcap, logit_scale)
    if backend == "torch":
        return ChunkedLinearLogprob.apply(*arguments, 64 if workspace_mb is None else workspace_mb)
    # Imported late: triton exists on Linux only.
    from rrhf_fast.losses.linear_logprob_triton import linear_logprob_op

    return linear_logprob_op(*arguments, 512.0 if workspace_mb is None else float(workspace_mb))[0]


def check_shapes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Raise ValueError for shapes that do not fit and, on the CPU, for targets outside the
    vocabulary."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden, weight: expected [N, H] and [V, H], found {shapes}")
    if rows.dim() != 1 or rows.shape != targets.shape:
        shapes = f"{tuple(rows.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"rows, targets: expected [E] and [E], found {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({weight.shape[0]},), found {tuple(bias.shape)}")
    # A compiled graph cannot branch on values, and on CUDA the check would wait for the device.
    if targets.device.type == "cpu" and len(targets) and not torch.compiler.is_compiling():
        low, high = targets.aminmax()
        if low < 0 or high >= len(weight):
            found = f"found {int(low)} to {int(high)}"
            raise ValueError(f"targets: expected tokens in [0, {len(weight)}), {found}")


def choose_backend(backend: str, hidden: torch.Tensor) -> str:
    """ "triton" or "torch"; raises ValueError if the requested one cannot take `hidden`."""
    check_backend(backend)
    problem = _kernel_problem(hidden)
    if backend == "triton" and problem:
        raise ValueError(problem)
    if backend == "auto":
        return "torch" if problem or hidden.device.type != "cuda" else "triton"
    return backend


def _kernel_problem(hidden: torch.Tensor) -> str | None:
    """Why the kernels cannot take these states, or None."""
    if hidden.dtype not in KERNEL_DTYPES:
        return f"hidden: the kernels take bfloat16, float16 and float32, found {hidden.dtype}"
    if hidden.shape[1] % 8:
        return f"hidden: the kernels expect H to be a multiple of 8, found {tuple(hidden.shape)}"
    return None
