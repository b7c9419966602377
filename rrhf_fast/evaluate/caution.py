"""What to be careful of in an evaluation, in sentences for its report and the terminal."""

from collections.abc import Mapping

from rrhf_fast.data.checks import one_line
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.evaluate.measures import Estimate

# Below so many prompts a report says that its intervals are wide.
_FEW = 50
# Options without which two evaluations compare no models: how samples are scored, and drawn.
_SCORED_BY = ("reward_fn", "reward_model_name_or_path", "judge_model", "reward_input")
_DRAWN_BY = ("num_samples", "max_new_tokens", "temperature", "top_p", "stop_strings")
_DRAWN_BY += ("max_prompt_length",)


def cautions(
    before: Mapping[str, Estimate], after: Mapping[str, Estimate], than: str, number: int
) -> list[str]:
    """`signs_of_harm` over this number of prompts, and a sentence if there are few."""
    harm = signs_of_harm(before, after, than) if number > 1 else []
    return harm + few_prompts(number)


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


def drawn_otherwise(baseline: str, options: Mapping, config: EvaluateConfig) -> list[str]:
    """A sentence if the samples of an earlier evaluation with these options were drawn in another
    way than this one's. Raises ValueError if they were scored in another way."""

    def others(names: tuple[str, ...]) -> list[str]:
        return [
            f"{name} {one_line(options[name])}, here {one_line(getattr(config, name))}"
            for name in names
            if name in options and options[name] != getattr(config, name)
        ]

    if found := others(_SCORED_BY):
        raise ValueError(f"baseline: {baseline} was scored otherwise ({'; '.join(found)})")
    if found := others(_DRAWN_BY):
        how = f"The baseline's samples were drawn otherwise ({'; '.join(found)})"
        return [f"warning: {how}: differences are not of the models alone."]
    return []


def _is_above(name: str, first: Mapping[str, Estimate], second: Mapping[str, Estimate]) -> bool:
    """Whether a measure of the second lies above that of the first, beyond both intervals."""
    return name in first and name in second and second[name].low > first[name].high
