"""Baselines for the engine, written from descriptions of the peers' behaviour, each at its best."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from rrhf_fast import reference, rrhf_loss
from rrhf_fast.data.forest import PackedForest, build_forest, offsets
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.rrhf import RRHFModel


def released_loss(lm: PreTrainedModel, query: TokenisedQuery) -> torch.Tensor:
    """The released RRHF code's computation for one query: scalar loss.

    k whole rows padded to the longest, the prompt repeated in each, logits of every position, a
    log-softmax over the full vocabulary and a copy of it, scores and the SFT part divided by the
    padded width (in this project: `--compat official`). Its trainer around it is measured by
    `benchmarks/run.py peers`.
    """
    rows = (ids.tolist() for ids in (query.prompt_ids, *query.response_ids))
    prompt, *responses = rows
    ids, mask, labels = (t.to(lm.device) for t in released_rows(prompt, responses))
    logits = lm(input_ids=ids, attention_mask=mask).logits
    return released_loss_of(logits, labels, torch.from_numpy(query.rewards).to(lm.device))


def released_rows(
    prompt: list[int], responses: Sequence[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query as the released code feeds it: ids, attention mask and labels, each [k, L], with L
    the longest response after the prompt. Labels are those of the next position; -100 is none. The
    last token of a response is an input, too, though nothing is predicted from it."""
    width = len(prompt) + max(map(len, responses))
    ids, mask = torch.zeros(2, len(responses), width, dtype=torch.long).unbind(0)
    labels = torch.full_like(ids, -100)
    for i, response in enumerate(responses):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        mask[i, :end] = 1
        labels[i, len(prompt) - 1 : end - 1] = torch.tensor(response)
    return ids, mask, labels


def released_loss_of(
    logits: torch.Tensor, labels: torch.Tensor, rewards: torch.Tensor
) -> torch.Tensor:
    """The released code's loss of one query, from the logits [k, L, V] and what `released_rows`
    makes, in its arithmetic."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    # It copies them before it picks.
    picked = log_probs.clone().gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    picked = picked * (labels != -100)
    width = labels.shape[1]
    scores = picked.sum(-1) / width
    gaps = scores.unsqueeze(1) - scores.unsqueeze(0)  # [i, j] = p_i - p_j
    wrong = (rewards.unsqueeze(1) < rewards.unsqueeze(0)) & (gaps > 0)
    return gaps[wrong].sum() - picked[rewards.argmax()].sum() / width


def released_tokens(query: TokenisedQuery) -> int:
    """Tokens that the released code encodes for a query, padding included."""
    return len(query.response_ids) * query.padded_width


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


def two_steps(model: RRHFModel, pack: PackedForest, share: float = 1.0) -> torch.Tensor:
    """The loss with log-probs first and ranking second: the backward recomputes the logits."""
    return rrhf_loss(model.edge_logps(pack), pack.rewards, **model.loss_options(pack, share)).loss


def plain_head(model: RRHFModel, pack: PackedForest, share: float = 1.0) -> torch.Tensor:
    """The loss computed from all logits of the pack's edges."""
    hidden, head = model.head_inputs(pack)
    head = head._replace(weight=head.weight.to(hidden.dtype))
    logps = reference.linear_logprob(
        hidden, rows=pack.edge_rows, targets=pack.edge_targets, **head._asdict()
    )
    return rrhf_loss(logps.float(), pack.rewards, **model.loss_options(pack, share)).loss


# Each lever off: name -> a function that returns a pack's loss.
HEADS: dict[str, Callable[[RRHFModel, PackedForest, float], torch.Tensor]] = {
    "without the one sweep": two_steps,
    "with a plain head": plain_head,
}
