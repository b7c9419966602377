"""Measure a model by fresh samples of held-out prompts."""

from typing import TYPE_CHECKING

from rrhf_fast.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from rrhf_fast.evaluate.run import Evaluation

__all__ = ["EvaluateConfig", "evaluate"]


def evaluate(config: EvaluateConfig) -> "Evaluation":
    """Sample, score and measure; writes samples.jsonl, scored.jsonl, by_prompt.json and
    evaluation.json to `output_dir`. A repeated call resumes. Under torchrun every process calls
    this.

    Raises:
        ValueError: a mistake in options, files or rows.
        EndpointDown: the judge stopped answering; call again to resume.
    """
    from rrhf_fast.evaluate.run import run  # late: this loads PyTorch

    return run(config)
