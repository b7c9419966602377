"""What ranks tell each other: errors of any class arrive as errors that say the same."""

import pickle

import pytest

from rrhf_fast.stages.ranks import Ranks, _portable


class Odd(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


class OddValue(ValueError):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


ERRORS = [(Odd(1, 2), RuntimeError), (OddValue(1, 2), ValueError), (OSError(2, "x"), OSError)]


@pytest.mark.parametrize("error, kind", ERRORS)
def test_errors_can_be_sent(error, kind):
    sent = pickle.loads(pickle.dumps(_portable(error)))
    assert isinstance(sent, kind) and str(sent) == str(error)
    assert _portable(None) is None


@pytest.mark.parametrize("method", ["once", "first"])
def test_a_rank_raises_its_own_error(method):
    error = Odd(1, 2)

    def fail():
        raise error

    with pytest.raises(Odd) as raised:
        getattr(Ranks(), method)(fail)
    assert raised.value is error and error.on_all_ranks
