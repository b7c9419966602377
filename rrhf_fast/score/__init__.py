"""Score responses by a reward model, a function, a judge or the policy itself."""

from collections import Counter

from rrhf_fast.score.config import ScoreConfig

__all__ = ["ScoreConfig", "score"]


def score(config: ScoreConfig) -> Counter:
    """Add scores to rows; writes `config.output`.

    A row keeps its fields and gains `scores`; with kl_coef also `rewards` (the scores before the
    penalty) and `log_ratios`; from a judge `criteria`. Responses that could not be scored move to
    `unscored`, each with its source and the reason, so that every response left has a score. A
    killed run resumes when repeated. Under torchrun every process calls this.

    Returns:
        Counts: rows, scored, unscored, unrankable (rows with fewer than 2 scored responses), a
        judge's requests, prompt_tokens and completion_tokens, skipped (bad rows) and
        bad_responses, these two also by kind, as "skipped: wrong type".

    Raises:
        ValueError: a mistake in options, files or rows, or a reward function that failed.
        EndpointDown: the judge stopped answering; call again to resume.
        HubFailed: with push_to_hub; the hub cannot be reached, or does not take the rows.
    """
    from rrhf_fast.score.run import run  # late: this loads PyTorch

    return run(config)
