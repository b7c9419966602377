"""FSDP2 over NCCL on one GPU equals the run without torchrun, with and without offload, resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def metrics(folder, options, *, torchrun):
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    command += ["-m", "rrhf_fast.train", "--output_dir", str(folder)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cpu_offload", ["false", "true"])
def test_one_rank_is_the_run_without_ranks(tmp_path, dtype, cpu_offload):
    options = {"dtype": dtype, "max_steps": 4, "save_steps": 2, "adam_epsilon": 1e-3}
    alone = metrics(tmp_path / "alone", options, torchrun=False)
    sharded = {"cpu_offload": cpu_offload} | options
    ranks = metrics(tmp_path / "ranks", sharded, torchrun=True)
    checkpoint = {"resume_from_checkpoint": tmp_path / "ranks/checkpoint-2"}
    resumed = metrics(tmp_path / "resumed", sharded | checkpoint, torchrun=True)
    rel = 1e-3 if dtype == "float32" else 3e-2
    for one, other in zip(alone, ranks, strict=True):
        for key in {"loss", "grad_norm", "eval/loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=rel), key
    after = [record for record in ranks if record["step"] > 2]
    for one, other in zip(after, resumed, strict=True):
        for key in {"loss", "grad_norm", "eval/loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=rel), key
