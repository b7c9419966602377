"""Signs of harm between two sets of measures, and of too few prompts."""

import pytest

from rrhf_fast.evaluate.caution import few_prompts, signs_of_harm
from rrhf_fast.evaluate.measures import Estimate


def measures(**values):
    return {name: Estimate(x, x - 0.1, x + 0.1) for name, x in values.items()}


BASE = measures(reward=0, perplexity=10, distinct=0.8)
CASES = {
    "better": (measures(reward=1, perplexity=10, distinct=0.8), []),
    "within the intervals": (measures(reward=0.1, perplexity=10.1, distinct=0.7), []),
    "hacked": (measures(reward=1, perplexity=20, distinct=0.8), ["reward hacking"]),
    "adrift": (measures(reward=0, perplexity=20, distinct=0.8), ["leaves its reference"]),
    "worse and adrift": (measures(reward=-1, perplexity=20), ["leaves its reference"]),
    "collapsed": (measures(reward=1, perplexity=5, distinct=0.3), ["answers collapse"]),
    "both": (
        measures(reward=1, perplexity=20, distinct=0.3),
        ["reward hacking", "answers collapse"],
    ),
    "more distinct": (measures(reward=1, perplexity=5, distinct=1), []),
    "no reference": (measures(reward=1, distinct=0.3), ["answers collapse"]),
}


@pytest.mark.parametrize("name", CASES)
def test_signs_of_harm(name):
    after, expected = CASES[name]
    found = signs_of_harm(BASE, after, "in round 0")
    assert len(found) == len(expected)
    for line, words in zip(found, expected, strict=True):
        assert line.startswith("warning: ") and words in line and "than in round 0" in line


def test_without_a_baseline_or_intervals_nothing_is_said():
    nan = float("nan")
    points = {name: Estimate(x.value, nan, nan) for name, x in CASES["both"][0].items()}
    assert signs_of_harm({}, CASES["both"][0], "") == signs_of_harm(BASE, points, "") == []


def test_few_prompts_get_one_sentence():
    assert few_prompts(50) == few_prompts(1000) == []
    for number in (2, 49):
        (line,) = few_prompts(number)
        assert f"only {number} prompts" in line and "intervals are wide" in line
    assert "no intervals" in few_prompts(1)[0]
