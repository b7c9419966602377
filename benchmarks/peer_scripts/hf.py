"""The loop of transformers.Trainer behind the gate, for every peer built on it."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from benchmarks.peer_scripts.gate import NO_CLIPPING, Gate

SHORT = 4.0  # seconds of passes up to which a size is tried again
# Tokens of a batch up to which sizes are tried: logits of all of them may need this many times the
# vocabulary, a few times over.
LARGEST = {"cpu": 4096, "cuda": 65_536}


def load(gate: Gate) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The job's model with float32 weights, and its tokenizer."""
    path = gate.job["model"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(gate.job["device"]), AutoTokenizer.from_pretrained(path)


def options(gate: Gate, *, batch: int, num_rows: int) -> dict:
    """Arguments of all trainers: a step of all rows, in batches of `batch` in their order; a rate
    of 0, so that every step computes the same; nothing else inside the loop."""
    job = gate.job
    return {
        "output_dir": str(Path(job["gradient"]).parent / "out"),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": num_rows // batch,
        "max_steps": 1_000_000,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": NO_CLIPPING,
        "bf16": job["dtype"] == "bfloat16",
        "use_cpu": job["device"] == "cpu",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def sizes(num_rows: int, largest: int = 8) -> list[int]:
    """Sizes of batches without a smaller last one, which the mean over batches would favour."""
    return [size for size in range(1, largest + 1) if num_rows % size == 0]


def fastest(trainer: Trainer, rows: Sequence[dict]) -> tuple[int, str]:
    """The size of a batch at which the gradient of all rows is fastest, and a sentence on all that
    were tried. The first batch of each size is run once before."""
    seconds: dict[int, float] = {}
    for batch in sizes(len(rows)):
        parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        inputs = [trainer.data_collator(part) for part in parts]
        tokens = max(one["input_ids"].numel() for one in inputs)
        if seconds and tokens > LARGEST[trainer.model.device.type]:
            break
        trainer.current_gradient_accumulation_steps = len(inputs)
        _seconds(trainer, inputs[:1])
        times: list[float] = []
        while not times or (len(times) < 3 and sum(times) < SHORT):
            times.append(_seconds(trainer, inputs))
        seconds[batch] = min(times)
    best = min(seconds, key=seconds.__getitem__)
    tried = ", ".join(f"{size}: {took:.2f} s" for size, took in seconds.items())
    return best, f"{best} at a time (gradients of all by that number: {tried})"


def _seconds(trainer: Trainer, inputs: Sequence[dict]) -> float:
    start = time.perf_counter()
    for one in inputs:
        trainer.training_step(trainer.model, dict(one))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    trainer.model.zero_grad()
    return taken


def train(gate: Gate, trainer: Trainer) -> None:
    """Run the trainer's own loop, one step for each "go", until the parent ends it."""
    compute_loss, clip = trainer.compute_loss, trainer.accelerator.clip_grad_norm_

    def counted(model, inputs, *arguments, **more):
        tokens = inputs["input_ids"].numel()
        loss = compute_loss(model, inputs, *arguments, **more)
        gate.count(loss.detach() / trainer.args.gradient_accumulation_steps, tokens)
        return loss

    def clipped(*arguments, **more):
        gate.gradients(trainer.model.named_parameters())
        return clip(*arguments, **more)

    trainer.compute_loss, trainer.accelerator.clip_grad_norm_ = counted, clipped
    trainer.add_callback(_Steps(gate))
    trainer.train()


class _Steps(TrainerCallback):
    def __init__(self, gate: Gate):
        self.gate = gate

    def on_step_begin(self, *_, **__) -> None:
        self.gate.wait()

    def on_step_end(self, *_, **__) -> None:
        self.gate.end()
