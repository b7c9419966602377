"""The released trainer of RRHF at its own weight: transformers.Trainer, one query per batch, whole
rows, logits of all their tokens, and its copies of them."""

import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from benchmarks.baselines import released_loss_of, released_rows
from benchmarks.peer_scripts import hf
from benchmarks.peer_scripts.gate import Gate, main


class Released(Trainer):
    """The loss of a query, from the logits of its rows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels, rewards = inputs.pop("labels"), inputs.pop("rewards")
        return released_loss_of(model(**inputs).logits, labels, rewards)


def run(gate: Gate) -> None:
    """Train behind the gate."""
    model, tokenizer = hf.load(gate)
    rows = gate.job["rows"]
    trainer = Released(
        model=model,
        args=TrainingArguments(
            **hf.options(gate, batch=1, num_rows=len(rows)), train_sampling_strategy="sequential"
        ),
        data_collator=lambda queries: _tensors(queries[0]),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.model_accepts_loss_kwargs = False  # a step's loss is the mean over its batches
    gate.describe(version=transformers.__version__, setting="one query at a time, as it must")
    hf.train(gate, trainer)


def _tensors(row: dict) -> dict[str, torch.Tensor]:
    ids, mask, labels = released_rows(row["prompt"], row["responses"])
    rewards = torch.tensor(row["rewards"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "rewards": rewards}


if __name__ == "__main__":
    main(run)
