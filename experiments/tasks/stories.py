"""Long form: stories of up to 256 tokens that should keep to who and what was asked for.

    Tell a story about Mia and her red kite.
    Story: One day Mia found a red kite. ... The end.

A sentence is consistent if it has at least five words, names who or what was asked for and nobody
and nothing else, and repeats no earlier one. The reward is the share of consistent sentences among
all of them, or among twelve if there are fewer, times 3, plus 0.5 for a story that comes to an end.
"""

import random
import re

VOCABULARY = 576
CONTEXT = 320  # tokens of prompt and story

NAMES = {  # and who they are in later sentences
    "Mia": "her", "Anna": "her", "Lily": "her", "Nora": "her", "Zoe": "her", "Ruth": "her",
    "Tom": "his", "Ben": "his", "Max": "his", "Sam": "his", "Leo": "his", "Jack": "his",
}  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "pink", "brown")
THINGS = ("kite", "ball", "boat", "hat", "cup", "bike", "drum", "doll", "car", "box", "bell", "bag")
SENTENCES = (
    "One day {name} found a {colour} {thing}.",
    "The {thing} was {colour} and very old.",
    "{name} took the {thing} to the park.",
    "A friend asked {name} about the {colour} {thing}.",
    "{name} was so happy with the {thing}.",
    "Then it began to rain on the {thing}.",
    "{name} ran home with the {colour} {thing}.",
    "Mother saw the {thing} and smiled.",
    "At night {name} put the {thing} under the bed.",
    "The {colour} {thing} fell into the water.",
    "{name} cried and looked for the {thing}.",
    "A dog brought the {colour} {thing} back.",
    "{name} said thank you and held the {thing}.",
    "Nobody had a {thing} as {colour} as that.",
    "The next day {name} showed the {thing} at school.",
    "All day long {name} played with the {colour} {thing}.",
)
END = "The end."
ENOUGH = 12  # sentences
SHORTEST = 5  # words of a sentence that counts
STRAY = 0.12  # the probability that the text names another name, colour or thing
REPEATED = 0.15  # the probability that a sentence of the text is an earlier one


def example(rng: random.Random) -> tuple[str, str]:
    """A request, and a story that strays from it, repeats itself, and may not end."""
    asked = {name: rng.choice(among) for name, among in _WORLD.items()}
    order = rng.sample(SENTENCES, rng.randint(6, 16))
    story: list[str] = []
    for sentence in order:
        told = {
            name: rng.choice(among) if rng.random() < STRAY else asked[name]
            for name, among in _WORLD.items()
        }
        story.append(sentence.format(**told))
        if rng.random() < REPEATED:
            story.append(rng.choice(story))
    if rng.random() < 0.7:
        story.append(END)
    whose = NAMES[asked["name"]]
    request = "Tell a story about {name} and {whose} {colour} {thing}.\nStory:"
    return request.format(whose=whose, **asked), " " + " ".join(story)


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Between 0 and 3.5, see above; rounded to 4 decimals."""
    return [round(_score(*pair), 4) for pair in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    ends = response.rstrip().endswith(END)
    story = response.rstrip().removesuffix(END)
    sentences = [s.strip() for s in re.split(r"(?<=\.)", story) if s.strip()]
    asked = _NAMED & set(_words(prompt))
    consistent = {s for s in sentences if s.endswith(".") and _is_consistent(_words(s), asked)}
    return 3 * len(consistent) / max(ENOUGH, len(sentences)) + 0.5 * ends


def _is_consistent(words: list[str], asked: set[str]) -> bool:
    named = _NAMED & set(words)
    return len(words) >= SHORTEST and bool(named) and named <= asked


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


_WORLD = {"name": tuple(NAMES), "colour": COLOURS, "thing": THINGS}
_NAMED = {word for among in _WORLD.values() for word in among}
