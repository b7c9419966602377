"""Reward functions named as package.module:function."""

from collections.abc import Callable
from importlib import import_module

RewardFn = Callable[[list, list[str]], list[float]]


def load_reward_fn(name: str, option: str = "eval_reward_fn") -> RewardFn:
    """Import package.module:function. Raises ValueError, with the option's name, if there is no
    such function."""
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module_name), attribute)
    except Exception as error:  # importing runs the user's module
        raise ValueError(f"{option}: {name}: expected package.module:function ({error})") from error
    if not callable(function):
        raise ValueError(f"{option}: {name}: not a function")
    return function
