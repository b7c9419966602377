"""A run that is killed repeatedly, and one that is not: python killed.py FOLDER SEED KILLS

Children are forked from this process, which has imported everything, so they start in a fraction of
a second.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import rrhf_fast.train.trainer  # noqa: F401 (before the forks)
from rrhf_fast import demo
from rrhf_fast.train.__main__ import main

OPTIONS = {
    "model_name_or_path": demo.MODEL_DIR, "train_batch_size": 4, "max_steps": 24,
    "learning_rate": 1e-3, "save_steps": 1, "save_total_limit": 2, "eval_steps": 6,
    "eval_reward_fn": "rrhf_fast.demo.reward:score", "eval_max_new_tokens": 8,
    "resume_from_checkpoint": "latest",
}  # fmt: skip


def start(folder: Path, output_dir: Path) -> int:
    """Fork a child that trains; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    data = {"train_data": folder / "train.jsonl", "eval_data": folder / "eval.jsonl"}
    arguments = []
    for name, value in (OPTIONS | data | {"output_dir": output_dir}).items():
        arguments += [f"--{name}", str(value)]
    os._exit(main(arguments))


def ended(pid: int, *, wait: bool = False) -> bool:
    """Whether the child is done. Asserts that it did not fail."""
    ended_pid, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    assert not ended_pid or os.waitstatus_to_exitcode(status) == 0, status
    return bool(ended_pid)


def is_saving(output_dir: Path) -> bool:
    """Whether a checkpoint is incomplete."""
    return any(not (path / "checksums.json").exists() for path in output_dir.glob("checkpoint-*"))


def kill_once(folder: Path, rng: random.Random, *, while_saving: bool) -> bool:
    """Start or resume the run and kill it; False if it ended before."""
    output_dir = folder / "killed"
    pid = start(folder, output_dir)
    give_up = time.monotonic() + (60 if while_saving else rng.uniform(0.3, 3))
    while time.monotonic() < give_up:
        if ended(pid):
            return False
        if while_saving and is_saving(output_dir):
            time.sleep(rng.uniform(0, 0.01))
            break
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def run(folder: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    for source, count in ((demo.TRAIN_FILE, 40), (demo.EVAL_FILE, 4)):
        lines = source.read_text().splitlines(keepends=True)[:count]
        (folder / source.name).write_text("".join(lines))
    assert ended(start(folder, folder / "unharmed"), wait=True)
    rng, chain, in_saves = random.Random(seed), 0, 0
    while kills:
        while_saving = kills % 2 == 0
        if kill_once(folder, rng, while_saving=while_saving):
            kills -= 1
            in_saves += is_saving(folder / "killed")
        else:  # check each run that reached its end, and begin a new one
            (folder / "killed").rename(folder / f"chain-{chain}")
            chain += 1
    if not (folder / "killed").exists() or not ended(start(folder, folder / "killed"), wait=True):
        raise AssertionError("the last resume did not end")
    (folder / "killed").rename(folder / f"chain-{chain}")
    for path in folder.glob("*/checkpoint-*"):
        shutil.rmtree(path)
    print(f"{in_saves} of the kills left a checkpoint half-written")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
