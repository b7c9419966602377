"""RRHF (arXiv 2304.05302), fast: rank responses instead of running reinforcement learning.

    import rrhf_fast
    result = rrhf_fast.train(rrhf_fast.TrainConfig(model_name_or_path=..., train_data=...))
    loss = rrhf_fast.rrhf_loss(logps, rewards, mask=mask).loss     # in your own loop

Names are loaded on first use, so importing the package is quick.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": "rrhf_fast.config",
    "TrainResult": "rrhf_fast.engine.loop",
    "train": "rrhf_fast.engine.loop",
    "RRHFLoss": "rrhf_fast.losses",
    "linear_logprob": "rrhf_fast.losses",
    "linear_rrhf_loss": "rrhf_fast.losses",
    "rrhf_loss": "rrhf_fast.losses",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
