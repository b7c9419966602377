"""Rounds: warmed up, in varying order, repeated where other programs disturbed them."""

import pytest

from benchmarks import timing
from benchmarks.timing import in_rounds, interleaved


class Scripted:
    """`Others` that read these numbers of cores, one per round."""

    def __init__(self, readings):
        self.readings = iter(readings)

    def __call__(self):
        return self

    def cores(self):
        return next(self.readings)


@pytest.fixture
def script(monkeypatch):
    """Let rounds be disturbed as given, on a CPU of two cores."""

    def use(*readings):
        monkeypatch.setattr(timing, "Others", Scripted(readings))
        monkeypatch.setattr(timing, "is_disturbed", lambda used: (used or 0.0) > 0.1)

    return use


def numbered():
    """A call that returns how often it was called."""
    calls = []

    def call():
        calls.append(1)
        return len(calls)

    return call


def test_one_uncounted_round_and_orders_of_their_own():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abcdef"}
    seconds = interleaved(ways, 4, before=lambda: calls.append("-"))
    assert all(len(times) == 4 for times in seconds.values()) and list(seconds) == list("abcdef")
    rounds = [calls[at + 1 : at + 12 : 2] for at in range(0, len(calls), 12)]
    assert calls[::2] == ["-"] * len(rounds) * 6
    assert len(rounds) >= 5 and all(sorted(order) == list("abcdef") for order in rounds)
    assert len(set(map(tuple, rounds))) == len(rounds)
    again = []
    interleaved({name: lambda name=name: again.append(name) for name in "abcdef"}, 4)
    assert again[: 6 * 5] == [name for order in rounds for name in order][: 6 * 5]


def test_disturbed_rounds_are_repeated(script):
    script(0.0, 1.5, 0.05, 0.9, 0.0)
    record = {}
    found = in_rounds({"a": numbered()}, 3, record=record)
    assert found == {"a": [2, 4, 6]}  # the first call warmed up
    rounds = record["rounds"]
    assert rounds["counted"] == 3 and rounds["run"] == 5 and rounds["disturbed"] == 2
    assert rounds["disturbed_counted"] == 0 and rounds["cores_used_by_others"] == [0.0, 0.05, 0.0]


def test_on_a_busy_machine_the_least_disturbed_rounds_count(script):
    script(1.5, 0.0, 0.3, 1.9, 0.2)
    record = {}
    found = in_rounds({"a": numbered()}, 3, record=record)
    assert found == {"a": [3, 4, 6]}
    assert record["rounds"]["disturbed"] == 4 and record["rounds"]["disturbed_counted"] == 2


@pytest.mark.parametrize("device, run", [("cpu", 5), ("cuda", 3)])
def test_it_is_the_measured_device_that_counts(script, monkeypatch, device, run):
    """A machine may have a GPU while its CPU is measured."""
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    script(*[1.0] * 5)
    record = {}
    in_rounds({"a": numbered()}, 3, device=device, record=record)
    assert record["rounds"]["run"] == run


def test_unknown_load_is_not_recorded_as_none(script):
    script(None, None)
    record = {}
    in_rounds({"a": numbered()}, 2, record=record)
    assert record["rounds"]["cores_used_by_others"] == [None, None]
    assert record["rounds"]["run"] == 2


def test_calm_rounds_are_not_repeated(script):
    script(*[None, 0.0] * 10)
    assert in_rounds({"a": numbered()}, 6) == {"a": [2, 3, 4, 5, 6, 7]}


@pytest.mark.parametrize("length, rounds", [(59.0, 5), (61.0, 3)])
def test_long_rounds_are_fewer_unless_asked(script, monkeypatch, length, rounds):
    script(*[0.0] * 20)
    monkeypatch.setattr(timing, "seconds", lambda function: (function(), length)[1])
    assert len(in_rounds({"a": numbered()}, None)["a"]) == rounds
    assert len(in_rounds({"a": numbered()}, 7)["a"]) == 7
