"""Load the modules behind a command without those that it may never use."""

import builtins
import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

# What transformers takes from other packages wherever they are installed, as it is imported, for
# features that a command may never use. torchao also prints warnings. Only functions, and classes
# for isinstance: a `_StandIn` serves for these.
_RARE = {
    "peft": {"PeftMixedModel", "PeftModel"},
    "scipy.optimize": {"linear_sum_assignment"},
    "torchao.prototype.safetensors.safetensors_support": {"flatten_tensor_state_dict"},
}

# They warn of builds and kernels of their own as peft imports them, which is no fault of the
# command's user.
_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
_alone = False


def own_process() -> None:
    """Say that this process runs a command and nothing else: what modules made stays until it ends,
    so that searching it for garbage, a million objects every time, is in vain. (What is frozen is
    never collected, so neither a notebook's objects nor those of a user's reward must be.) Its
    stderr holds only its own lines."""
    global _alone
    _alone = True
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, transformers is imported without what is `_RARE`, which is imported once it is used,
    and garbage is not collected."""
    import_, collects = builtins.__import__, gc.isenabled()

    def import_common(name, globals=None, locals=None, fromlist=(), level=0):
        names = set(fromlist or ())
        is_rare = name in _RARE and name not in sys.modules and names and names <= _RARE[name]
        if is_rare and (globals or {}).get("__name__", "").startswith("transformers."):
            return SimpleNamespace(**{n: _StandIn(n, (), {"home": name}) for n in names})
        return import_(name, globals, locals, fromlist, level)

    builtins.__import__ = import_common
    gc.disable()
    try:
        yield
    finally:
        builtins.__import__ = import_
        if _alone:
            gc.freeze()
        if collects:
            gc.enable()


class _StandIn(type):
    """A function or class that is imported when it is called; until its module is imported, nothing
    is its instance."""

    home: str

    def __call__(cls, *args, **kwargs) -> Any:
        return cls._real()(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return cls.home in sys.modules and isinstance(instance, cls._real())

    def _real(cls) -> Any:
        return getattr(import_module(cls.home), cls.__name__)
