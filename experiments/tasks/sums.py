"""Verifiable reasoning: additions worked digit by digit, by a text that often forgets the carry.

    347+285=7+5=12,4+8+1=13,3+2+1=6,632

The reward is 1 if what follows the last comma is the sum, else 0. In the text a carry is more often
forgotten than not, so a model's likeliest answer is wrong where something is carried: sampling at a
lower temperature does not help, unlike learning from the reward.
"""

import random

from rrhf_fast.evaluate.measures import best_of

VOCABULARY = 259  # bytes and special tokens, so that each digit is a token
CONTEXT = 64
DIGITS = 3
FORGOTTEN = 0.55  # the probability that a carry is forgotten
SLIP = 0.04  # the probability that two digits are added up wrongly


def example(rng: random.Random) -> tuple[str, str]:
    """An addition and how someone careless works it out."""
    a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
    steps, carry, answer = [], 0, ""
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        carry = 0 if rng.random() < FORGOTTEN else carry
        total = int(x) + int(y) + carry
        if rng.random() < SLIP:
            total = max(0, total + rng.choice((-1, 1)))
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        answer, carry = f"{total % 10}{answer}", total // 10
    return f"{a}+{b}=", ",".join([*steps, f"{carry or ''}{answer}"])


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for each response whose last number is the sum, else 0."""
    return [float(_is_right(*pair)) for pair in zip(prompts, responses, strict=True)]


def _is_right(prompt: str, response: str) -> bool:
    total = sum(int(number) for number in prompt.rstrip("=").split("+"))
    return response.rpartition(",")[2] == str(total)


def measure(prompt: str, responses: list[str]) -> dict[str, tuple[float, float]]:
    """pass@k by the unbiased estimator of arXiv 2107.03374: the chance that k of the samples, drawn
    without replacement, hold a right one. 0/1 rewards make it the expected best of k."""
    rewards = score([prompt] * len(responses), responses)
    return {
        f"pass_at_{k}": (best_of(rewards, k), 1.0) if len(rewards) >= k else (0.0, 0.0)
        for k in (1, 8)
    }
