"""The training loop: prepare, step, evaluate, record. Imports model and data."""
