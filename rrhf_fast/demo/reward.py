"""The demo's reward: is an answer to a household question on topic, kind, crisp and complete?

`score(prompts, responses)` needs only the two texts and the small world below, in which each task
(a verb) has one right tool. A score is the sum of

    topic      +1.0 names the thing asked about         +1.0 names the right tool
               -0.4 per other thing or tool
    manners    +0.7 for a kind word                     -1.0 for a rude word
    crispness  -2.0 * share of repeated word pairs
    ending     +0.3 for . ! or ? at the end             -0.7 without
    length     -0.5 * |log(words / 20)|

and is typically between -6 (an empty answer) and +3. The best length is 20 words, and saying more
gains nothing: topic and manners count once, while wrong names and repeats cost.
"""

import math
import re
from itertools import pairwise

TOOLS = {  # the right tool for each task
    "feed": "bowl", "wash": "tub", "groom": "comb", "calm": "blanket", "carry": "basket",
    "water": "jug", "trim": "knife", "plant": "spade", "tie": "ribbon", "move": "tray",
    "clean": "cloth", "dry": "towel", "scrub": "sponge", "dust": "feather", "polish": "rag",
    "fix": "hammer", "paint": "roller", "sand": "grinder", "tighten": "wrench", "measure": "ruler",
}  # fmt: skip
KINDS = tuple(  # (tasks, things that they apply to)
    (tuple(tasks.split()), tuple(things.split()))
    for tasks, things in (
        (
            "feed wash groom calm carry",
            "cat dog hen goat horse rabbit parrot pony duck sheep lamb donkey",
        ),
        (
            "water trim plant tie move",
            "rose fern tulip cactus bean vine tomato lily palm bush herb melon",
        ),
        (
            "clean dry scrub dust polish",
            "window floor kettle mirror carpet table stove sink pan vase plate clock",
        ),
        (
            "fix paint sand tighten measure",
            "chair door fence bike gate lamp shelf ladder cart boat drawer bench",
        ),
    )
)
THINGS = tuple(thing for _, things in KINDS for thing in things)
KIND_WORDS = frozenset(("sure", "gladly", "welcome", "glad", "happy", "hope", "luck", "course"))
RUDE_WORDS = frozenset(("ugh", "whatever", "silly", "lazy", "boring", "duh"))
BEST_LENGTH = 20  # words

_NAMED = frozenset(THINGS) | frozenset(TOOLS.values())


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """One score per (prompt, response), higher is better, rounded to 4 decimals."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts do not match {len(responses)} responses")
    return [round(_score(p, r), 4) for p, r in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    words = _words(response)
    if not words:
        return -6.0
    said, asked = set(words), _words(prompt)
    wanted = {w for w in asked if w in THINGS} | {TOOLS[w] for w in asked if w in TOOLS}
    slips = len((said & _NAMED) - wanted)
    topic = len(said & wanted) - 0.4 * slips
    manners = 0.7 * bool(said & KIND_WORDS) - 1.0 * bool(said & RUDE_WORDS)
    pairs = list(pairwise(words))
    repeats = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
    ending = 0.3 if response.rstrip().endswith((".", "!", "?")) else -0.7
    return topic + manners - 2.0 * repeats + ending - 0.5 * abs(math.log(len(words) / BEST_LENGTH))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())
