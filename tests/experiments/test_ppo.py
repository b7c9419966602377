"""PPO: its formulas against plain loops written from the papers and against TRL 1.12's trainer, and
one short training."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import ppo as module
from experiments.ppo import (
    PPO,
    PPOConfig,
    gae,
    masked_mean,
    policy_loss,
    ppo,
    token_rewards,
    value_loss,
    whiten,
)
from rrhf_fast import demo
from rrhf_fast.model.decoder import load_model
from tests import jsonl

REWARD = "rrhf_fast.demo.reward:score"
# Figures of TRL 1.12's experimental PPOTrainer: one rollout of the demo's model and the third pass
# over it, float64 except for the rollout's log-probs.
TRL = json.loads(Path(__file__).with_name("trl_ppo.json").read_text())


def draw(seed, rows=3, width=9):
    """Episodes of different lengths and places on a grid: (mask, last, generator)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, width // 2, (rows,), generator=generator)
    lengths = torch.randint(1, width // 2, (rows,), generator=generator)
    last = starts + lengths - 1
    places = torch.arange(width)
    mask = ((places >= starts[:, None]) & (places <= last[:, None])).double()
    return mask, last, generator


def noise(mask, generator):
    return torch.randn(mask.shape, generator=generator, dtype=torch.float64)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_weighted_sum_of_later_errors(seed, gamma, gae_lambda):
    """Equation 16 of arXiv 1506.02438, row by row, on the tokens of the response alone."""
    mask, _, generator = draw(seed)
    rewards, values = noise(mask, generator), noise(mask, generator)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for row in range(len(mask)):
        places = mask[row].nonzero().flatten().tolist()
        r = [rewards[row, t].item() for t in places]
        v = [values[row, t].item() for t in places] + [0.0]  # the episode ends
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        for i, t in enumerate(places):
            expected = sum((gamma * gae_lambda) ** j * e for j, e in enumerate(errors[i:]))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[i], abs=1e-12)
    outside = mask == 0
    assert not advantages[outside].any() and not returns[outside].any()


def test_with_lambda_1_the_return_is_the_sum_of_the_rewards_that_follow():
    mask, _, generator = draw(0)
    rewards, values = noise(mask, generator), noise(mask, generator)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    following = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, following)


@given(st.integers(0, 2**31))
def test_the_penalty_lowers_the_reward_of_what_the_policy_likes_more(seed):
    mask, last, generator = draw(seed)
    logps, reference = noise(mask, generator), noise(mask, generator)
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    rewards = token_rewards(logps, reference, scores, last, 0.1)
    for row in range(len(mask)):
        for t in mask[row].nonzero().flatten().tolist():
            penalty = 0.1 * (logps[row, t] - reference[row, t]).item()
            expected = -penalty + (scores[row].item() if t == last[row] else 0.0)
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 2**31))
def test_losses_are_the_papers(seed):
    """Equation 7 of arXiv 1707.06347 as a loss, and the clipped squared error, token by token."""
    mask, _, generator = draw(seed)
    new, old, advantages, returns = (noise(mask, generator) for _ in range(4))
    policy, value = [], []
    for row, t in mask.nonzero().tolist():
        ratio, a = (new - old)[row, t].exp().item(), advantages[row, t].item()
        policy.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        v, before, target = (x[row, t].item() for x in (new, old, returns))
        near = before + min(max(v - before, -0.2), 0.2)
        value.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
    expected = sum(policy) / len(policy), sum(value) / len(value)
    found = policy_loss(new, old, advantages, mask, 0.2), value_loss(new, old, returns, mask, 0.2)
    assert [x.item() for x in found] == pytest.approx(expected, abs=1e-12)
    # What lies outside the mask changes nothing, however large.
    far = torch.where(mask == 0, 1e4, 0.0).double()
    assert policy_loss(new + far, old, advantages, mask, 0.2) == found[0]
    assert value_loss(new + far, old, returns, mask, 0.2) == found[1]


def test_a_ratio_beyond_the_clip_earns_no_gradient():
    new = torch.tensor([[0.5, -0.5, 0.5, -0.5, 0.05]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    old, mask = torch.zeros_like(advantages), torch.ones_like(advantages)
    policy_loss(new, old, advantages, mask, 0.2).backward()
    # Better tokens that are already likelier, and worse ones already less likely, stop there.
    assert (new.grad == 0).tolist() == [[True, False, False, True, False]]
    assert new.grad[0, 1] < 0 < new.grad[0, 2]


@given(st.integers(0, 2**31))
def test_whitened_values_have_mean_0_and_variance_1(seed):
    mask, _, generator = draw(seed, rows=4)
    mask[0, :2] = 1
    white = whiten(noise(mask, generator), mask)
    inside = white[mask > 0]
    assert inside.mean().item() == pytest.approx(0, abs=1e-12)
    assert inside.var().item() == pytest.approx(1, abs=1e-3) and not white[mask == 0].any()


def test_one_step_of_trl_gives_the_same_figures():
    """TRL gives a finished response one more state after its end token, where it puts the score; so
    the places of the score and of the values are those that it used."""
    given, settings = TRL["given"], TRL["settings"]
    x = {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}
    lengths = set(x["mask"].sum(1).tolist())
    assert len(lengths) > 2 and max(lengths) == x["mask"].shape[1]  # finished ones and a cut one
    rewards = token_rewards(
        x["logps"], x["reference_logps"], x["scores"], x["score_at"].long(), settings["beta"]
    )
    episode = x["value_mask"]
    advantages, returns = gae(
        rewards, x["values"], episode, settings["gamma"], settings["gae_lambda"]
    )
    white = whiten(advantages, x["mask"])
    clip = settings["clip"]
    policy = policy_loss(x["new_logps"], x["logps"], white, x["mask"], clip)
    value = value_loss(x["new_values"], x["values"], returns, episode, clip)
    found = {
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
        "whitened": white,
        "kl": ((x["logps"] - x["reference_logps"]) * x["mask"]).sum(1).mean(),
        "policy_loss": policy,
        "value_loss": value,
        "loss": policy + settings["value_weight"] * value,
    }
    assert set(found) == set(TRL["trl"])
    for name, expected in TRL["trl"].items():
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-6, msg=name)
    ratio = torch.exp(x["new_logps"] - x["logps"])[x["mask"] > 0]
    assert (ratio > 1 + clip).any() and (ratio < 1 - clip).any()  # both clips were at work


def config_of(folder, **options):
    rows = [{"prompt": row["prompt"]} for row in jsonl.read(demo.TRAIN_FILE)[:6]]
    jsonl.write(folder / "prompts.jsonl", rows)
    options = {"train_batch_size": 4, "num_samples": 3, "max_new_tokens": 6} | options
    return PPOConfig(
        str(demo.MODEL_DIR), str(folder / "prompts.jsonl"), reward_fn=REWARD, **options
    )


def test_a_rollout_masks_its_responses_and_starts_at_ratio_1(tmp_path):
    trainer = PPO(config_of(tmp_path))
    torch.manual_seed(0)
    rollout = trainer.roll_out([row["prompt"] for row in jsonl.read(tmp_path / "prompts.jsonl")])
    assert len(rollout.mask) == 18 and rollout.mask.sum(1).max() <= 6
    eos = trainer.tokenizer.eos_token_id
    for tokens, mask in zip(rollout.tokens, rollout.mask, strict=True):
        prompt_and_response = tokens[: int(mask.nonzero().max()) + 2]
        text = trainer.tokenizer.decode(prompt_and_response)
        assert text.startswith("<s>Human:") and eos not in prompt_and_response[:-1].tolist()
        response = tokens[1:][mask > 0]
        before = trainer.tokenizer.decode(prompt_and_response[: -len(response)])
        assert before.endswith("\nAssistant:")
        assert prompt_and_response[-1] == eos or len(response) == 6
    logps, values = trainer.forward(rollout.tokens)
    torch.testing.assert_close(logps * rollout.mask, rollout.logps * rollout.mask)
    # At the start policy and initial model agree and the value is 0: only the score is earned.
    assert not values.any()
    loss = policy_loss(logps, rollout.logps, rollout.advantages, rollout.mask, 0.2)
    assert loss.item() == pytest.approx(-masked_mean(rollout.advantages, rollout.mask).item())


def test_scores_are_scaled_by_the_first_rollout(tmp_path):
    trainer = PPO(config_of(tmp_path))
    assert trainer.scaled([1.0, 3.0]).tolist() == [-1.0, 1.0]
    assert trainer.scaled([4.0, 2.0]).tolist() == [2.0, 0.0]
    trainer = PPO(config_of(tmp_path))
    assert trainer.scaled([5.0, 5.0]).tolist() == [0.0, 0.0]
    assert trainer.scaled([6.0]).tolist() == [1.0]


def prefers_b(prompts, responses):
    return [float(response.count("b")) for response in responses]


def test_training_raises_a_reward_and_is_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_reward_fn", lambda *_: prefers_b)
    seen = []
    roll_out = PPO.roll_out

    def recorded(self, prompts):
        rollout = roll_out(self, prompts)
        seen.append(rollout.tokens.shape[0])
        return rollout

    monkeypatch.setattr(PPO, "roll_out", recorded)
    options = {"num_train_epochs": 8.0, "learning_rate": 3e-3, "ppo_epochs": 3, "beta": 0.0}
    config = config_of(tmp_path, num_samples=8, max_new_tokens=8, **options)
    for name in ("one", "two"):
        ppo(config, tmp_path / name)
    assert sum(seen) == 2 * 8 * 6 * 8  # every prompt, num_samples times per epoch
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    trainer, rewards = PPO(config), []
    prompts = [row["prompt"] for row in jsonl.read(tmp_path / "prompts.jsonl")]
    for model in (demo.MODEL_DIR, tmp_path / "one"):
        trainer.policy = load_model(str(model)).eval()
        torch.manual_seed(1)
        tokens = trainer.roll_out(prompts).tokens
        texts = trainer.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rewards.append(sum(prefers_b(None, texts)))
    assert rewards[1] > 1.5 * rewards[0]
