"""PPO (arXiv 1707.06347), small: the online method that the paper compares RRHF with.

The value is a linear head on the last hidden states of the policy: policy and value share their
trunk. Each token's reward is -beta * (log p - log p of the initial model); the last token's adds
the score of the response, on a scale where those of the first rollout have mean 0 and variance 1
(as in arXiv 1909.08593), so that beta and the value mean the same for any reward. Advantages come
from GAE (arXiv 1506.02438).

All tensors of a batch lie on one grid [B, T] of next tokens: entry t belongs to token t + 1 of the
prompt and the response, and `mask` (float, 0 or 1) selects the tokens of the response.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from transformers import get_scheduler

from experiments.peers import GRPOConfig
from rrhf_fast.model.decoder import load_model, load_tokenizer
from rrhf_fast.model.generate import Decoding, generate_batch
from rrhf_fast.stages.reward_fn import load_reward_fn


@dataclass
class PPOConfig(GRPOConfig):
    """Options of PPO, which draws its own samples."""

    train_batch_size: Annotated[int, Gt(0)] = 8
    """Prompts per rollout, from which several optimizer steps follow."""
    num_train_epochs: Annotated[float, Gt(0)] = 1.0
    """Passes over the prompts, each with new samples."""
    beta: Annotated[float, Ge(0)] = 0.05
    """Weight of the penalty per token for leaving the initial model, in standard deviations of the
    initial model's score."""
    ppo_epochs: Annotated[int, Gt(0)] = 4
    """Passes over each rollout."""
    minibatches: Annotated[int, Gt(0)] = 2
    """Optimizer steps per pass."""
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 0.95
    clip: Annotated[float, Gt(0)] = 0.2
    """Largest change of a token's probability ratio, and of its value, that still earns."""
    value_weight: Annotated[float, Ge(0)] = 0.1
    """Weight of the value loss beside the policy loss."""
    lr_scheduler_type: str = "linear"
    warmup_steps: Annotated[float, Ge(0), Le(1)] = 0.03
    """Share of the optimizer steps with a rising rate."""


def token_rewards(
    logps: Tensor, reference_logps: Tensor, scores: Tensor, last: Tensor, beta: float
) -> Tensor:
    """The reward of each token [B, T]: the penalty, and at index `last` [B] the score [B]."""
    rewards = -beta * (logps - reference_logps)
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantage + value), [B, T], 0 outside the mask.

    An episode ends with its mask: nothing after it counts.
    """
    values, advantages = values * mask, torch.zeros_like(values)
    following, running = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        error = rewards[:, t] + gamma * following - values[:, t]
        running = (error + gamma * gae_lambda * running) * mask[:, t]
        advantages[:, t], following = running, values[:, t]
    return advantages, advantages + values


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of the mask."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and (unbiased) variance 1 over the tokens of the mask."""
    centred = (values - masked_mean(values, mask)) * mask
    variance = centred.square().sum() / (mask.sum() - 1)
    return centred * torch.rsqrt(variance + 1e-8)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float):
    """The negative smaller of ratio * advantage and clipped ratio * advantage, token mean."""
    ratio = torch.exp((logps - old_logps) * mask)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(-torch.minimum(ratio * advantages, clipped * advantages), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float):
    """Half the larger squared error of the value and of the value clipped around the old one."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(errors, mask)


@dataclass
class Rollout:
    """Sampled responses and what stays fixed while the policy learns from them."""

    tokens: Tensor  # int64 [B, T + 1], padded on the right, where causal attention hides it
    mask: Tensor  # [B, T]
    logps: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor

    def pick(self, index: Tensor) -> "Rollout":
        """The responses of these indices."""
        return Rollout(**{name: value[index] for name, value in vars(self).items()})


class PPO:
    """A policy with a value head, its frozen initial state, and their training."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self.tokenizer = load_tokenizer(config.model_name_or_path)
        self.policy = load_model(config.model_name_or_path).eval()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.value_head = nn.Linear(self.policy.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.score = load_reward_fn(config.reward_fn, "reward_fn")
        self.scale: tuple[Tensor, Tensor] | None = None

    def train(self, prompts: list[str]) -> None:
        """Roll out and learn, until the prompts were seen `num_train_epochs` times."""
        config = self.config
        rng = np.random.default_rng(config.seed)
        count = round(config.num_train_epochs * len(prompts))
        passes = [rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))]
        order = np.concatenate(passes)[:count]
        batches = np.split(order, range(config.train_batch_size, count, config.train_batch_size))
        num_steps = len(batches) * config.ppo_epochs * config.minibatches
        parameters = [*self.policy.parameters(), *self.value_head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        schedule = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=round(config.warmup_steps * num_steps),
            num_training_steps=num_steps,
        )
        for batch in batches:
            rollout = self.roll_out([prompts[i] for i in batch])
            for _ in range(config.ppo_epochs):
                for part in torch.randperm(len(rollout.mask)).chunk(config.minibatches):
                    optimizer.zero_grad()
                    self.loss(rollout.pick(part)).backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    schedule.step()

    @torch.no_grad()
    def roll_out(self, prompts: list[str]) -> Rollout:
        """Sample responses of the live policy, score them, and compute their advantages."""
        config, eos, pad = self.config, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        encoded = [np.array(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        responses = generate_batch(
            self.policy,
            encoded,
            Decoding(config.max_new_tokens, count=config.num_samples),
            max_length=self.policy.config.max_position_embeddings,
            end_token_ids=[eos],
            pad_token_id=pad,
        )
        pairs = [(i, ids) for i, group in enumerate(responses) for ids in group]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in pairs]
        scores = self.scaled(self.score([prompts[i] for i, _ in pairs], texts))
        starts = torch.tensor([len(encoded[i]) for i, _ in pairs]) - 1
        last = starts + torch.tensor([len(ids) for _, ids in pairs]) - 1
        rows = [torch.from_numpy(np.concatenate([encoded[i], ids])) for i, ids in pairs]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        places = torch.arange(tokens.shape[1] - 1)
        mask = ((places >= starts[:, None]) & (places <= last[:, None])).float()
        logps, values = self.forward(tokens)
        reference_logps = _next_logps(self.reference(tokens[:, :-1]).logits, tokens)
        rewards = token_rewards(logps, reference_logps, scores, last, config.beta)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
        return Rollout(tokens, mask, logps, whiten(advantages, mask), returns, values)

    def scaled(self, scores: list[float]) -> Tensor:
        """The scores in standard deviations of the first rollout, from its mean."""
        values = torch.tensor(scores, dtype=torch.float32)
        if self.scale is None:
            deviation = values.std(correction=0)
            self.scale = values.mean(), deviation if deviation > 0 else torch.ones(())
        return (values - self.scale[0]) / self.scale[1]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the next tokens, and the values of the states before them, [B, T]."""
        out = self.policy(tokens[:, :-1], output_hidden_states=True)
        values = self.value_head(out.hidden_states[-1]).squeeze(-1)
        return _next_logps(out.logits, tokens), values

    def loss(self, part: Rollout) -> Tensor:
        """The policy loss and the weighted value loss."""
        logps, values = self.forward(part.tokens)
        clip, mask = self.config.clip, part.mask
        of_policy = policy_loss(logps, part.logps, part.advantages, mask, clip)
        of_value = value_loss(values, part.values, part.returns, mask, clip)
        return of_policy + self.config.value_weight * of_value


def _next_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def ppo(config: PPOConfig, output_dir: Path) -> None:
    """Train on samples of the live model; write the model."""
    torch.manual_seed(config.seed)
    with open(config.train_data, encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    trainer = PPO(config)
    trainer.train(prompts)
    trainer.policy.save_pretrained(output_dir)
    trainer.tokenizer.save_pretrained(output_dir)
