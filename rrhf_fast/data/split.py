"""Training and held-out rows that share no prompt, so that evaluation does not measure memory."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from rrhf_fast.data.messages import as_messages, plain_content
from rrhf_fast.data.rows import Draft, Row
from rrhf_fast.data.tokenise import TokenisedQuery


def hold_out(
    queries: Sequence[TokenisedQuery], fraction: float, seed: int
) -> tuple[list[TokenisedQuery], list[TokenisedQuery]]:
    """Split queries into (training, held out) without a shared prompt, both in the given order.

    Prompts are visited in an order drawn with the seed; each is held out with all of its rows if
    that brings the held-out share of the rows closer to `fraction`. Both sides get at least one
    prompt. If every prompt has one row, exactly the rounded share is held out.

    Raises:
        ValueError: all rows have the same prompt, or the share of the rows rounds to none or all.
    """
    rows_of: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        rows_of.setdefault(prompt_key(query.row), []).append(i)
    target = round(fraction * len(queries))
    if len(rows_of) < 2 or not 0 < target < len(queries):
        problem = f"{fraction} of {len(queries)} rows leaves none to train on or none to hold out"
        raise ValueError(f"eval_fraction: {problem} (rows with one prompt stay together)")
    prompts = list(rows_of.values())
    order = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]
    chosen: set[int] = set()
    for rows in order:
        is_closer = len(rows) < 2 * (target - len(chosen))
        if is_closer and len(chosen) + len(rows) < len(queries):
            chosen.update(rows)
    chosen = chosen or set(min(order, key=len))
    return (
        [query for i, query in enumerate(queries) if i not in chosen],
        [query for i, query in enumerate(queries) if i in chosen],
    )


def count_shared(rows: Iterable[Row | Draft], others: Iterable[Row | Draft]) -> int:
    """Count the `rows` whose prompt is also the prompt of one of `others`."""
    known = {prompt_key(row) for row in others}
    return sum(prompt_key(row) in known for row in rows)


def prompt_key(row: Row | Draft) -> str:
    """Return a key that is equal for rows with the same question, regardless of system messages,
    tools and arguments of the chat template. A string equals a user message of the same text."""
    asked = [message for message in as_messages(row.prompt) if message["role"] != "system"]
    return json.dumps([[message["role"], plain_content(message).strip()] for message in asked])
