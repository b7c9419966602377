"""RRHF (Yuan et al. 2023, arXiv 2304.05302) in plain PyTorch, one query at a time, written for
reading.

No tricks, any float dtype: run it in float64 and compare. Everything fast in this project is tested
against this page.
"""

import torch

Tensor = torch.Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Head logits: [..., H] hidden, [V, H] weight, [V] bias -> [..., V]."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    depths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over a packed forest: row i sees row j <=> j <= i < subtree_end[j], and
    depths[i] - depths[j] < window.

    [H, N, D], [H_kv, N, D], [H_kv, N, D_v], [N], [N] -> [N, H, D_v]; `sinks` [H] are logits that
    join each softmax and attend to nothing.
    """
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(query.shape[1], device=query.device)
    seen = (row <= row[:, None]) & (row[:, None] < subtree_end)
    if window is not None:
        seen = seen & (depths[:, None] - depths < window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
    return (scores.softmax(-1)[..., : query.shape[1]] @ value).transpose(0, 1)


def linear_logprob(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, **head) -> Tensor:
    """log P(targets[e] | hidden[rows[e]]): [N, H], [V, H], [E], [E] -> [E]; `head` as for
    `logits`."""
    log_probs = torch.log_softmax(logits(hidden[rows], weight, **head), dim=-1)
    return log_probs[torch.arange(len(targets)), targets]


def response_logps(model: torch.nn.Module, prompt_ids: Tensor, response_ids: Tensor) -> Tensor:
    """Log-probs of one response's tokens behind its prompt, by any Hugging Face causal LM: [P], [R]
    -> [R]."""
    ids = torch.cat([prompt_ids, response_ids])
    z = model(input_ids=ids[None, :-1], use_cache=False).logits[0, len(prompt_ids) - 1 :]
    return torch.log_softmax(z, dim=-1)[torch.arange(len(response_ids)), response_ids]


def score(logps: Tensor, length_penalty: float = 1.0, length: int | None = None) -> Tensor:
    """p = sum_t logp_t / length^length_penalty (eq. 1); `length` is the response's own, its end
    token included."""
    return logps.sum() / (len(logps) if length is None else length) ** length_penalty


def pair_loss(d: Tensor, kind: str = "hinge", margin: float = 0.0) -> Tensor:
    """phi(d): of a pair whose better response scores higher by d."""
    if kind == "hinge":
        return torch.clamp(margin - d, min=0)
    if kind == "logistic":
        return torch.nn.functional.softplus(margin - d, threshold=100)
    assert kind == "squared"
    return (margin - d) ** 2


def rank_loss(
    x: Tensor,
    rewards: Tensor,
    margin: float = 0.0,
    kind: str = "hinge",
    beta: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """sum over r_i < r_j of phi(beta * (x_j - x_i)) (eq. 2), or their mean: [k], [k] -> scalar.
    Equal rewards form no pair."""
    losses = [
        pair_loss(beta * (x[j] - x[i]), kind, margin)
        for i in range(len(x))
        for j in range(len(x))
        if rewards[i] < rewards[j]
    ]
    if not losses:
        return x.sum() * 0
    return sum(losses) / (len(losses) if reduction == "mean" else 1)


def sft_loss(
    logps: list[Tensor], rewards: Tensor, reduction: str = "sum", length: int | None = None
) -> Tensor:
    """Negative log-likelihood of the best response, the first one if several tie (eq. 3): k tensors
    [R_i] -> scalar."""
    best = logps[max(range(len(logps)), key=lambda i: (rewards[i].item(), -i))]
    return (
        -best.sum()
        if reduction == "sum"
        else -best.sum() / (len(best) if length is None else length)
    )


def rrhf_loss(
    logps: list[Tensor],
    rewards: Tensor,
    *,
    length_penalty: float = 1.0,
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
    sft_reduction: str = "sum",
    pair_loss: str = "hinge",
    margin: float = 0.0,
    beta: float = 1.0,
    rank_reduction: str = "sum",
    reference_logps: list[Tensor] | None = None,
    padded_width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One query's (loss, rank loss, SFT loss) (eq. 4): k tensors [R_i], rewards [k] -> three
    scalars.

    `reference_logps` are the responses' log-probs under a reference model, k tensors [R_i];
    `padded_width` stands in for every response's length, as in the released code (prompt + longest
    response, end token included).
    """
    p = torch.stack([score(logp, length_penalty, padded_width) for logp in logps])
    if reference_logps is not None:
        q = torch.stack([score(logp, length_penalty, padded_width) for logp in reference_logps])
        p = p - q
    rank = rank_loss(p, rewards, margin, pair_loss, beta, rank_reduction)
    sft = sft_loss(logps, rewards, sft_reduction, padded_width)
    return rank_weight * rank + sft_weight * sft, rank, sft
