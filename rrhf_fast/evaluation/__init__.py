"""How good a model is: rewards of fresh samples, with intervals, against a baseline."""
