"""The whole method in rounds: sample, score, train, evaluate."""

from rrhf_fast.iterate.config import IterateConfig

__all__ = ["IterateConfig", "iterate"]


def iterate(config: IterateConfig) -> list[dict]:
    """Run the rounds that are not done yet; returns each round's measures, round 0 first.

    Raises:
        ValueError: a mistake in options, files or rows.
        EndpointDown, NotFinite, OutOfMemory, SaveFailed: a stage failed; the same call goes on.
        KeyboardInterrupt, Preempted: Ctrl-C, or a signal, after which the round goes on half-way.
    """
    from rrhf_fast.iterate.run import run  # late: it loads PyTorch

    return run(config)
