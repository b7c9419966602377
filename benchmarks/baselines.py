"""What the engine is measured against, written from descriptions of the peers' behaviour."""

import torch
from transformers import PreTrainedModel

from rrhf_fast.data.padded import build_padded
from rrhf_fast.data.tokenise import TokenisedQuery


def released_loss(lm: PreTrainedModel, query: TokenisedQuery) -> torch.Tensor:
    """The released RRHF code's computation for one query: scalar loss.

    k rows padded to the longest, the prompt repeated in each, logits of every position, a
    log-softmax over the full vocabulary, scores divided by the padded width (in this project:
    `--compat official`).
    """
    batch = build_padded([query])
    width = batch.input_ids.shape[1]
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.edge_rows] = batch.edge_targets
    logits = lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    mask = labels != -100
    picked = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
    scores = picked.sum(-1) / width
    gaps = scores.unsqueeze(1) - scores.unsqueeze(0)  # [i, j] = p_i - p_j
    wrong = (batch.rewards.unsqueeze(1) < batch.rewards.unsqueeze(0)) & (gaps > 0)
    best = batch.rewards.argmax()
    return gaps[wrong].sum() - picked[best].mean()
