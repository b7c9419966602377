"""Two ranks of which the second fails in its third step: python -m torch.distributed.run failing.py
FOLDER, the folder of cases.py."""

import os
import sys
from pathlib import Path

from rrhf_fast import TrainConfig
from rrhf_fast.command import leave
from rrhf_fast.engine import loop

RANK = int(os.environ["RANK"])


def main() -> int:
    folder, step = Path(sys.argv[1]), loop.take_step

    def failing(run, batch, optimizer, number, *rest):
        if RANK == 1 and number == 3:
            raise RuntimeError("rank 1 fails")
        return step(run, batch, optimizer, number, *rest)

    loop.take_step = failing
    data = {"train_data": str(folder / "train.jsonl"), "output_dir": str(folder / "failing")}
    loop.train(TrainConfig(model_name_or_path=str(folder / "untied"), train_batch_size=5, **data))
    print(f"rank {RANK} survived")
    return 0


if __name__ == "__main__":
    leave(main)
