"""TRL's DPOTrainer on pairs given as tokens, with log-probs of the reference computed before."""

import torch
import trl
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from benchmarks.peer_scripts import hf
from benchmarks.peer_scripts.gate import Gate, main


class OfTokens(DPOTrainer):
    """Takes rows of tokens that have the reference's log-probs already."""

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset

    def _precompute_ref_logps(self, dataset, *_, **__):
        return dataset


def run(gate: Gate) -> None:
    """Compute the reference's log-probs, find the fastest batch, and train behind the gate."""
    model, tokenizer = hf.load(gate)
    rows = [
        {"prompt_ids": row["prompt"], "chosen_ids": chosen, "rejected_ids": rejected}
        for row in gate.job["rows"]
        for chosen, rejected in [row["responses"]]
    ]

    def trainer(batch: int) -> OfTokens:
        arguments = DPOConfig(
            **hf.options(gate, batch=batch, num_rows=len(rows)),
            beta=gate.job["beta"],
            max_length=None,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
        )
        data = Dataset.from_list(rows)
        return OfTokens(model, args=arguments, train_dataset=data, processing_class=tokenizer)

    first = trainer(1)
    before = torch.tensor(_reference(first, rows, 1)) + torch.tensor(gate.job["shifts"])
    for row, (chosen, rejected) in zip(rows, before.tolist(), strict=True):
        row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    batch, tried = hf.fastest(first, rows)
    _, seconds = gate.timed(_reference, first, rows, batch)
    gate.describe(version=trl.__version__, setting=tried, reference_seconds=seconds)
    hf.train(gate, trainer(batch))


def _reference(trainer: OfTokens, rows: list[dict], batch: int) -> list[list[float]]:
    """[chosen, rejected] log-probs of each row under the model as it is."""
    found = []
    for i in range(0, len(rows), batch):
        inputs = trainer._prepare_inputs(trainer.data_collator(rows[i : i + batch]))
        with torch.no_grad():
            found.append(torch.stack(trainer.compute_ref_log_probs(trainer.model, inputs), 1))
    return torch.cat(found).tolist()


if __name__ == "__main__":
    main(run)
