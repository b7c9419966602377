"""The whole method in rounds: sample, score, train, evaluate, and again with the new model."""
