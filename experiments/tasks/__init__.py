"""Small tasks beside the demo's: text to pre-train a mediocre model on, prompts, and a reward.

sums.py           verifiable reasoning: additions worked digit by digit
stories.py        long form: stories of up to 256 tokens that should keep to what was asked
safety.py         the demo's questions, among them some that should be refused
constitution.py   the demo's answers judged by written principles, by a local endpoint

A task's module has VOCABULARY and CONTEXT (tokens), `example(rng)`, a prompt and a response of very
mixed quality, and `score(prompts, responses)`. `measure(prompt, responses)` gives more measures of
one prompt's samples, as {name: (numerator, denominator)}, which MEASURES names. Training prompts
share no `subject(prompt)` with the held-out ones; without this function that is the prompt itself.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt

from experiments.make_demo import pretrain, train_tokenizer
from rrhf_fast.stages.files import write_rows
from rrhf_fast.stages.options import check

MEASURES = {
    "pass_at_1": "pass@1",
    "pass_at_8": "pass@8",
    "refused_forbidden": "share refused of what is forbidden",
    "refused_harmless": "share refused of what is harmless",
}

FRUITLESS = 20_000  # draws without a new prompt, before giving up


@dataclass
class TaskConfig:
    """Options of `task`: a model pre-trained on a task's text, and prompts for it."""

    name: Literal["sums", "stories", "safety"]
    documents: Annotated[int, Ge(64)]
    """Examples, each seen once in pre-training, in batches of 64."""
    hidden_size: Annotated[int, Gt(0)] = 64
    layers: Annotated[int, Gt(0)] = 4
    train_prompts: Annotated[int, Gt(0)] = 448
    eval_prompts: Annotated[int, Gt(0)] = 96
    """Prompts that occur neither in pre-training nor among train_prompts, nor does their subject
    among the latter."""
    seed: int = 0

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)


@dataclass
class MeasureConfig:
    """Options of `measure`: a task's own measures of an evaluation's samples."""

    evaluation: str
    task: Literal["sums", "safety"]

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)


def make_task(config: TaskConfig, folder: Path) -> None:
    """Write folder/model, folder/train.jsonl and folder/eval.jsonl."""
    task = import_module(f"experiments.tasks.{config.name}")
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    draw = partial(_draw, task.example, rng)
    held_out = _distinct(draw, config.eval_prompts, lambda prompt: False)
    texts = [draw(held_out.__contains__) for _ in range(config.documents)]
    subject = getattr(task, "subject", str)
    subjects = set(map(subject, held_out))
    prompts = _distinct(draw, config.train_prompts, lambda prompt: subject(prompt) in subjects)
    tokenizer = train_tokenizer(texts, task.VOCABULARY, task.CONTEXT)
    model = pretrain(tokenizer, texts, 64, config.hidden_size, config.layers)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, group in (("train", prompts), ("eval", held_out)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in group])


def _distinct(draw: Callable, count: int, is_taken: Callable[[str], bool]) -> dict[str, None]:
    """As many prompts, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        prompt, _ = draw(lambda prompt: prompt in found or is_taken(prompt))
        found[prompt] = None
    return found


def _draw(
    example: Callable, rng: random.Random, is_taken: Callable[[str], bool]
) -> tuple[str, str]:
    """An example whose prompt is free. Raises ValueError if there seems to be none left."""
    for _ in range(FRUITLESS):
        prompt, response = example(rng)
        if not is_taken(prompt):
            return prompt, response
    raise ValueError(
        f"documents, train_prompts, eval_prompts: the task has not so many different prompts "
        f"({FRUITLESS} draws gave no new one)"
    )


def measure(config: MeasureConfig) -> tuple[list[str], dict[str, dict[str, list]]]:
    """The prompts of an evaluation, and their terms by measure."""
    task = import_module(f"experiments.tasks.{config.task}")
    with open(Path(config.evaluation, "scored.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    terms = [task.measure(row["prompt"], row["responses"]) for row in rows]
    measures = {
        name: {
            "numerators": [of_prompt[name][0] for of_prompt in terms],
            "denominators": [of_prompt[name][1] for of_prompt in terms],
        }
        for name in terms[0]
    }
    return [row["prompt"] for row in rows], measures
