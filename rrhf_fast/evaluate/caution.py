"""What to be careful of in an evaluation, in sentences for its report and the terminal."""

from collections.abc import Mapping

from rrhf_fast.evaluate.measures import Estimate

# Below so many prompts a report says that its intervals are wide.
_FEW = 50


def signs_of_harm(
    before: Mapping[str, Estimate], after: Mapping[str, Estimate], than: str
) -> list[str]:
    """One line for each sign of harm, beyond the intervals, between two sets of measures; `than`:
    the words for the first, such as "in round 0"."""
    found = []
    if _is_above("perplexity", before, after):
        if _is_above("reward", before, after):
            found.append(
                f"warning: reward and perplexity are both higher than {than}, beyond their "
                "intervals, a sign of reward hacking. Read the samples; kl_coef keeps the model "
                "closer to its reference."
            )
        else:
            found.append(
                f"warning: perplexity is higher than {than}, beyond the intervals, and the reward "
                "is not: the model leaves its reference for nothing. Read the samples; a lower "
                "learning rate or kl_coef keeps it closer."
            )
    if _is_above("distinct", after, before):
        found.append(
            f"warning: fewer of a prompt's samples are distinct than {than}, beyond the "
            "intervals: the model's answers collapse. Read the samples; fewer steps, a lower "
            "learning rate or kl_coef keep more of them."
        )
    return found


def few_prompts(number: int) -> list[str]:
    """A sentence if there are few."""
    if number == 1:
        return ["One prompt has no intervals: they are over prompts."]
    if number >= _FEW:
        return []
    return [
        f"There are only {number} prompts, so that the intervals are wide, and a difference within "
        "them may be chance."
    ]


def _is_above(name: str, first: Mapping[str, Estimate], second: Mapping[str, Estimate]) -> bool:
    """Whether a measure of the second lies above that of the first, beyond both intervals."""
    return name in first and name in second and second[name].low > first[name].high
