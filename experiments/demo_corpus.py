"""The demo's text: questions about household tasks, and answers of very mixed quality.

An answer combines independent choices (the right tool or any, the thing asked about or any, kind or
rude or neither, crisp or rambling or repeating, finished or cut off), so a model trained on the
text is mediocre on average and can reach every level of quality.
"""

import random
from dataclasses import dataclass

from rrhf_fast.demo.reward import KINDS, THINGS, TOOLS

QUESTIONS = (
    "How do I {verb} {thing}?",
    "What is the best way to {verb} {thing}?",
    "Can you tell me how to {verb} {thing}?",
    "I want to {verb} {thing}. Any tips?",
    "What do I need to {verb} {thing}?",
    "Who can show me how to {verb} {thing}?",
)
DETERMINERS = ("my", "the", "our", "this")
ADJECTIVES = ("", "", "small", "old", "big", "new", "dirty", "little", "green")

KIND_OPENERS = (
    "Sure!", "Sure, that is easy.", "Of course!", "Gladly!", "I am glad you ask.", "Happy to help!",
    "Welcome, and thank you for the question.",
)  # fmt: skip
RUDE_OPENERS = (
    "Ugh, not again.", "Whatever.", "What a silly question.", "Duh.", "You are just lazy.",
    "This is so boring.",
)  # fmt: skip
CORES = (
    "Take a {tool} and {verb} the {thing} slowly.",
    "You can {verb} the {thing} with a {tool}.",
    "First get a {tool}, then {verb} the {thing} with care.",
    "The best way to {verb} a {thing} is with a {tool}.",
    "Use a {tool} for the {thing} and do not hurry.",
    "A {tool} is all you need for the {thing}.",
    "Hold the {tool} in one hand and the {thing} in the other.",
)
CURT_CORES = ("Use a {tool}.", "I do not know.", "No idea.", "Just {verb} it.", "Ask a friend.")
DETAILS = (
    "Start at the top and go down.", "It takes about ten minutes.", "Stop when it looks good.",
    "A friend can help you with the rest.", "Do it twice a week.", "Try a small spot first.",
    "Then let it rest for a while.", "Be gentle.",
)  # fmt: skip
ASIDES = (
    "By the way, my {thing} is next to a {tool}.",
    "I once saw a {thing} and a {tool} in town.",
    "Some people like a {thing} more than a {tool}.",
    "My uncle has a {thing} too.",
)
KIND_CLOSERS = ("I hope that helps!", "Good luck!", "You are always welcome to ask.")


@dataclass(frozen=True)
class Task:
    verb: str
    thing: str


@dataclass(frozen=True)
class Quality:
    """The probability of each property of an answer."""

    right_tool: float
    right_thing: float
    kind: float
    rude: float
    curt: float
    detail: float
    aside: float
    repeat: float
    cut: float


MIXED = Quality(0.5, 0.55, 0.35, 0.3, 0.25, 0.5, 0.3, 0.25, 0.15)
GOOD = Quality(0.95, 0.95, 0.9, 0.0, 0.05, 0.7, 0.05, 0.03, 0.02)
BAD = Quality(0.2, 0.2, 0.1, 0.6, 0.4, 0.3, 0.5, 0.5, 0.4)


def split_tasks(rng: random.Random, eval_share: float) -> tuple[list[Task], list[Task]]:
    """Split all tasks into (train, eval); every verb and nearly every thing occurs in both."""
    train, held_out = [], []
    for verbs, things in KINDS:
        for verb in verbs:
            tasks = [Task(verb, thing) for thing in things]
            rng.shuffle(tasks)
            count = round(eval_share * len(tasks))
            held_out += tasks[:count]
            train += tasks[count:]
    return train, held_out


def prompt(rng: random.Random, task: Task) -> str:
    """A question about the task, ending where the assistant's answer begins."""
    words = (rng.choice(DETERMINERS), rng.choice(ADJECTIVES), task.thing)
    thing = " ".join(word for word in words if word)
    return f"Human: {rng.choice(QUESTIONS).format(verb=task.verb, thing=thing)}\nAssistant:"


def response(rng: random.Random, task: Task, quality: Quality) -> str:
    """An answer, starting with the space that separates it from the prompt."""

    def happens(chance: float) -> bool:
        return rng.random() < chance

    tool = TOOLS[task.verb] if happens(quality.right_tool) else rng.choice(tuple(TOOLS.values()))
    thing = task.thing if happens(quality.right_thing) else rng.choice(THINGS)
    sentences = []
    mood = rng.random()
    if mood < quality.kind:
        sentences.append(rng.choice(KIND_OPENERS))
    elif mood < quality.kind + quality.rude:
        sentences.append(rng.choice(RUDE_OPENERS))
    core = rng.choice(CURT_CORES if happens(quality.curt) else CORES)
    sentences.append(core.format(verb=task.verb, thing=thing, tool=tool))
    if happens(quality.detail):
        sentences.append(rng.choice(DETAILS))
    if happens(quality.aside):
        aside = rng.choice(ASIDES)
        sentences.append(
            aside.format(thing=rng.choice(THINGS), tool=rng.choice(tuple(TOOLS.values())))
        )
    if happens(quality.repeat):
        sentences += [sentences[-1]] * rng.randint(1, 2)
    if mood < quality.kind and happens(0.4):
        sentences.append(rng.choice(KIND_CLOSERS))
    words = " ".join(sentences).split(" ")
    if happens(quality.cut):
        words = (
            words[: rng.randint(max(1, len(words) // 3), len(words) - 1)]
            if len(words) > 1
            else words
        )
    return " " + " ".join(words)
