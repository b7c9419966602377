"""A save that is cut off leaves no model that loads, and the same command finishes it."""

import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from rrhf_fast import RRHFTrainer, TrainConfig, demo
from rrhf_fast.model.save import SaveFailed, write_model
from rrhf_fast.model.sharded import named_tensors
from tests.hostile.processes import CONTEXT, Run, die_at, head

MARKERS = ("config.json", "adapter_config.json")
TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@functools.cache
def parts():
    """A model and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=600, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    lm, tokenizer = LlamaForCausalLM(config), AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.chat_template = TEMPLATES
    return lm, tokenizer


def save(folder):
    lm, tokenizer = parts()
    write_model(lm, tokenizer, folder, dtype=torch.float32, weights=named_tensors(lm))


def earlier(folder, marker):
    """A model of other files."""
    folder.mkdir()
    for name in (marker, "model-00001-of-00001.safetensors",
                 "model.safetensors.index.json", "added_tokens.json", "notes.txt"):  # fmt: skip
        (folder / name).write_text('{"of": "the earlier"}')


def contents(folder):
    """Every file but the run's lock, times and marks of a save that was cut off."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: data for name, data in names.items() if not name.startswith((".saving", ".lock"))}


def forked(function, *arguments):
    """The exit status of a fork that calls the function."""
    pid = os.fork()
    if not pid:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def killed_save(folder, number):
    die_at(number, "/.saving")
    save(folder)


def kill_everywhere(parent, existing):
    """Kill a save before each change that it makes, keep what that left, and save again."""
    torch.set_num_threads(1)
    parts()
    for number in itertools.count(1):
        folder = parent / f"{number}"
        if existing:
            earlier(folder, existing)
        status = forked(killed_save, folder, number)
        if folder.exists():
            shutil.copytree(folder, parent / f"{number}-killed", symlinks=True)
        if status != 9:  # SIGKILL
            os._exit(status)
        if forked(save, folder):
            os._exit(2)


@pytest.mark.parametrize("existing", [None, "config.json"])
def test_a_save_killed_anywhere_is_whole_or_no_model(existing, tmp_path):
    driver = CONTEXT.Process(target=kill_everywhere, args=(tmp_path, existing))
    driver.start()
    driver.join(300)
    assert driver.exitcode == 0
    killed = sorted(tmp_path.glob("*-killed"), key=lambda path: int(path.name.split("-")[0]))
    whole = contents(killed.pop())  # this one was not
    assert len(killed) > 12 and "model.safetensors" in whole
    if existing:
        earlier(tmp_path / "before", existing)
        before = contents(tmp_path / "before")
        assert whole.pop("notes.txt") == before["notes.txt"]
    seen = set()
    for folder in killed:
        found = contents(folder)
        if existing and found == before:
            seen.add("before")
        elif {*MARKERS} & found.keys():
            seen.add("after")
            assert found == whole | {k: v for k, v in found.items() if k == "notes.txt"}
        else:
            seen.add("between")
            assert (folder / ".saving").is_dir() or not found
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(folder)
        finished = tmp_path / folder.name.split("-")[0]
        again = contents(finished)
        assert again.pop("notes.txt", None) == (before["notes.txt"] if existing else None)
        assert again == whole and not (finished / ".saving").exists()
    assert seen >= {"between", "after"} and ("before" in seen) == bool(existing)


@pytest.fixture(scope="module")
def train_arguments(tmp_path_factory):
    rows = head(tmp_path_factory.mktemp("rows"), 4) / "train.jsonl"
    return {"model_name_or_path": str(demo.MODEL_DIR), "train_data": str(rows), "max_steps": 1,
            "train_batch_size": 4}  # fmt: skip


def as_arguments(options):
    return [text for name in options for text in (f"--{name}", options[name])]


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, train_arguments):
    # In a process as those that are killed: in this one, rows are skipped in small models, too.
    run = Run(
        tmp_path_factory.mktemp("unharmed"),
        "train",
        *as_arguments(train_arguments | {"save_steps": 1}),
    )
    assert run.end()[0] == 0
    return run.out


def comparable(folder):
    """Without what depends on the machine's speed."""
    kept = {name: data for name, data in contents(folder).items() if name != "training.png"}
    assert kept.pop("metrics.jsonl", None) is None or (folder / "training.png").is_file()
    return {name: data for name, data in kept.items() if not name.startswith("checkpoint-")}


# Before the save, in the middle of its moves, and before the lock and the last sign of it go.
@pytest.mark.parametrize("save_steps", [None, 1], ids=["afresh", "from a checkpoint"])
@pytest.mark.parametrize("number", [1, 26, 34, 35])
def test_training_killed_in_its_save_resumes(
    number, save_steps, tmp_path, train_arguments, unharmed
):
    command = ("train", *as_arguments(train_arguments))
    if save_steps:
        command += ("--save_steps", "1")
    killed = Run(tmp_path, *command, dies=(number, "/.saving"))
    assert killed.end()[0] == -9 and (killed.out / ".lock").exists() == (number < 35)
    assert number == 1 or (killed.out / ".saving").exists()
    code, (line,) = Run(tmp_path, *command).end()
    assert code == 2 and "; to finish that run, set --resume_from_checkpoint latest)" in line
    code, last = Run(tmp_path, *command, "--resume_from_checkpoint", "latest").end()
    assert code == 0, last
    assert comparable(killed.out) == comparable(unharmed) and not list(killed.out.glob(".*"))


@pytest.mark.parametrize("number", [1, 6, 26, 34, 35])
def test_an_export_killed_in_its_save_is_repeated(number, tmp_path, unharmed):
    command = ("export", "--checkpoint", unharmed / "checkpoint-1")
    killed = Run(tmp_path, *command, dies=(number, "/.saving"))
    assert killed.end()[0] == -9
    code, last = Run(tmp_path, *command).end()
    assert code == 0, last
    model = comparable(unharmed)
    assert model.pop("README.md")  # the card, of runs
    assert comparable(killed.out) == model and not list(killed.out.glob(".*"))
    code, (line,) = Run(tmp_path, *command).end()
    assert code == 2 and "already holds a model" in line


@pytest.mark.parametrize("kind", ["link to a folder", "dangling link", "file", "links inside"])
def test_the_way_of_a_save_leads_nowhere_else(kind, tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    out.mkdir()
    (victim / "config.json").write_text("precious")
    (victim / "folder").mkdir()
    staging = out / ".saving"
    if kind == "file":
        staging.write_text("")
    elif kind == "links inside":
        staging.mkdir()
        (staging / "config.json").symlink_to(victim / "config.json")
        (staging / "model.safetensors").symlink_to(victim / "new")
        (staging / "folder").symlink_to(victim / "folder")
    else:
        staging.symlink_to(victim if kind == "link to a folder" else tmp_path / "nowhere")
    save(out)
    assert sorted(path.name for path in victim.iterdir()) == ["config.json", "folder"]
    assert (victim / "config.json").read_text() == "precious"
    assert not os.path.lexists(staging) and not (tmp_path / "nowhere").exists()
    assert AutoConfig.from_pretrained(out).vocab_size == 600


def test_a_full_disk_leaves_the_earlier_model(tmp_path, train_arguments, monkeypatch):
    out = tmp_path / "out"
    trainer = RRHFTrainer(args=TrainConfig(output_dir=str(out), **train_arguments))
    trainer.train()
    before = contents(out)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveFailed, match="No space left on device"):
        trainer.save_model()
    assert contents(out) == before and not list(out.glob(".*"))
    assert json.loads(before["config.json"]) and Path(trainer.model.name_or_path).exists()
