"""What a command loads, what it writes to stderr, and how its process ends. All in processes of
their own: this one has loaded everything."""

import builtins
import gc
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import rrhf_fast
from rrhf_fast.demo import EVAL_FILE, MODEL_DIR
from rrhf_fast.stages.loading import quick_imports
from rrhf_fast.train.__main__ import main as train

ROOT = Path(rrhf_fast.__file__).parents[1]
REWARD = ["--reward_fn", "rrhf_fast.demo.reward:score"]


def python(*words: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python without the interpreter of kernels that tests/conftest.py asks for."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


FIRST_STEP = """
import json, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from rrhf_fast.train.__main__ import main

loaded = []
register_optimizer_step_post_hook(lambda *_: loaded.append(set(sys.modules)))
code = main(["--max_steps", "1", "--output_dir", sys.argv[1]])
print(json.dumps([code, sorted(loaded[0]), sorted(sys.modules)]))
"""
# Of what the demo does not use. torch's own optimizers import torch._dynamo, and that DTensor, FSDP
# and a part of Inductor: none of these can be saved.
UNUSED = (
    "datasets",
    "flash_attn",
    "openai",
    "pandas",
    "peft",
    "rich",
    "scipy.optimize",
    "setuptools",
    "tensorboard",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "torch.utils.benchmark",
    "torch.utils.tensorboard",
    "torchao",
    "trackio",
    "wandb",
)


def test_training_loads_what_it_uses_when_it_uses_it(tmp_path):
    # The first run writes the tokens to the cache, for which pyarrow imports pandas.
    for output_dir in (tmp_path / "first", tmp_path / "second"):
        done = python("-c", FIRST_STEP, output_dir)
    code, at_first_step, at_the_end = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert not {*UNUSED, "matplotlib"} & set(at_first_step)
    assert not set(UNUSED) & set(at_the_end) and "matplotlib.figure" in at_the_end


@pytest.mark.slow
def test_commands_write_only_their_own_lines_to_stderr(tmp_path):
    out = {name: tmp_path / name for name in ("train", "sampled", "scored", "evaluated", "rounds")}
    data = ["--data", EVAL_FILE]
    model = ["--model_name_or_path", MODEL_DIR]
    commands = [
        ["train", "--max_steps", 1, "--save_steps", 1, "--output_dir", out["train"]],
        ["train", "--dry_run", "true"],
        ["env"],
        [
            "sample",
            *data,
            *model,
            "--policies",
            "[{max_new_tokens: 8}]",
            "--output",
            out["sampled"],
        ],
        ["score", "--data", out["sampled"], *REWARD, "--output", out["scored"]],
        ["evaluate", *data, *model, *REWARD, "--output_dir", out["evaluated"]],
        ["export", "--checkpoint", out["train"] / "checkpoint-1", "--output_dir", tmp_path / "x"],
        ["iterate", "--rounds", 1, "--steps_per_round", 1, "--output_dir", out["rounds"]],
    ]
    if find_spec("peft") is not None:
        commands += [
            ["train", "--use_peft", "--max_steps", 1, "--output_dir", tmp_path / "l"],
            ["export", "--checkpoint", tmp_path / "l", "--output_dir", tmp_path / "m", "--merge"],
        ]
    commands += [[name, "--help"] for name in ("train", "sample", "score", "evaluate", "export")]
    for name, *words in commands:
        done = python("-m", f"rrhf_fast.{name}", *words)
        assert (done.returncode, done.stderr) == (0, ""), (name, words)
    done = python("-m", "rrhf_fast.train", "--seeed", 1)
    expected = "rrhf_fast.train: error: seeed: no such option (did you mean seed?)\n"
    assert (done.returncode, done.stderr) == (2, expected)


LOADED_BY_TRANSFORMERS = """
import gc, sys
from rrhf_fast.stages.loading import quick_imports

with quick_imports():
    assert not gc.isenabled()
    from transformers import trainer_utils
    from transformers.loss import loss_for_object_detection
    from transformers.quantizers import quantizer_torchao
assert gc.isenabled()
assert not {"peft", "scipy.optimize", "torchao"} & set(sys.modules)
# All of it works when it is used.
assert not trainer_utils._is_peft_model(object())
import peft
assert trainer_utils._is_peft_model(object.__new__(peft.PeftModel))
assert not trainer_utils._is_peft_model(object())
rows, columns = loss_for_object_detection.linear_sum_assignment([[1, 0], [0, 1]])
assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])
tensors, metadata = quantizer_torchao.flatten_tensor_state_dict({})
assert tensors == {}
"""


def test_what_transformers_asks_for_is_imported_once_it_is_used():
    for module in ("peft", "scipy", "torchao"):
        pytest.importorskip(module)
    done = python("-c", LOADED_BY_TRANSFORMERS)
    assert done.returncode == 0, done.stderr


OTHERS = """
from types import FunctionType
from rrhf_fast.stages.loading import quick_imports

def ask(module, statement):
    names = {"__name__": module}
    exec(statement, names)
    return names

with quick_imports():
    found = ask("sklearn.x", "from scipy.optimize import linear_sum_assignment as f")
    assert type(found["f"]).__name__ != "_StandIn"
    found = ask("transformers.x", "from collections import deque, OrderedDict")
    assert type(found["deque"]) is type
    found = ask("transformers.x", "import scipy.optimize as o; from scipy.optimize import minimize")
    assert type(found["minimize"]) is FunctionType
    found = ask("transformers.x", "from scipy.optimize import linear_sum_assignment as f")
    assert type(found["f"]).__name__ != "_StandIn"  # it is loaded now
"""


def test_only_what_is_rare_and_only_in_transformers_is_put_off():
    pytest.importorskip("scipy")
    done = python("-c", OTHERS)
    assert done.returncode == 0, done.stderr


def test_imports_are_as_before_after_an_error():
    before = builtins.__import__
    with pytest.raises(ImportError), quick_imports():
        assert builtins.__import__ is not before
        raise ImportError
    assert builtins.__import__ is before and gc.isenabled()


def test_a_command_that_a_notebook_calls_returns_and_freezes_nothing(capsys):
    before = gc.get_freeze_count()
    assert train(["--show_tokens", "1"]) == 0
    assert gc.isenabled() and gc.get_freeze_count() == before


ENDING = """
import atexit, gc, sys, tempfile, threading, time
from rrhf_fast.stages.command import leave

class Log:
    # As a reward of the user's may have: in a cycle, and never closed.
    def __init__(self):
        self.file = open(sys.argv[2], "w")
        self.write = self.add

    def add(self, text):
        self.file.write(text)

log = Log()
log.write("kept")
folder = tempfile.TemporaryDirectory()
print(folder.name)

def tracker():
    print("tracker")

def late():
    time.sleep(0.3)
    print("thread")

def main():
    atexit.register(tracker)
    threading.Thread(target=late).start()
    print("x" * 100_000)  # more than a pipe holds
    ending = sys.argv[1]
    if ending == "raise":
        raise KeyError("why")
    if ending == "exit":
        raise SystemExit(3)
    return int(ending)

leave(main)
"""


@pytest.mark.parametrize(
    "ending, code", [("0", 0), ("2", 2), ("75", 75), ("exit", 3), ("raise", 1)]
)
def test_a_process_ends_with_its_code_after_all_that_waits_for_its_end(ending, code, tmp_path):
    done = python("-c", ENDING, ending, str(tmp_path / "log.txt"))
    folder, text, *last = done.stdout.splitlines()
    assert done.returncode == code and text == "x" * 100_000
    assert last == ["thread", "tracker"]
    assert (tmp_path / "log.txt").read_text() == "kept"
    assert not Path(folder).exists()
    assert ("KeyError: 'why'" in done.stderr) == (ending == "raise")
    assert done.stderr.startswith("Traceback") if ending == "raise" else not done.stderr


FIGURE = """
import logging, sys
from pathlib import Path
from rrhf_fast.train.plot import plot_training

logging.getLogger("matplotlib").setLevel(logging.WARNING)
plot_training([{"step": 1, "loss": 1.0, "rank_loss": 1.0}], Path(sys.argv[1]))
assert logging.getLogger("matplotlib").level == logging.WARNING
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""


def test_a_figure_is_drawn_in_silence_where_matplotlib_may_keep_no_files(tmp_path):
    done = python("-c", FIGURE, tmp_path / "training.png", MPLCONFIGDIR="/dev/null/matplotlib")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
