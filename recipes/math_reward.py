"""The reward of math.iterate.yaml: 1 if the last number of a response is the answer, else 0.

A reward function gets prompts and responses. So answers are read from the rows, by their question;
the environment's MATH_SOURCES names other sources of rows with `question` and `answer`.
"""

import os
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cache

from rrhf_fast.data.sources import read_records

SOURCES = "openai/gsm8k:main:train openai/gsm8k:main:test"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def reward(prompts: Sequence[str | list[dict]], responses: Sequence[str]) -> list[float]:
    """1.0 or 0.0 for each response. Raises KeyError for a question that no source holds."""
    answers = _answers()
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    pairs = zip(texts, responses, strict=True)
    return [float(last_number(response) == answers[question]) for question, response in pairs]


def last_number(text: str) -> Decimal | None:
    """The last number of a text, as "72" of "so the answer is #### 72"; None without one."""
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


@cache
def _answers() -> dict[str, Decimal | None]:
    sources = os.environ.get("MATH_SOURCES", SOURCES).split()
    records = (record for source in sources for _, record in read_records(source))
    return {record["question"]: last_number(record["answer"]) for record in records}
