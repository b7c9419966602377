"""rrhf_loss against the reference: padded and packed, options, ties, ragged k, exact zeros."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast import reference, rrhf_loss

OPTIONS = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 0.5, "margin": 0.3},
    {"sft_reduction": "mean", "rank_weight": 10.0},
    {"sft_weight": 0.0, "margin": 2.0},
]


def ragged(groups, seed=0, levels=3):
    """Groups of (k responses) with random lengths; few reward levels, so ties are common."""
    g = torch.Generator().manual_seed(seed)
    logps, rewards = [], []
    for k in groups:
        lengths = torch.randint(1, 7, (k,), generator=g).tolist()
        logps.append([-torch.rand(n, generator=g, dtype=torch.float64) * 3 for n in lengths])
        rewards.append(torch.randint(0, levels, (k,), generator=g).double())
    return logps, rewards


def packed(logps, rewards):
    flat = [logp for group in logps for logp in group]
    lengths = torch.tensor([len(logp) for logp in flat])
    sizes = torch.tensor([len(group) for group in logps])
    zero = torch.zeros(1, dtype=torch.int64)
    return torch.cat(flat).requires_grad_(), {
        "rewards": torch.cat(rewards),
        "path_edges": torch.arange(int(lengths.sum())),
        "path_offsets": torch.cat([zero, lengths.cumsum(0)]),
        "group_offsets": torch.cat([zero, sizes.cumsum(0)]),
    }


@pytest.mark.parametrize("options", OPTIONS)
@given(groups=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_equals_reference(options, groups, seed):
    logps, rewards = ragged(groups, seed)
    edges, layout = packed(logps, rewards)
    out = rrhf_loss(edges, **layout, **options)
    gradient = torch.autograd.grad(out.loss, edges)[0]

    leaves = [[logp.clone().requires_grad_() for logp in group] for group in logps]
    parts = [
        reference.rrhf_loss(group, r, **options) for group, r in zip(leaves, rewards, strict=True)
    ]
    loss, rank, sft = (torch.stack(part) for part in zip(*parts, strict=True))
    loss.mean().backward()
    expected = torch.cat([leaf.grad for group in leaves for leaf in group])

    torch.testing.assert_close(out.rank_loss, rank)
    torch.testing.assert_close(out.sft_loss, sft)
    torch.testing.assert_close(out.loss, loss.mean())
    torch.testing.assert_close(gradient, expected)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(1, 6)),
    seed=st.integers(0, 10**6),
)
def test_padded_equals_packed(shape, seed):
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(shape, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, shape[2] + 1, shape[:2], generator=g)
    lengths[:, 0] = shape[2]  # at least one response per query; length 0 means absent
    mask = torch.arange(shape[2]) < lengths[..., None]
    rewards = torch.rand(shape[:2], generator=g)
    padded = logps.clone().requires_grad_()
    out = rrhf_loss(padded, rewards, mask=mask)
    out.loss.backward()

    groups = [
        [logps[i, j, :n] for j, n in enumerate(row) if n] for i, row in enumerate(lengths.tolist())
    ]
    kept = [rewards[i][lengths[i] > 0] for i in range(shape[0])]
    edges, layout = packed(groups, kept)
    other = rrhf_loss(edges, **layout)
    other.loss.backward()
    torch.testing.assert_close(out.loss, other.loss)
    torch.testing.assert_close(padded.grad[mask], edges.grad)
    assert not padded.grad[~mask].any()


def test_counts_and_margins():
    # p = -1, -2, -3, -4; rewards 3, 1, 2, 2: five pairs (the tie forms none), one of them wrong.
    logps, rewards = (
        [[torch.tensor([-p]) for p in (1.0, 2.0, 3.0, 4.0)]],
        [torch.tensor([3.0, 1, 2, 2])],
    )
    edges, layout = packed(logps, rewards)
    out = rrhf_loss(edges, **layout)
    assert out.logp_scores.tolist() == [-1, -2, -3, -4]
    assert (out.num_pairs.item(), out.num_correct.item()) == (5, 3)
    assert out.margins.item() == 1 + 2 + 3 - 1 - 2
    assert out.rank_loss.item() == 1 + 2


def test_official_compatibility_divides_by_the_padded_width():
    logps, rewards = ragged([3, 4], seed=3)
    edges, layout = packed(logps, rewards)
    widths = torch.tensor([17, 23])
    out = rrhf_loss(edges, **layout, sft_reduction="mean", padded_widths=widths)
    for g, width in enumerate(widths.tolist()):
        _, rank, sft = reference.rrhf_loss(
            logps[g], rewards[g], sft_reduction="mean", padded_width=width
        )
        torch.testing.assert_close(out.rank_loss[g], rank)
        torch.testing.assert_close(out.sft_loss[g], sft)
        assert out.sft_loss[g].item() == pytest.approx(
            -logps[g][int(rewards[g].argmax())].sum().item() / width
        )


def test_many_responses_and_long_ones():
    logps, rewards = ragged([1024], levels=10**6)
    logps[0][5] = -torch.rand(5000, dtype=torch.float64)
    edges, layout = packed(logps, rewards)
    out = rrhf_loss(edges, **layout)
    p, r = out.logp_scores, rewards[0]
    worse = r[:, None] < r[None, :]
    expected = torch.where(worse, (p[:, None] - p[None, :]).clamp(min=0), 0.0).sum()
    torch.testing.assert_close(out.rank_loss[0].detach(), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected either mask, or all of path_edges"),
        ({"mask": torch.ones(1, 2, 3), "path_edges": torch.arange(3)}, "expected either mask"),
        ({"mask": torch.ones(1, 2, 2)}, r"found \(1, 2, 3\), \(1, 2\), \(1, 2, 2\)"),
        ({"mask": torch.zeros(1, 2, 3)}, "no response token at all"),
        ({"mask": torch.ones(1, 2, 3), "sft_reduction": "max"}, 'sft_reduction: expected "sum"'),
    ],
)
def test_layouts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        rrhf_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2), **arguments)
