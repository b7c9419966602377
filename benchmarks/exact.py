"""Loss and gradient of a few queries in float64, from the reference."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from rrhf_fast import reference
from rrhf_fast.data.tokenise import TokenisedQuery

# Rounding may swap responses whose mean log-probs are closer than this, which would change a whole
# response's gradient. Such responses get equal rewards and form no pair.
NEAR_TIES = {torch.float32: 1e-4, torch.bfloat16: 0.005}


@dataclass
class Exact:
    """Loss and gradient of these queries, as the released code defines the loss."""

    queries: list[TokenisedQuery]
    loss: float
    gradient: list[torch.Tensor]  # by parameter, float64
    num_pairs: int  # that the model ranks wrongly

    def errors(self, lm: PreTrainedModel, run: Callable[[], float]) -> dict[str, float]:
        """Relative errors of the loss that `run` returns and (norm) of the whole gradient that it
        leaves in `lm`."""
        loss = run()
        pairs = list(zip(lm.parameters(), self.gradient, strict=True))
        squares = sum((p.grad.double() - exact).square().sum() for p, exact in pairs)
        total = sum(exact.square().sum() for _, exact in pairs)
        return {
            "loss_error": abs(loss - self.loss) / abs(self.loss),
            "gradient_error": (squares / total).sqrt().item(),
        }


def exact_of(
    plain: PreTrainedModel, queries: Sequence[TokenisedQuery], dtype: torch.dtype
) -> Exact:
    """Compute one response at a time. Near ties in `dtype` are removed from the queries, so that
    every order that rounding can cause has the same gradient."""
    model = copy.deepcopy(plain).double()
    exact = Exact([], 0.0, [], 0)
    for query in queries:
        prompt, *responses = (
            torch.from_numpy(ids).long().to(model.device)
            for ids in (query.prompt_ids, *query.response_ids)
        )
        with torch.no_grad():
            logps = [reference.response_logps(model, prompt, ids) for ids in responses]
        width = query.padded_width
        scores = np.array([logp.sum().item() for logp in logps]) / width
        near = NEAR_TIES[dtype] * min(map(len, logps)) / width
        rewards = without_near_ties(query.rewards, scores, near)
        exact.queries.append(replace(query, rewards=rewards))
        is_wrong = (rewards[:, None] < rewards) & (scores[:, None] > scores)
        exact.num_pairs += int(is_wrong.sum())
        logps = [logp.requires_grad_() for logp in logps]
        loss, _, _ = reference.rrhf_loss(
            logps, torch.from_numpy(rewards), sft_reduction="mean", padded_width=width
        )
        (loss / len(queries)).backward()
        # Again with gradients, which keeps the activations of one response at a time.
        for logp, ids in zip(logps, responses, strict=True):
            reference.response_logps(model, prompt, ids).backward(logp.grad)
        exact.loss += loss.item() / len(queries)
    exact.gradient = [p.grad for p in model.parameters()]
    return exact


def without_near_ties(rewards: np.ndarray, scores: np.ndarray, near: float) -> np.ndarray:
    """[k], [k] -> [k] rewards, averaged within each run of scores that are at most `near` apart:
    equal rewards form no pair."""
    order = np.argsort(scores)
    runs = np.split(order, np.flatnonzero(np.diff(scores[order]) > near) + 1)
    merged = rewards.copy()
    for run in runs:
        merged[run] = rewards[run].mean()
    return merged
