"""Baselines for the engine, written from descriptions of the peers' behaviour, each at its best."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from rrhf_fast import reference, rrhf_loss
from rrhf_fast.data.forest import PackedForest, build_forest, offsets
from rrhf_fast.data.padded import build_padded
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel


def released_loss(lm: PreTrainedModel, query: TokenisedQuery) -> torch.Tensor:
    """The released RRHF code's computation for one query: scalar loss.

    k rows padded to the longest, the prompt repeated in each, logits of every position, a
    log-softmax over the full vocabulary, scores and the SFT part divided by the padded width (in
    this project: `--compat official`).
    """
    batch = build_padded([query]).to(lm.device)
    width = query.padded_width
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
    return gaps[wrong].sum() - picked[best].sum() / width


def repeat_prompts(queries: Sequence[TokenisedQuery], query_ids: Sequence[int], **options):
    """A pack without padding in which every response carries its own copy of the prompt, as in
    training without shared prefixes. Arguments and result as for `build_forest`."""
    alone = [
        TokenisedQuery(query.prompt_ids, [ids], query.rewards[i : i + 1])
        for query in queries
        for i, ids in enumerate(query.response_ids)
    ]
    pack = build_forest(alone, **options)
    group_offsets = offsets([len(query.response_ids) for query in queries])
    return replace(
        pack,
        group_offsets=group_offsets,
        bounds=tuple(pack.bounds[i] for i in group_offsets.tolist()),
        prompt_lengths=torch.tensor([len(query.prompt_ids) for query in queries]),
        query_ids=torch.tensor(list(query_ids)),
    )


def two_steps(model: RRHFModel, pack: PackedForest) -> torch.Tensor:
    """The loss with log-probs first and ranking second: the backward recomputes the logits."""
    return rrhf_loss(model.edge_logps(pack), pack.rewards, **model.loss_options(pack)).loss


def plain_head(model: RRHFModel, pack: PackedForest) -> torch.Tensor:
    """The loss computed from all logits of the pack's edges."""
    hidden, head = model.head_inputs(pack)
    head = head._replace(weight=head.weight.to(hidden.dtype))
    logps = reference.linear_logprob(
        hidden, rows=pack.edge_rows, targets=pack.edge_targets, **head._asdict()
    )
    return rrhf_loss(logps.float(), pack.rewards, **model.loss_options(pack)).loss


# Each lever off: name -> a function that returns a pack's loss.
HEADS: dict[str, Callable[[RRHFModel, PackedForest], torch.Tensor]] = {
    "without the one sweep": two_steps,
    "with a plain head": plain_head,
}
