"""Losses of pairs against their published formulas, and against TRL where it is installed.

Each formula is written here as its paper writes it, for the pairs of one query, and differentiated
by autograd in float64: sums of log-probs s and, under the reference, s0; lengths n.
"""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, relu

from rrhf_fast import demo, reference, rrhf_loss
from rrhf_fast.model.decoder import load_model, load_tokenizer

BETA, GAMMA = 0.7, 0.4


def rrhf(s, n, _, better, worse):
    """arXiv 2304.05302, eq. 2: p is the mean log-prob."""
    return relu(s[worse] / n[worse] - s[better] / n[better]).sum()


def slic(s, n, _, better, worse):
    """SLiC-HF, arXiv 2305.10425, eq. 1, with delta."""
    return relu(GAMMA - s[better] + s[worse]).sum()


def simpo(s, n, _, better, worse):
    """arXiv 2405.14734, eq. 6."""
    chosen, rejected = BETA / n[better] * s[better], BETA / n[worse] * s[worse]
    return -logsigmoid(chosen - rejected - GAMMA).sum()


def dpo(s, n, s0, better, worse):
    """arXiv 2305.18290, eq. 7: the mean over a dataset of pairs."""
    ratios = BETA * (s[better] - s0[better]) - BETA * (s[worse] - s0[worse])
    return -logsigmoid(ratios).mean()


def normalised_dpo(s, n, s0, better, worse):
    """Tulu 3, arXiv 2411.15124, eq. 6."""
    chosen = BETA / n[better] * (s[better] - s0[better])
    return -logsigmoid(chosen - BETA / n[worse] * (s[worse] - s0[worse])).mean()


def ipo(s, n, s0, better, worse):
    """arXiv 2310.12036, eq. 17, with tau = BETA."""
    h = (s[better] - s0[better]) - (s[worse] - s0[worse])
    return (h - 1 / (2 * BETA)).square().mean()


LOSSES = {
    rrhf: {},
    slic: {"length_penalty": 0.0, "margin": GAMMA},
    simpo: {"pair_loss": "logistic", "beta": BETA, "margin": GAMMA},
    dpo: {
        "pair_loss": "logistic", "beta": BETA, "length_penalty": 0.0, "rank_reduction": "mean",
        "reference": True,
    },
    normalised_dpo: {
        "pair_loss": "logistic", "beta": BETA, "rank_reduction": "mean", "reference": True,
    },
    ipo: {
        "pair_loss": "squared", "margin": 1 / (2 * BETA), "length_penalty": 0.0,
        "rank_reduction": "mean", "reference": True,
    },
}  # fmt: skip
NAMED = [pytest.param(formula, id=formula.__name__) for formula in LOSSES]


def draw(k, seed, levels=3, longest=6):
    """One query: token log-probs [1, k, T], rewards, mask, and reference sums [1, k]."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (k,), generator=g)
    mask = (torch.arange(longest) < lengths[:, None])[None]
    logps = -3 * torch.rand(1, k, longest, generator=g, dtype=torch.float64)
    rewards = torch.randint(0, levels, (1, k), generator=g).double()
    s0 = -3 * torch.rand(1, k, generator=g, dtype=torch.float64) * lengths
    return logps.requires_grad_(), rewards, mask, s0


@pytest.mark.parametrize("formula", NAMED)
@given(k=st.integers(2, 7), seed=st.integers(0, 10**6))
def test_published_formulas(formula, k, seed):
    options = dict(LOSSES[formula])
    logps, rewards, mask, s0 = draw(k, seed)
    arguments = {"reference_logps": s0} if options.pop("reference", False) else {}
    out = rrhf_loss(logps, rewards, mask=mask, sft_weight=0.0, **options, **arguments)
    (gradient,) = torch.autograd.grad(out.loss, logps)

    better, worse = (rewards[0][:, None] > rewards[0]).nonzero().T
    s, n = (logps * mask).sum(-1)[0], mask.sum(-1)[0].double()
    expected = formula(s, n, s0[0], better, worse) if len(better) else s.sum() * 0
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logps)[0])


@settings(max_examples=40)
@given(
    groups=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    kind=st.sampled_from(["hinge", "logistic", "squared"]),
    reduction=st.sampled_from(["sum", "mean"]),
    has_reference=st.booleans(),
    is_official=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_options_equal_the_reference(groups, kind, reduction, has_reference, is_official, seed):
    options = {
        "pair_loss": kind, "rank_reduction": reduction, "margin": GAMMA, "beta": BETA,
        "rank_weight": 3.0, "sft_reduction": "mean",
    }  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    drawn = [draw(k, seed + i) for i, k in enumerate(groups)]
    logps = [[row[m] for row, m in zip(x[0], mask[0], strict=True)] for x, _, mask, _ in drawn]
    before = [[-torch.rand(len(x), generator=g).double() for x in group] for group in logps]
    flat = [x for group in logps for x in group]
    lengths = torch.tensor([len(x) for x in flat])
    zero = torch.zeros(1, dtype=torch.int64)
    widths = torch.randint(5, 20, (len(groups),), generator=g)
    edges = torch.cat(flat)
    out = rrhf_loss(
        edges,
        torch.cat([rewards[0] for _, rewards, _, _ in drawn]),
        path_edges=torch.arange(len(edges)),
        path_offsets=torch.cat([zero, lengths.cumsum(0)]),
        group_offsets=torch.cat([zero, torch.tensor(groups).cumsum(0)]),
        reference_logps=(
            torch.stack([x.sum() for group in before for x in group]) if has_reference else None
        ),
        padded_widths=widths if is_official else None,
        **options,
    )
    parts = [
        reference.rrhf_loss(
            logps[i],
            rewards[0],
            reference_logps=before[i] if has_reference else None,
            padded_width=int(widths[i]) if is_official else None,
            **options,
        )
        for i, (_, rewards, _, _) in enumerate(drawn)
    ]
    loss, rank, _ = (torch.stack(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(out.rank_loss, rank)
    torch.testing.assert_close(out.loss, loss.mean())
    leaves = [x for x, _, _, _ in drawn]
    found, expected = (
        torch.autograd.grad(out.loss, leaves, retain_graph=True),
        torch.autograd.grad(loss.mean(), leaves),
    )
    torch.testing.assert_close(found, expected)


@given(k=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_slopes_sum_to_zero_and_give_the_gradient(k, seed):
    logps, rewards, mask, s0 = draw(k, seed)
    options = {"pair_loss": "logistic", "beta": BETA, "rank_reduction": "mean"}
    out = rrhf_loss(logps, rewards, mask=mask, reference_logps=s0, **options)
    assert out.slopes.sum().abs() < 1e-12
    (gradient,) = torch.autograd.grad(out.rank_loss.sum(), logps)
    expected = (out.slopes / mask.sum(-1)[0])[None, :, None] * mask
    torch.testing.assert_close(gradient, expected)


def test_absent_responses_have_no_reference():
    """Padded: a response without tokens is left out with its reference."""
    logps, rewards, mask, s0 = draw(3, 1)
    mask[0, 1] = False
    options = {"pair_loss": "logistic", "beta": BETA}
    kept = torch.tensor([0, 2])
    found = rrhf_loss(logps, rewards, mask=mask, reference_logps=s0, **options)
    expected = rrhf_loss(
        logps[:, kept], rewards[:, kept], mask=mask[:, kept], reference_logps=s0[:, kept], **options
    )
    assert torch.equal(found.loss, expected.loss)


def test_a_hinge_with_a_reference_keeps_exact_zeros():
    logps = torch.tensor([[[-1.0], [-2.0], [-3.0]]], requires_grad=True)
    s0 = torch.tensor([[-1.1, -2.0, -2.8]])  # x = .1, 0, -.2: in the order of the rewards
    out = rrhf_loss(
        logps, torch.tensor([[3.0, 2.0, 1.0]]), mask=torch.ones(1, 3, 1), reference_logps=s0,
        sft_weight=0.0, beta=0.3,
    )  # fmt: skip
    assert out.num_correct.item() == 3 and out.loss.item() == 0
    assert not torch.autograd.grad(out.loss, logps)[0].any()


def test_extreme_gaps_stay_finite():
    logps = torch.tensor([[[-1e4], [-1e-3]]], requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        for rewards, loss in (([1.0, 0.0], 9999.999), ([0.0, 1.0], 0.0)):
            out = rrhf_loss(
                logps.to(dtype), torch.tensor([rewards]), mask=torch.ones(1, 2, 1),
                pair_loss="logistic", sft_weight=0.0,
            )  # fmt: skip
            assert out.loss.item() == pytest.approx(loss, rel=1e-6)
            assert torch.autograd.grad(out.loss, logps)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_loss": "exp"}, 'pair_loss: expected "hinge", "logistic" or "squared", found'),
        ({"beta": 0.0}, "beta: expected a finite number above 0, found 0.0"),
        ({"rank_reduction": "max"}, 'rank_reduction: expected "sum" or "mean", found'),
        ({"reference_logps": torch.zeros(2)}, r"reference_logps: expected \(1, 2\), as the rew"),
    ],
)
def test_mistakes(options, message):
    mask = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match=message):
        rrhf_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2), mask=mask, **options)


@pytest.mark.slow
def test_two_responses_are_trls_dpo(tmp_path):
    """All-pairs DPO of two responses is the DPO loss of TRL, on the same tokens and models."""
    trl = pytest.importorskip("trl", reason="TRL is the oracle (the extra `experiments`)")
    policy, before = load_model(str(demo.MODEL_DIR)), load_model(str(demo.MODEL_DIR))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as if some steps had been taken
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    rows = [json.loads(line) for line in demo.TRAIN_FILE.read_text().splitlines()[:6]]
    pairs = []
    for row in rows:
        order = np.argsort(row["scores"])
        best, worst = row["responses"][order[-1]], row["responses"][order[0]]
        pairs.append({"prompt": row["prompt"], "chosen": best, "rejected": worst})
    options = {"per_device_train_batch_size": 6, "beta": BETA, "bf16": False, "report_to": []}
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=False, **options
    )
    trainer = trl.DPOTrainer(
        policy, before, arguments, train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=load_tokenizer(str(demo.MODEL_DIR)),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, inputs)

    ids = [[row[f"{side}_ids"] for side in ("chosen", "rejected")] for row in trainer.train_dataset]
    mask = torch.zeros(6, 2, max(len(x) for two in ids for x in two), dtype=torch.bool)
    logps, logps_before = torch.zeros(2, *mask.shape).unbind(0)
    for i, row in enumerate(trainer.train_dataset):
        prompt = torch.tensor(row["prompt_ids"])
        for j, response in enumerate(ids[i]):
            mask[i, j, : len(response)] = True
            for table, model in ((logps, policy), (logps_before, before)):
                with torch.no_grad():
                    found = reference.response_logps(model, prompt, torch.tensor(response))
                table[i, j, : len(response)] = found
    found = rrhf_loss(
        logps.double(), torch.tensor([[1.0, 0.0]]).expand(6, 2), mask=mask, sft_weight=0.0,
        pair_loss="logistic", beta=BETA, length_penalty=0.0, reference_logps=logps_before.sum(-1),
    )  # fmt: skip
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(expected.item() - math.log(2)) > 0.01
