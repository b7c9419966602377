"""RRHF (arXiv 2304.05302), fast: rank responses instead of running reinforcement learning.

    from rrhf_fast import RRHFTrainer, TrainConfig
    RRHFTrainer(model="Qwen/Qwen2.5-0.5B", args=TrainConfig(), train_dataset=rows).train()

    from rrhf_fast import rrhf_loss
    loss = rrhf_loss(logps, rewards, mask=mask).loss     # in your own loop

`train`, `sample`, `score`, `evaluate`, `iterate` and `export` are functions, of the folders of the
same names. What needs PyTorch is loaded on first use, so importing the package is quick.
"""

from importlib import import_module

from rrhf_fast.evaluate import EvaluateConfig, evaluate
from rrhf_fast.export import ExportConfig, export
from rrhf_fast.iterate import IterateConfig, iterate
from rrhf_fast.sample import Policy, SampleConfig, sample
from rrhf_fast.score import ScoreConfig, score
from rrhf_fast.train import TrainConfig, train

__version__ = "0.1.0"

_HOMES = {
    "RRHFTrainer": "rrhf_fast.train.trainer",
    "TrainResult": "rrhf_fast.train.trainer",
    "RRHFLoss": "rrhf_fast.losses",
    "linear_logprob": "rrhf_fast.losses",
    "linear_rrhf_loss": "rrhf_fast.losses",
    "rrhf_loss": "rrhf_fast.losses",
}
__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "IterateConfig",
    "Policy",
    "SampleConfig",
    "ScoreConfig",
    "TrainConfig",
    "evaluate",
    "export",
    "iterate",
    "sample",
    "score",
    "train",
    *_HOMES,
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
