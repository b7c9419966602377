"""Two ranks that fail together, repeatedly, and then one that fails alone, in its third step:
python -m torch.distributed.run failing.py FOLDER, the folder of cases.py."""

import os
import sys
from pathlib import Path

from rrhf_fast import TrainConfig, train
from rrhf_fast.model.save import SaveFailed
from rrhf_fast.stages.command import leave
from rrhf_fast.train import trainer

RANK = int(os.environ["RANK"])


def reward(prompts: list, responses: list[str]) -> list[float]:
    """Works before the first step and fails after the last."""
    if hasattr(reward, "called"):
        raise IndexError("no reward")
    reward.called = True
    return [0.0] * len(prompts)


def fail_together(folder: Path) -> None:
    options = {
        "model_name_or_path": str(folder / "untied"), "train_batch_size": 5, "max_steps": 2,
        "train_data": str(folder / "train.jsonl"), "eval_data": str(folder / "eval.jsonl"),
        "eval_max_new_tokens": 4,
    }  # fmt: skip
    for name, option in {
        "reward": {"eval_reward_fn": "__main__:reward"},
        "checkpoint": {"save_steps": 1},
    }.items():
        try:
            train(TrainConfig(output_dir=str(folder / name), **options, **option))
        except (SaveFailed, ValueError) as error:
            print(f"rank {RANK} is told: {error}", flush=True)


def main() -> int:
    folder, step = Path(sys.argv[1]), trainer.take_step
    fail_together(folder)

    def failing(run, batch, optimizer, number, *rest):
        if RANK == 1 and number == 3:
            raise RuntimeError("rank 1 fails")
        return step(run, batch, optimizer, number, *rest)

    trainer.take_step = failing
    data = {"train_data": str(folder / "train.jsonl"), "output_dir": str(folder / "failing")}
    train(TrainConfig(model_name_or_path=str(folder / "untied"), train_batch_size=5, **data))
    print(f"rank {RANK} survived")
    return 0


if __name__ == "__main__":
    leave(main)
