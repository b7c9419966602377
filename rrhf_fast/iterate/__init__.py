"""The whole method in rounds: sample, score, train, evaluate."""

from rrhf_fast.iterate.config import IterateConfig

__all__ = ["IterateConfig", "iterate"]


def iterate(config: IterateConfig) -> list[dict]:
    """Run the rounds that are not done yet; returns the measures per round, round 0 first. Under
    torchrun every process calls this.

    Raises:
        ValueError: a mistake in options, files or rows.
        EndpointDown, NotFinite, OutOfMemory, SaveFailed: a stage failed; call again to resume.
        KeyboardInterrupt, Preempted: Ctrl-C or a signal; call again to resume within the round.
    """
    from rrhf_fast.iterate.run import run  # late: this loads PyTorch

    return run(config)
