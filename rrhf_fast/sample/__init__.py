"""Add responses to rows: from models, from an endpoint, or those that the rows hold."""

from collections import Counter

from rrhf_fast.sample.config import Policy, SampleConfig

__all__ = ["Policy", "SampleConfig", "sample"]


def sample(config: SampleConfig) -> Counter:
    """Add responses to rows; writes `config.output`.

    A row keeps its fields and gains `responses`, `sources` and `finish_reasons` ("stop", "length"
    or null), `as_generated` where messages were answered as tokens (by local models, or with
    send_tokens), and `failures` where an endpoint gave no text. A killed run resumes when repeated.
    Under torchrun every process calls this.

    Returns:
        Counts: rows, responses, of these those "cut off at the limit", duplicates, empty,
        unfinished, failures, unrankable (rows with fewer than 2 responses), an endpoint's requests,
        prompt_tokens and completion_tokens, unanswered (prompts that a local model cannot read,
        such as too long ones), skipped (bad rows) and bad_responses, these two also by kind, as
        "skipped: wrong type".

    Raises:
        ValueError: a mistake in options, files or rows.
        EndpointDown: an endpoint stopped answering; call again to resume.
        HubFailed: with push_to_hub; the hub cannot be reached, or does not take the rows.
    """
    from rrhf_fast.sample.run import run  # late: this loads PyTorch

    return run(config)
