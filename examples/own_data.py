"""A dataset with columns of its own, a callback, and metrics of your choice.

python examples/own_data.py [OUTPUT_DIR]
"""

import sys

import datasets
from transformers import TrainerCallback

from rrhf_fast import RRHFTrainer, TrainConfig, demo

DATASET = datasets.Dataset.from_list(
    [
        {
            "question": f"How do I clean a {thing}?",
            "answers": [
                {"text": f" Rub the {thing} with a soft cloth.", "stars": 5},
                {"text": " With sand.", "stars": 2},
                {"text": " No idea.", "stars": 1},
            ],
        }
        for thing in ("window", "lamp", "pan", "table", "mirror", "shelf", "boot", "clock")
    ]
)
# JMESPath expressions: field of a row -> where it is.
COLUMNS = {"prompt": "question", "responses": "answers[].text", "scores": "answers[].stars"}


class Printer(TrainerCallback):
    """Prints the ranking accuracy of each step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:  # not an evaluation
            print(f"step {state.global_step}: accuracy {logs['rewards/accuracies']:.2f}")


def main(output_dir: str) -> None:
    """Train the demo's model, holding out a quarter of the rows."""
    args = TrainConfig(
        output_dir=output_dir,
        columns=COLUMNS,
        eval_fraction=0.25,
        train_batch_size=3,
        num_train_epochs=3,
        learning_rate=1e-3,
    )
    trainer = RRHFTrainer(str(demo.MODEL_DIR), args, DATASET, callbacks=[Printer])
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/own_data")
