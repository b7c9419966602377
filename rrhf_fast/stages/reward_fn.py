"""Reward functions named as package.module:function: import them, call them, check what they give.

They are the user's code, which may raise anything and return anything. Only Ctrl-C passes; what
ends the process in C (os._exit, a crash) cannot be caught.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice

import numpy as np

from rrhf_fast.data.checks import one_line, show

RewardFn = Callable[[list, list[str]], list[float]]


def load_reward_fn(name: str, option: str = "eval_reward_fn") -> RewardFn:
    """Import package.module:function. Raises ValueError, with the option's name, if there is no
    such function."""
    module_name, _, attribute = name.partition(":")
    expected = f"{option}: {name}: expected package.module:function"
    try:
        function = getattr(import_module(module_name), attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing runs the user's module
        raise ValueError(f"{expected} ({_told(error)})") from error
    if not callable(function):
        raise ValueError(f"{option}: {name}: not a function")
    return function


def call_reward_fn(
    function: RewardFn, prompts: list, responses: list[str], name: str, option: str
) -> np.ndarray:
    """[N] float64 scores of N responses, one for each; they may be NaN or infinite. Raises
    ValueError, with the option's name, if the function fails or returns anything else."""
    where = f"{option}: {name}"
    try:
        scores = function(list(prompts), list(responses))
        if isinstance(scores, str | bytes | dict | set) or scores is None:
            raise _NotScores(show(scores))
        numbers = _numbers(scores, len(responses))
    except KeyboardInterrupt:
        raise
    except _NotScores as error:
        expected = f"expected {len(responses)} numbers, one per response"
        raise ValueError(f"{where}: {expected}, found {error}") from error
    except BaseException as error:  # from the user's function, of any type
        raise ValueError(f"{where} raised {_told(error)}") from error
    if numbers.shape != (len(responses),):
        expected = f"expected {len(responses)} numbers, one per response"
        raise ValueError(f"{where}: {expected}, found shape {numbers.shape}")
    return numbers


class _NotScores(Exception):
    """What was returned is not numbers; says what it is."""


def _numbers(scores: object, count: int) -> np.ndarray:
    """What a function returned as float64, None as NaN: an array, a tensor, a sequence or a
    generator of numbers."""
    if hasattr(scores, "detach"):  # a tensor, perhaps of another device or with a gradient
        scores = scores.detach().cpu().double().numpy()
    if not isinstance(scores, Sequence | np.ndarray):
        scores = list(islice(scores, count + 1))  # it may have no end
    try:
        if (kind := np.asarray(scores).dtype).kind not in "biufO":
            raise _NotScores(f"{kind} in {show(scores)}")
        return np.asarray(scores, dtype=np.float64)
    except OverflowError as error:  # an integer of more than 308 digits
        raise _NotScores("a number too large") from error
    except (TypeError, ValueError) as error:
        raise _NotScores(f"{show(scores)} ({one_line(error, 100)})") from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
