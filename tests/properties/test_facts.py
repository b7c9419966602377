"""The four mathematical facts on which the engine relies, as properties of `rrhf_loss`."""

import math
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast import rrhf_loss

scores = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=2, max_size=8, unique=True)
seeds = st.integers(0, 10**6)


def one_query(rewards: list[float], seed: int, *, tokens: int = 3):
    """Random float64 log-probs [1, k, tokens], rewards [1, k] and the full mask."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(1, len(rewards), tokens, generator=g, dtype=torch.float64) * 4
    rewards = torch.tensor([rewards], dtype=torch.float64)
    return logps.requires_grad_(), rewards, torch.ones(logps.shape, dtype=torch.bool)


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort()


@given(scores, seeds)
def test_rank_identity(rewards, seed):
    """Fact 1: dL_rank/dp_i = c_i = rank(p_i) - rank(r_i), L_rank = sum_i c_i p_i, c sums to 0."""
    logps, rewards, mask = one_query(rewards, seed)
    out = rrhf_loss(logps, rewards, mask=mask, sft_weight=0.0)
    c = ranks(out.logp_scores) - ranks(rewards[0])
    (gradient,) = torch.autograd.grad(out.rank_loss.sum(), logps)
    assert c.sum() == 0 and torch.equal(out.slopes, c.double())
    assert out.best.tolist() == [rewards[0].argmax()]
    torch.testing.assert_close(gradient, (c / 3.0)[None, :, None].expand_as(gradient).double())
    torch.testing.assert_close(out.rank_loss.sum().detach(), (c * out.logp_scores).sum())


@given(scores, seeds, st.sampled_from([math.atan, lambda r: r**3, lambda r: 7 * r - 1]))
def test_only_the_order_of_rewards_matters(rewards, seed, increasing):
    """Fact 2: a strictly increasing map of one query's rewards changes nothing, bit for bit."""
    mapped = [increasing(r) for r in rewards]
    order = sorted(rewards)
    if any(increasing(a) >= increasing(b) for a, b in pairwise(order)):
        return  # rounding merged two rewards: not strictly increasing any more
    results = []
    for r in (rewards, mapped):
        logps, r, mask = one_query(r, seed)
        out = rrhf_loss(logps, r, mask=mask)
        results.append((out.loss, torch.autograd.grad(out.loss, logps)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@given(st.lists(st.integers(0, 3), min_size=2, max_size=7), seeds, st.randoms())
def test_permuting_responses_changes_nothing(rewards, seed, random):
    """Fact 2, second half, for L_rank: with ties the best response is the first one."""
    logps, rewards, mask = one_query([float(r) for r in rewards], seed)
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    plain = rrhf_loss(logps, rewards, mask=mask)
    shuffled = rrhf_loss(logps[:, order], rewards[:, order], mask=mask)
    torch.testing.assert_close(plain.rank_loss, shuffled.rank_loss)
    (a,) = torch.autograd.grad(plain.rank_loss.sum(), logps)
    (b,) = torch.autograd.grad(shuffled.rank_loss.sum(), logps)
    torch.testing.assert_close(a, b)


@given(scores, seeds)
def test_gradient_is_one_number_per_response_and_exactly_zero_if_ranked_right(rewards, seed):
    """Fact 3, in float32, with weights of the loss that do not happen to cancel."""
    logps, rewards, mask = one_query(rewards, seed)
    logps = logps.detach().float().requires_grad_()
    out = rrhf_loss(logps, rewards, mask=mask, rank_weight=0.3, sft_weight=0.1)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert (gradient == gradient[..., :1]).all()
    best = rewards[0].argmax()
    right = ranks(out.logp_scores) == ranks(rewards[0])
    right[best] = False
    assert (gradient[0, right] == 0.0).all()
    assert (gradient[0, best] != 0.0).all()


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=2, max_size=4), seeds)
def test_queries_are_separable(groups, seed):
    """Fact 4: a query's gradient is the same alone and in company (times its share of the mean)."""
    cases = [one_query([float(r) for r in rewards], seed + i) for i, rewards in enumerate(groups)]
    k = max(len(rewards) for rewards in groups)
    together = torch.zeros(len(groups), k, 3, dtype=torch.float64)
    rewards = torch.zeros(len(groups), k, dtype=torch.float64)
    mask = torch.zeros(len(groups), k, 3, dtype=torch.bool)
    for i, (logps, r, m) in enumerate(cases):
        together[i, : r.shape[1]], rewards[i, : r.shape[1]], mask[i, : r.shape[1]] = (
            logps[0],
            r[0],
            m[0],
        )
    together.requires_grad_()
    together_grad = torch.autograd.grad(rrhf_loss(together, rewards, mask=mask).loss, together)[0]
    for i, (logps, r, m) in enumerate(cases):
        (alone,) = torch.autograd.grad(rrhf_loss(logps, r, mask=m).loss, logps)
        torch.testing.assert_close(together_grad[i, : r.shape[1]], alone[0] / len(groups))
