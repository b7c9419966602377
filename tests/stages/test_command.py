"""What all commands share: files of options, lists, launchers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rrhf_fast
from rrhf_fast.evaluate.__main__ import main as evaluate
from rrhf_fast.export.__main__ import main as export
from rrhf_fast.iterate.__main__ import main as iterate
from rrhf_fast.sample.__main__ import main as sample
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.train.__main__ import main as train

MODEL = str(Path(rrhf_fast.__file__).parent / "demo" / "model")

FILES = {
    "empty": ("", "o.yaml: expected lines of `option: value`, found nothing"),
    "a list": ("- seed", "o.yaml: expected lines of `option: value`, found ['seed']"),
    "broken": ("data: [1\nb", "o.yaml:"),
    "misspelt": ("sed: 1", "o.yaml: sed: no such option (did you mean seed?)"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_options_is_named_with_what_is_wrong(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, problem = FILES[name]
    (tmp_path / "o.yaml").write_text(text)
    assert sample(["--config", "o.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rrhf_fast.sample: error: config: {problem}")
    assert error.count("\n") == 1 and ("not YAML" in error) == (name == "broken")


def test_a_list_is_suggested_where_one_belongs(capsys):
    assert train(["--report_to", "tensorboard"]) == 2
    problem = "report_to: expected a list, [tensorboard], found 'tensorboard'"
    assert capsys.readouterr().err == f"rrhf_fast.train: error: {problem}\n"


@pytest.mark.parametrize("command", [train, sample, score, evaluate, iterate, export])
def test_help_stands_alone(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as done:
        command(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    _, *options = text.partition("\noptions:\n")[2].split("\n  --")
    for option in options:
        name, _, explanation = option.partition("  " if "  " in option.splitlines()[0] else "\n")
        assert len(explanation.split()) > 3, name
    # Types in words, no files that only the repository has, nothing broken at a hyphen.
    for word in (
        "Annotated",
        "Literal",
        "typing",
        "<class",
        "type:",
        "null]",
        ".md",
        "rrhf-\n",
        "lora_dropout",
    ):
        assert word not in text, word
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_command_of_one_process_refuses_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert export([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "one process, but WORLD_SIZE is 2" in error


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    """What a device raises, raised where the model samples."""

    def generate(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr("transformers.GenerationMixin.generate", generate)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    files = ["--data", "prompts.jsonl", "--output", "out.jsonl"]
    assert sample([*files, "--model_name_or_path", MODEL]) == 1
    problem = "CUDA out of memory: lower --batch_size"
    assert capsys.readouterr().err.splitlines()[-1] == f"rrhf_fast.sample: error: {problem}"


LEAVES = """
import atexit, os
from rrhf_fast.stages.command import leave
from rrhf_fast.stages.launcher import launched
atexit.register(lambda: print("waits for the others", flush=True))
def main():
    launched()
    {ending}
leave(main)
"""


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize(("ending", "code"), [("return 3", 3), ("raise KeyError", 1)])
def test_a_task_of_srun_that_ends_does_not_wait_for_the_others(tasks, ending, code):
    step = {
        "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
    }  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    script = [sys.executable, "-c", LEAVES.format(ending=ending)]
    done = subprocess.run(script, env=env | step, capture_output=True, text=True)
    assert done.returncode == code
    assert ("waits for the others" in done.stdout) == (tasks == 1)
