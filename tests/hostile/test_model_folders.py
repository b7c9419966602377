"""A model folder from anywhere: it serves, or is refused in one line; its code never runs."""

import builtins
import contextlib
import importlib
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.data import chat
from rrhf_fast.model.decoder import load_model, load_tokenizer
from rrhf_fast.model.pretrained import check_forward
from rrhf_fast.model.sharded import empty_model
from tests.hostile import zoo

ROWS = [
    {"prompt": "Why?", "responses": ["So.", "No."], "scores": [1, 0]},
    {
        "prompt": [{"role": "user", "content": "Why?"}],
        "responses": ["So.", "No."],
        "scores": [1, 0],
    },
]
COMMANDS = ("dry run", "train", "sample", "score", "reward model", "export")
FOLDERS = zoo.folders()
# Every command meets each of these; the other folders meet one command each.
IMPORTANT = (
    "config.json nested",
    "config.json vocab_size 10",
    "config.json hidden_size 1000000000",
    "config.json num_hidden_layers 1000000000000",
    "generation_config.json list",
    "index ..",
    "pickles",
    "tokenizer beyond the embedding",
    "weights of NaN",
    "weights missing one",
    "weights truncated",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model, a reward model, a checkpoint and rows."""
    root = tmp_path_factory.mktemp("good")
    shutil.copytree(demo.MODEL_DIR, root / "model")
    zoo.edit(root / "model/tokenizer_config.json", chat_template=zoo.CHAT)
    shutil.copytree(root / "model", root / "reward")
    reward = AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=1)
    reward.save_pretrained(root / "reward")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train(
        TrainConfig(
            model_name_or_path=str(root / "model"), train_data=str(rows), train_batch_size=2,
            max_steps=1, save_steps=1, output_dir=str(root / "run"),
        )
    )  # fmt: skip
    shutil.copytree(root / "run/checkpoint-1", root / "checkpoint")
    return root


def arguments(command, folder, rows, out):
    """The command's module and arguments, for a model folder, a reward model or a checkpoint."""
    data, model = ("--data", rows, "--output", out), ("--model_name_or_path", folder)
    policies = "[{method: sample, num_responses: 2, max_new_tokens: 4},"
    policies += " {method: diverse_beam, num_responses: 2, max_new_tokens: 4}]"
    few = ("--max_steps", "1", "--train_batch_size", "2")
    few += ("--learning_rate", "1e-6")  # these are chat models: no warning of a high rate
    return {
        "dry run": ("train", *model, "--train_data", rows, "--dry_run", "true"),
        "train": ("train", *model, "--train_data", rows, "--output_dir", out, *few),
        "sample": ("sample", *model, *data, "--policies", policies),
        "score": ("score", *model, *data, "--policy_as_reward", "true"),
        "reward model": ("score", "--reward_model_name_or_path", folder, *data),
        "export": ("export", "--checkpoint", folder, "--output_dir", out),
    }[command]


def source(command):
    return {"reward model": "reward", "export": "checkpoint"}.get(command, "model")


def run(words, capsys):
    """Run a command, which must end in a minute; returns its exit code and lines on stderr."""

    def stop(*_):
        raise AssertionError("it hangs")

    module, *words = map(str, words)
    main = importlib.import_module(f"rrhf_fast.{module}.__main__").main
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        capsys.readouterr()
        code = main(words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    text = capsys.readouterr().err.replace("\r", "\n")
    bars = ("it/s]", "?it/s", "0it [", "%|", "prompt/s", "row/s")  # of progress
    return code, [
        line for line in text.splitlines() if line.strip() and not any(bar in line for bar in bars)
    ]


def check(name, command, good, tmp_path, capsys):
    folder, out = tmp_path / "folder", tmp_path / "out"
    zoo.make(FOLDERS[name], good / source(command), folder)
    code, lines = run(arguments(command, folder, good / "rows.jsonl", out), capsys)
    if code == 2 or "out of memory" in "".join(lines):
        assert len(lines) == 1 and ": error: " in lines[0] and len(lines[0]) < 700, lines
        assert not out.exists()
    else:
        assert code == 0 and len(lines) <= 1, lines
    return code, lines


def cases():
    turns = [command for command in COMMANDS if command != "train"]  # it is slow
    for number, name in enumerate(FOLDERS):
        if name in IMPORTANT or "index" in name:
            continue
        command = turns[number % len(turns)]
        if "weights" in name and command in ("dry run", "export"):  # they read none
            command = "sample"
        yield pytest.param(name, command, id=f"{ascii(name)[1:-1]}-{command}")


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(chat.RENDERING, "_seconds", 1)
    monkeypatch.setattr(chat.RENDERING, "_size", 2**29)


@pytest.mark.parametrize(("name", "command"), list(cases()))
def test_a_folder_serves_or_is_refused_in_one_line(name, command, good, tmp_path, capsys):
    check(name, command, good, tmp_path, capsys)


@pytest.mark.parametrize("command", ["train", "sample", "score", "reward model"])
@pytest.mark.parametrize("name", IMPORTANT)
def test_important_ones_are_refused_by_all_commands(name, command, good, tmp_path, capsys):
    code, (line,) = check(name, command, good, tmp_path, capsys)
    assert code == 2
    assert str(tmp_path / "folder") in line, line


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("index")])
def test_an_index_names_files_of_its_folder(name, good, tmp_path, capsys):
    code, lines = check(name, "sample", good, tmp_path, capsys)
    assert (code == 0) == (name == "index through a link"), lines  # as the hub's cache has them
    if name in ("index ..", "index absolute"):
        assert "expected a safetensors file inside the folder" in lines[0]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train", "model_name_or_path"),
        ("sample", "model_name_or_path"),
        ("score", "model_name_or_path"),
        ("reward model", "reward_model_name_or_path"),
    ],
)
@pytest.mark.parametrize("beyond", ["end token", "text", "only padding"])
def test_tokens_beyond_the_embedding(beyond, command, option, good, tmp_path, capsys):
    folder = tmp_path / "model"
    change = {
        "end token": lambda f: zoo.edit(f / "tokenizer_config.json", eos_token="<new>"),
        "text": FOLDERS["tokenizer beyond the embedding"],
        "only padding": lambda f: zoo.edit(f / "tokenizer_config.json", pad_token="<new>"),
    }[beyond]
    zoo.make(change, good / source(command), folder)
    code, lines = run(arguments(command, folder, good / "rows.jsonl", tmp_path / "out"), capsys)
    if beyond == "only padding":  # which nothing reads
        assert (code, lines) == (0, [])
        return
    problem = "its tokenizer makes token 576, but the model knows only 576"
    assert code == 2 and f"error: {option}: {folder}: {problem}" in lines[-1]


@pytest.mark.parametrize("what", ["head", "body"])
def test_a_reward_model_with_missing_weights(what, good, tmp_path, capsys):
    name = "score.weight" if what == "head" else zoo.LAYER
    folder = zoo.make(
        zoo.weights(lambda tensors: tensors.pop(name) is None), good / "reward", tmp_path / "r"
    )
    words = arguments("reward model", folder, good / "rows.jsonl", tmp_path / "out")
    code, lines = run(words, capsys)
    assert code == 2 and "not a reward model: 1 weights are missing" in lines[-1]
    assert name in lines[-1]


CODE = "from pathlib import Path\nPath({!r}).touch()\nclass A: pass\n"


def with_code(kind):
    """Let a folder ask for its file evil.py."""

    def change(folder):
        code = CODE.format(str(folder.parent / "ran"))
        (folder / "evil.py").write_text(code)
        autos = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        classes = dict.fromkeys(autos, "evil.A")
        entries = {
            "unknown type": {"auto_map": classes, "model_type": "evil"},
            "no type": {"auto_map": classes, "model_type": None},
            "type of no causal model": {"auto_map": classes, "model_type": "clip"},
            "known type": {"auto_map": classes},
            "other repository": {
                "auto_map": {name: f"{folder}--evil.A" for name in autos},
                "model_type": "evil",
            },
        }
        if kind in entries:
            zoo.edit(folder / "config.json", **entries[kind])
        elif kind == "tokenizer":
            zoo.edit(
                folder / "tokenizer_config.json",
                auto_map={"AutoTokenizer": ["evil.A", "evil.A"]},
                tokenizer_class="Evil",
            )
        elif kind == "generation":
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate/generate.py").write_text(code + "def generate(*a): pass\n")
            zoo.edit(folder / "generation_config.json", custom_generate=str(folder))

    return change


@pytest.fixture
def asked(monkeypatch):
    """Answer every question by yes; the list of those asked."""
    questions = []

    def answer(question=""):
        questions.append(question)
        return "yes"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    return questions


KINDS = (
    "unknown type", "no type", "type of no causal model", "known type", "other repository",
    "tokenizer", "generation",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_folder_is_not_run_nor_asked_for(kind, command, good, tmp_path, capsys, asked):
    folder = zoo.make(with_code(kind), good / source(command), tmp_path / "folder")
    words = arguments(command, folder, good / "rows.jsonl", tmp_path / "out")
    code, lines = run(words, capsys)
    assert not (tmp_path / "ran").exists() and not asked
    if kind in ("known type", "generation"):  # transformers has its own code for these
        assert (code, lines) == (0, [])
    elif kind in ("unknown type", "no type", "other repository"):
        assert code == 2 and len(lines) == 1
        assert "set --trust_remote_code true if you trust its author" in lines[0]
    else:
        assert code in (0, 2) and len(lines) <= 1


@pytest.mark.parametrize("kind", ["unknown type", "type of no causal model", "tokenizer"])
@pytest.mark.parametrize("merge", ["false", "true"])
def test_code_of_the_model_that_a_checkpoint_names(kind, merge, good, tmp_path, capsys, asked):
    base = shutil.copytree(good / "model", tmp_path / "base")
    words = arguments("train", base, good / "rows.jsonl", tmp_path / "out")
    assert run([*words, "--use_peft", "true", "--save_steps", "1"], capsys)[0] == 0
    with_code(kind)(base)
    for checkpoint in ("out", "out/checkpoint-1"):
        words = ["export", "--checkpoint", tmp_path / checkpoint, "--merge", merge]
        code, lines = run([*words, "--output_dir", tmp_path / "exported"], capsys)
        is_needed = kind != "tokenizer" and (checkpoint != "out" or merge == "true")
        assert code == (2 if is_needed or (checkpoint == "out" and merge == "false") else 0)
        assert len(lines) <= 1 and (code == 0 or "error: " in lines[0])
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)
    assert not (tmp_path / "ran").exists() and not asked


def test_code_is_run_where_it_is_trusted(good, tmp_path):
    folder = zoo.make(with_code("unknown type"), good / "model", tmp_path / "folder")
    with pytest.raises(ValueError, match="^model_name_or_path"):  # the code defines no config
        load_model(str(folder), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation"])
def test_a_folder_does_not_choose_how_to_compute(entry, good, tmp_path):
    """transformers downloads and runs kernels of the hub by such names."""
    folder = shutil.copytree(good / "model", tmp_path / "folder")
    zoo.edit(folder / "config.json", **{entry: "kernels-community/flash-attn2"})
    assert load_model(str(folder)).config._attn_implementation in ("sdpa", "eager")


def test_weights_that_overflow_are_noticed(good, tmp_path):
    change = FOLDERS["weights that overflow"]
    lm = load_model(str(zoo.make(change, good / "model", tmp_path / "folder")))
    with pytest.raises(ValueError, match="its logits are NaN, although its weights are finite"):
        check_forward(lm)


@pytest.mark.parametrize("template", [zoo.ENDLESS, zoo.DOUBLING, "{{ 'a' * 10**11 }}"])
def test_a_template_without_end(template, good, tmp_path, capsys):
    folder = shutil.copytree(good / "reward", tmp_path / "folder")
    zoo.edit(folder / "tokenizer_config.json", chat_template=template)
    words = arguments("reward model", folder, good / "rows.jsonl", tmp_path / "out")
    code, lines = run([*words, "--on_bad_rows", "skip"], capsys)  # not a matter of single rows
    assert code == 2 and "the chat template takes more than" in lines[-1]
    model = shutil.copytree(good / "model", tmp_path / "model")
    zoo.edit(model / "tokenizer_config.json", chat_template=template)
    words = arguments("score", model, good / "rows.jsonl", tmp_path / "out")
    code, lines = run([*words, "--on_bad_rows", "skip"], capsys)
    assert code == 2 and f"the chat template of {model} takes more than" in lines[-1]


def test_limits_end_with_the_template(good):
    import resource

    tokenizer = load_tokenizer(str(good / "model"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert "Why?" in chat.render(tokenizer, ROWS[1]["prompt"])
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert torch.zeros(2**28).sum() == 0


def test_the_zoo_is_large():
    assert len(FOLDERS) > 250 and set(IMPORTANT) <= set(FOLDERS)
    assert Path(demo.MODEL_DIR).exists()


def test_nobody_is_asked_where_trust_is_left_open(good, tmp_path, asked):
    folder = zoo.make(with_code("unknown type"), good / "model", tmp_path / "folder")
    for load in (load_model, load_tokenizer, empty_model):
        with contextlib.suppress(ValueError):
            load(str(folder), trust_remote_code=None)
    assert not (tmp_path / "ran").exists() and not asked
