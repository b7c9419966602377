"""Reward functions without a model: `--reward_fn experiments.rewards:sentiment`."""


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER sentiment of each response, -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]
