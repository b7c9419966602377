"""A causal language model is trained by RRHF."""

from typing import TYPE_CHECKING

from rrhf_fast.train.config import TrainConfig

if TYPE_CHECKING:
    from rrhf_fast.train.result import TrainResult

__all__ = ["TrainConfig", "train"]


def train(config: TrainConfig) -> "TrainResult":
    """Train a causal language model by RRHF and save it.

    Writes to `output_dir`: the model (safetensors), tokenizer and card (README.md), metrics.jsonl,
    training.png, samples.jsonl when `eval_reward_fn` is set, and checkpoints; with `push_to_hub`
    the model is then pushed to the hub. Ctrl-C ends the run early and still
    saves the model; SIGTERM and SIGUSR1 end it after the step at hand with a checkpoint. Under
    torchrun every process calls this. With `dry_run` it prints an estimate of memory and time
    instead, with `show_tokens` rows in tokens.

    Raises:
        ValueError: a mistake in options, files or rows, found before anything is trained; or an
            `eval_reward_fn` that misbehaves later, when the model of the steps so far is saved.
        NotFinite: the loss or gradient is not finite; the weights of the last good step are saved.
        OutOfMemory: a pack does not fit the device.
        SaveFailed: a checkpoint or the model cannot be written; earlier ones are whole.
        HubFailed: the hub cannot be reached before the run, or does not take the saved model.

    Example:
        >>> result = train(TrainConfig(max_steps=2, output_dir=folder))  # the embedded demo
        model ...
        >>> result.steps
        2
    """
    from rrhf_fast.train.trainer import run  # late: it loads PyTorch

    return run(config)
