"""Training and held-out rows that share no prompt, so that evaluation does not measure memory."""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

from rrhf_fast.data.messages import as_messages, plain_content
from rrhf_fast.data.rows import Draft, Row


def hold_out(keys: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows, given by their `prompt_key`, into the numbers of (training, held out) ones
    without a shared prompt, both in the given order.

    Prompts are visited in an order drawn with the seed; each is held out with all of its rows if
    that brings the held-out share of the rows closer to `fraction`. Both sides get at least one
    prompt. If every prompt has one row, exactly the rounded share is held out.

    Raises:
        ValueError: all rows have the same prompt, or the share of the rows rounds to none or all.
    """
    total = len(keys)
    _, first, prompt_of, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    target = round(fraction * total)
    if len(counts) < 2 or not 0 < target < total:
        problem = f"{fraction} of {total} rows leaves none to train on or none to hold out"
        raise ValueError(f"eval_fraction: {problem} (rows with one prompt stay together)")
    by_appearance = np.argsort(first)
    order = by_appearance[np.random.default_rng(seed).permutation(len(counts))]
    is_chosen, held = np.zeros(len(counts), dtype=bool), 0
    for prompt, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        if count < 2 * (target - held) and held + count < total:
            is_chosen[prompt] = True
            held += count
    if not held:
        is_chosen[order[counts[order].argmin()]] = True
    is_held_out = is_chosen[prompt_of]
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def count_shared(rows: Iterable[Row | Draft], others: Iterable[Row | Draft]) -> int:
    """Count the `rows` whose prompt is also the prompt of one of `others`."""
    known = {prompt_key(row) for row in others}
    return sum(prompt_key(row) in known for row in rows)


def prompt_key(row: Row | Draft) -> int:
    """Return a 64-bit key that is equal for rows with the same question, regardless of system
    messages, tools and arguments of the chat template. A string equals a user message of the same
    text."""
    asked = [message for message in as_messages(row.prompt) if message["role"] != "system"]
    texts = [[message["role"], plain_content(message).strip()] for message in asked]
    return xxhash.xxh3_64_intdigest(json.dumps(texts).encode())
