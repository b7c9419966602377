"""Cards: what they say of a model or rows, and what they must not say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard, constants
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast import TrainConfig, demo, train
from rrhf_fast.export import ExportConfig, export
from rrhf_fast.sample.__main__ import main as sample
from rrhf_fast.score.__main__ import main as score
from rrhf_fast.stages.cards import ModelCard as Card
from rrhf_fast.stages.cards import described, is_ours, shown_options, write_card
from rrhf_fast.stages.dataset_card import push_rows
from rrhf_fast.stages.hub import Repository, public_names
from rrhf_fast.stages.secrets import keep_secret
from rrhf_fast.train.card import _data
from tests.hub_server import TOKEN
from tests.stages.test_hub import hub  # noqa: F401


def blocks(text):
    """The YAML blocks of a card after its metadata, parsed as Markdown would find them."""
    found, fence, lines = [], None, []
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if fence is None and mark.startswith("```") and mark.endswith("yaml"):
            fence, lines = mark.removesuffix("yaml"), []
        elif fence is not None and mark == fence:
            found.append(yaml.safe_load("".join(lines)))
            fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None
    return found


def rows(path, count=12):
    lines = demo.TRAIN_FILE.read_text().splitlines(keepends=True)[:count]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def options(tmp_path):
    return TrainConfig(
        model_name_or_path=str(demo.MODEL_DIR),
        train_data=str(rows(tmp_path / "rows.jsonl")),
        eval_fraction=0.2,
        max_steps=2,
        train_batch_size=4,
        output_dir=str(tmp_path / "out"),
        margin=0.5,
        save_steps=2,
    )


def test_the_card_of_a_run(options, tmp_path):
    result = train(options)
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert card.data.pipeline_tag == "text-generation" and "rrhf" in card.data.tags
    loss, changed = blocks(text)
    assert loss["margin"] == 0.5 and loss["pair_loss"] == "hinge"
    assert changed["max_steps"] == 2 and changed["eval_fraction"] == 0.2
    assert "margin" not in changed and "seed" not in changed
    assert not {"train_data", "output_dir", "model_name_or_path"} & set(changed)
    assert "rows to train on with" in text and "rows held out" in text
    before, after = (side["rewards/accuracies"] for side in (result.before, result.after))
    assert f"| held-out ranking accuracy | {before:.3f} | {after:.3f} |" in text
    assert "](training.png)" in text and "2304.05302" in text and "Training took 2 steps" in text
    assert str(tmp_path) not in text and str(demo.MODEL_DIR) not in text


def test_the_card_of_an_export(hub, options, tmp_path):  # noqa: F811
    train(options)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    exported = export(ExportConfig(checkpoint, str(tmp_path / "plain")))
    assert not (exported / "README.md").exists()
    exported = export(ExportConfig(checkpoint, str(tmp_path / "e"), push_to_hub=True))
    text = (exported / "README.md").read_text()
    assert hub.files["models/me/e"]["README.md"] == text.encode()
    assert "Training had taken 2 steps" in text and "training.png" not in text
    assert blocks(text)[0]["margin"] == 0.5
    assert str(tmp_path) not in text and str(demo.MODEL_DIR) not in text


def test_the_same_run_writes_the_same_card(options, tmp_path):
    train(options)
    first = (tmp_path / "out" / "README.md").read_bytes()
    options.output_dir = str(tmp_path / "again")
    train(options)
    assert (tmp_path / "again" / "README.md").read_bytes() == first


def test_adapters_of_a_model_of_the_hub(options, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    options.use_peft = True
    train(options)
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "peft" and "LoRA adapters" in text
    assert "More Information Needed" not in text and str(demo.MODEL_DIR) not in text

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--base").mkdir()
    card = Card(base="org/base", kind="llama", has_adapters=True, name="me/tuned")
    data = ModelCard(card.text(has_curves=False)).data
    assert data.base_model == "org/base"


@pytest.mark.parametrize("kind", ["a file", "a link", "a link to nowhere", "a folder"])
def test_what_a_person_wrote_stays(kind, options, tmp_path):
    folder, mine = tmp_path / "out", tmp_path / "mine.md"
    folder.mkdir()
    path = folder / "README.md"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a file":
        path.write_text("# Mine")
    else:
        path.symlink_to(mine)
        if kind == "a link":
            mine.write_text("# Mine")
    train(options)
    assert (folder / "model.safetensors").exists()
    if kind == "a folder":
        assert list(path.iterdir()) == []
    elif kind == "a link to nowhere":
        assert path.is_symlink() and not mine.exists()
    else:
        assert path.read_text() == "# Mine"


def test_whose_a_card_is(tmp_path):
    path = tmp_path / "README.md"
    assert is_ours(path)
    card = Card(base=None, kind="llama", has_adapters=False)
    for text, ours in [(card.text(has_curves=True), True), ("# Mine", False), ("", False)]:
        path.write_text(text)
        assert is_ours(path) == ours
        write_card(tmp_path, card)
        assert path.read_text() == (card.text(has_curves=False) if ours else text)


@given(st.dictionaries(st.text(min_size=1), st.text() | st.lists(st.text()) | st.floats(0, 1)))
def test_options_of_any_text_read_back(values):
    card = Card(base=None, kind="llama", has_adapters=False, options=values)
    text = card.text(has_curves=False)
    assert ModelCard(text).data.library_name == "transformers"
    assert blocks(text) == ([values] if values else [])
    assert "\x1b" not in text


def test_paths_and_secrets_are_left_out(tmp_path, monkeypatch):
    keep_secret(TOKEN)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    options = {
        "chat_template_kwargs": {"file": "/home/me/x", "key": f"see {TOKEN}"},
        "stop_strings": ["~/x", "./y", "../z", "a/b", "openai:~/x", "C:\\\\x", "c/d"],
        "lora_target_modules": "all",
        "run_name": TOKEN,
        "hub_model_id": "x",
    }
    defaults = vars(TrainConfig())
    shown = shown_options({**defaults, **options}, defaults)
    assert set(shown) == {"chat_template_kwargs", "stop_strings", "lora_target_modules"}
    assert shown["stop_strings"] == ["(a path)"] * 4 + ["openai:(a path)", "(a path)", "c/d"]
    card = Card(base=None, kind="llama", has_adapters=False, options=shown)
    text = card.text(has_curves=False)
    assert TOKEN not in text and "/home/me" not in text and "[key]" in text


def test_rows_are_pushed_with_a_card(hub, tmp_path, capsys):  # noqa: F811
    data, sampled, scored = rows(tmp_path / "d.jsonl"), tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    words = ["--push_to_hub", "--hub_private_repo", "--hub_dataset_id"]
    policies = "[{method: provided}, {method: greedy, max_new_tokens: 3}]"
    words_of_sample = ["--data", str(data), "--output", str(sampled), "--policies", policies]
    words_of_sample += ["--model_name_or_path", str(demo.MODEL_DIR)]
    assert sample([*words_of_sample, *words, "sampled"]) == 0
    reward = ["--reward_fn", "rrhf_fast.demo.reward:score"]
    words_of_score = ["--data", str(sampled), "--output", str(scored), *reward]
    assert score([*words_of_score, *words, "me/scored"]) == 0
    assert hub.private == {"datasets/me/sampled": True, "datasets/me/scored": True}
    assert f"pushed to {hub.url}/datasets/me/scored" in capsys.readouterr().out
    for name, output in (("sampled", sampled), ("scored", scored)):
        files = hub.files[f"datasets/me/{name}"]
        assert set(files) == {".gitattributes", "README.md", "rows.jsonl"}
        assert files["rows.jsonl"] == output.read_bytes()
        text = files["README.md"].decode()
        assert "12 rows with" in text and "responses from `greedy`" in text
        assert DatasetCard(text).data.configs[0]["data_files"][0]["path"] == "rows.jsonl"
        assert str(tmp_path) not in text and str(demo.MODEL_DIR) not in text and TOKEN not in text
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        loaded = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded["responses"][0] == json.loads(output.read_text().splitlines()[0])["responses"]
    assert "scores from" in text and "reward_fn: rrhf_fast.demo.reward:score" in text
    assert "| `scores` | list of number |" in text


def test_a_failed_push_of_rows_names_the_command(hub, tmp_path, capsys):  # noqa: F811
    data, output = rows(tmp_path / "d.jsonl"), tmp_path / "s.jsonl"
    hub.broken["/commit/"] = 500
    words = ["--data", str(data), "--output", str(output), "--policies", "[{method: provided}]"]
    assert sample([*words, "--push_to_hub"]) == 2
    assert "hub_dataset_id: missing" in capsys.readouterr().err
    assert sample([*words, "--push_to_hub", "--hub_dataset_id", "d"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and TOKEN not in error
    start = "hf upload me/d --repo-type=dataset"
    commands = f"{start} {output} rows.jsonl && {start} {output}.card.md README.md"
    assert error.endswith(f"push it by: {commands}\n")
    assert len(output.read_text().splitlines()) == 12


def test_rows_are_pushed_without_what_is_private(hub, tmp_path):  # noqa: F811
    output = tmp_path / "s.jsonl"
    row = {"prompt": "p", "responses": ["a"], "sources": ["openai:/home/alice/model"]}
    row["failures"] = [{"source": "x", "error": "http://llm.corp.internal answered 500"}]
    output.write_text(json.dumps(row) + "\n")
    before = output.read_bytes()
    push_rows(Repository("d", None, "dataset").check(), str(output), "Rows", {})
    files = hub.files["datasets/me/d"]
    pushed = json.loads(files["rows.jsonl"])
    assert pushed == {"prompt": "p", "responses": ["a"], "sources": ["openai:(a path)"]}
    assert output.read_bytes() == before
    text = files["README.md"].decode()
    assert "1 row with 1 response\n" in text and "1 response from `openai:(a path)`" in text
    assert "alice" not in text and "corp" not in text and "failures" not in text


@pytest.mark.parametrize("kind", ["a link to nowhere", "a folder", "a person's"])
def test_an_odd_card_loses_no_push_of_rows(kind, hub, tmp_path):  # noqa: F811
    output = rows(tmp_path / "s.jsonl")
    card = tmp_path / "s.jsonl.card.md"
    if kind == "a folder":
        card.mkdir()
    elif kind == "a person's":
        card.write_text("# Mine, corrected")
    else:
        card.symlink_to(tmp_path / "nowhere")
    hub.create("datasets/me/d", **{"README.md": b"# Mine, first"})
    push_rows(Repository("d", None, "dataset").check(), str(output), "Rows", {})
    files = hub.files["datasets/me/d"]
    assert files["rows.jsonl"] == output.read_bytes()
    expected = b"# Mine, corrected" if kind == "a person's" else b"# Mine, first"
    assert files["README.md"] == expected


def test_only_what_is_public_is_named(hub, tmp_path, options, monkeypatch):  # noqa: F811
    for name in ("open", "secret"):
        hub.create(f"datasets/org/{name}")
    hub.create("models/org/secret")
    hub.create("models/org/base")
    hub.private |= {"datasets/org/secret": True, "models/org/secret": True}
    assert public_names(["org/open", "org/secret", "org/none", None], "dataset") == ["org/open"]
    assert public_names(["org/secret", "org/base", "org/open", str(tmp_path)]) == ["org/base"]
    options.train_data = ["org/open:train", "org/secret", "/home/me/rows.jsonl"]
    counts = SimpleNamespace(index={"num_responses": np.array([2])})
    run = SimpleNamespace(
        train=SimpleNamespace(queries=counts),
        held_out=None,
        nameable={("dataset", "org/open"), ("model", "org/secret")},
    )
    lines = _data(run, options.train_data)
    assert lines == ["1 row to train on with 2 responses, 2 each",
                     "from org/open and rows that are not public"]  # fmt: skip
    assert _data(run, ["org/secret"])[-1] == "from local rows"
    assert _data(run, ["org/open"])[-1] == "from org/open"


def test_odd_kinds_of_models():
    config = SimpleNamespace(model_type="llama`\n\n# Verified\n<img src=x>")
    lm = SimpleNamespace(config=config, parameters=lambda: [torch.zeros(6)])
    assert described(lm) == "llama? ? Verified ?img src?x?, 6 parameters"
