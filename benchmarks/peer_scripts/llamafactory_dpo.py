"""LLaMA-Factory's DPO trainer on pairs given as tokens. It keeps the reference as a second model
and runs it in every step: of the options there is none that computes its log-probs before."""

import importlib
import sys
from importlib.metadata import version
from types import ModuleType

import torch
from datasets import Dataset
from transformers import TrainingArguments

from benchmarks.peer_scripts import hf
from benchmarks.peer_scripts.gate import Gate, main

try:
    importlib.import_module("torchaudio")
except (ImportError, OSError):  # there may be none for this torch; text needs nothing of it
    sys.modules["torchaudio"] = ModuleType("torchaudio")

from llamafactory.data import PairwiseDataCollatorWithPadding
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import FinetuningArguments
from llamafactory.train.dpo.trainer import CustomDPOTrainer

IGNORED = -100


def run(gate: Gate) -> None:
    """Find the fastest batch, and train behind the gate."""
    model, tokenizer = hf.load(gate)
    reference, _ = hf.load(gate)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [_features(row) for row in gate.job["rows"]]

    def trainer(batch: int) -> CustomDPOTrainer:
        arguments = TrainingArguments(**hf.options(gate, batch=batch, num_rows=len(rows)))
        collator = PairwiseDataCollatorWithPadding(
            template=TEMPLATES["default"],
            tokenizer=tokenizer,
            model=model,
            pad_to_multiple_of=8,
            label_pad_token_id=IGNORED,
        )
        made = CustomDPOTrainer(
            model=model,
            ref_model=reference,
            args=arguments,
            finetuning_args=FinetuningArguments(
                stage="dpo",
                finetuning_type="full",
                pref_beta=gate.job["beta"],
                disable_shuffling=True,
            ),
            data_collator=collator,
            train_dataset=Dataset.from_list(rows),
            tokenizer=tokenizer,
            processor=None,
        )
        _shift(gate, made)
        return made

    batch, tried = hf.fastest(trainer(1), rows)
    gate.describe(version=version("llamafactory"), setting=tried)
    hf.train(gate, trainer(batch))


def _features(row: dict) -> dict:
    made: dict = {"images": None, "videos": None, "audios": None}
    for side, response in zip(("chosen", "rejected"), row["responses"], strict=True):
        made[f"{side}_input_ids"] = row["prompt"] + response
        made[f"{side}_attention_mask"] = [1] * len(made[f"{side}_input_ids"])
        made[f"{side}_labels"] = [IGNORED] * len(row["prompt"]) + response
    return made


def _shift(gate: Gate, trainer: CustomDPOTrainer) -> None:
    """Let the reference's log-probs be those of the job, and time them apart."""
    compute = trainer.compute_reference_log_probs
    shifts = {
        tuple(row["prompt"] + row["responses"][0]): shifts
        for row, shifts in zip(gate.job["rows"], gate.job["shifts"], strict=True)
    }

    def shifted(model, batch):
        chosen, rejected = gate.apart("reference_seconds", compute, model, batch)
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        half = [tuple(ids[mask.bool()].tolist()) for ids, mask in rows][: len(chosen)]
        by_row = torch.tensor([shifts[ids] for ids in half]).to(chosen)
        return chosen + by_row[:, 0], rejected + by_row[:, 1]

    trainer.compute_reference_log_probs = shifted


if __name__ == "__main__":
    main(run)
