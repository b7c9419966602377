"""Rows get responses: from models, from an endpoint, or those that they hold."""

from collections import Counter

from rrhf_fast.sample.config import Policy, SampleConfig

__all__ = ["Policy", "SampleConfig", "sample"]


def sample(config: SampleConfig) -> Counter:
    """Add responses to rows; writes `config.output`.

    A row keeps its fields and gains `responses`, `sources` and `finish_reasons` ("stop", "length"
    or null), `as_generated` where local models answered messages, and `failures` where an endpoint
    gave no text. A run that was killed goes on where it was.

    Returns:
        What happened: rows, responses, duplicates, empty, unfinished, failures, unrankable
        (rows with fewer than 2 responses), an endpoint's requests, prompt_tokens and
        completion_tokens, and what was bad: skipped (rows) and bad_responses.

    Raises:
        ValueError: a mistake in options, files or rows.
        EndpointDown: an endpoint stopped answering; the same call goes on.
    """
    from rrhf_fast.sample.run import run  # late: it loads PyTorch

    return run(config)
