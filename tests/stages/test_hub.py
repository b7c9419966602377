"""Pushing to a stand-in for the hub (tests/hub_server.py), on loopback, with huggingface_hub."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http
from transformers import TrainerCallback

from rrhf_fast import TrainConfig, demo
from rrhf_fast.export.__main__ import main as export
from rrhf_fast.stages.hub import HubConfig, HubFailed, Repository, hub_name, refuse_local_base
from rrhf_fast.train.__main__ import main as train
from rrhf_fast.train.checkpoint import changed_options
from rrhf_fast.train.trainer import RRHFTrainer
from tests.hub_server import READ_ONLY, TOKEN, Hub

SHORT = ["--max_steps", "1", "--train_batch_size", "2", "--eval_fraction", "0.01"]
SHORT += ["--model_name_or_path", str(demo.MODEL_DIR), "--train_data", str(demo.TRAIN_FILE)]
PUSH = ["--push_to_hub", "--hub_model_id", "my-model"]


@pytest.fixture
def hub(monkeypatch):
    """A running hub that huggingface_hub takes for the real one, and a token for it."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Retries wait seconds.
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    yield hub
    hub.close()


@pytest.fixture
def saved(tmp_path):
    """A folder as a run leaves it, with files that are nobody else's business; and the names of
    those that the run wrote."""
    folder = tmp_path / "out"
    names = ["config.json", "model.safetensors", "tokenizer.json", "README.md", "training.png"]
    names += ["metrics.jsonl", "additional_chat_templates/tools.jinja"]
    kept = ["samples.jsonl", "checkpoint-3/config.json", ".lock", ".saving/config.json"]
    kept += ["credentials.json", "notes.txt", "train.py", "requirements.txt", "mine.safetensors"]
    kept += [".env", "profile/trace.json", "notes [1].md", "events.out.tfevents.1"]
    for name in [*names, *kept]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    (folder / "README.md").write_text("---\n---\n<!-- Written by rrhf_fast, which replaces this "
                                      "file; without this line it stays. -->\n# New")  # fmt: skip
    return folder, set(names)


def one_line(error: str) -> str:
    assert error.count("\n") == 1, error
    assert TOKEN not in error and "\x1b" not in error
    return error


def test_a_model_is_pushed(hub, saved, capsys):
    folder, names = saved
    repository = Repository("my-model", private=True).check()
    assert repository.name == "me/my-model" and not hub.files
    repository.create()
    assert hub.private == {"models/me/my-model": True}
    repository.push(folder, [*names, "gone.json"])
    assert set(hub.files["models/me/my-model"]) == names | {".gitattributes"}
    for name in names:
        assert hub.files["models/me/my-model"][name] == (folder / name).read_bytes()
    out = f"will push to me/my-model (private)\npushed to {hub.url}/me/my-model\n"
    assert capsys.readouterr().out == out
    repository.push(folder, names)  # again, over what is there


def test_the_command_that_repeats_a_push_sends_the_same(hub, saved):
    folder, names = saved
    hub.create("models/me/my-model", **{"adapter_config.json": b"old", "LICENSE": b"kept"})
    for number in range(1, 100):
        names.add(f"model-{number:05}-of-00099.safetensors")
        (folder / f"model-{number:05}-of-00099.safetensors").write_text("part")
    (folder / "mine [1].txt").write_text("mine")
    line = Repository("me/my-model", private=True).command(folder, names)
    assert "--private" in line
    assert len(line) < 800 + len(str(folder))
    words = shlex.split(line)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    command = [Path(sys.executable).with_name("hf"), *words[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(hub.files["models/me/my-model"]) == names | {"LICENSE"}


def test_a_card_that_someone_wrote_stays(hub, saved, capsys):
    folder, names = saved
    hub.create("models/me/my-model", **{"README.md": b"# Mine"})
    hub.broken["commit"] = 500
    with pytest.raises(HubFailed) as error:
        Repository("me/my-model").push(folder, names)
    assert "--include=config.json" in str(error.value) and "README" not in str(error.value)
    hub.broken.clear()
    Repository("me/my-model").push(folder, names)
    assert hub.files["models/me/my-model"]["README.md"] == b"# Mine"
    assert set(hub.files["models/me/my-model"]) == names
    assert "note: README.md of me/my-model" in capsys.readouterr().out
    hub.files["models/me/my-model"]["README.md"] = (folder / "README.md").read_bytes() + b"# Old"
    Repository("me/my-model").push(folder, names)
    assert hub.files["models/me/my-model"]["README.md"] == (folder / "README.md").read_bytes()


def test_a_card_that_a_person_wrote_here_replaces_that_on_the_hub(hub, saved):
    folder, names = saved
    for text, pushed in [("---\nlicense: mit\n---\n# Mine", True), ("# My project", False)]:
        hub.create("models/me/my-model", **{"README.md": b"# Mine, first"})
        (folder / "README.md").write_text(text)
        Repository("me/my-model").push(folder, names)
        expected = text if pushed else "# Mine, first"
        assert hub.files["models/me/my-model"]["README.md"].decode() == expected


@pytest.mark.parametrize("before", ["adapters", "parts", "one file"])
def test_what_would_load_as_another_model_is_removed_there(before, hub, tmp_path):
    files = {
        "adapters": ["adapter_config.json", "adapter_model.safetensors"],
        "parts": [*(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), "config.json",
                  "model.safetensors.index.json", "generation_config.json"],
        "one file": ["config.json", "model.safetensors", "chat_template.jinja"],
    }  # fmt: skip
    others = {"LICENSE", "mine.json", "sub/config.json", "sub/model.safetensors"}
    for after in files:
        hub.create("models/me/m", **dict.fromkeys([*files[before], *others], b"old"))
        folder = tmp_path / after
        folder.mkdir()
        for name in files[after]:
            (folder / name).write_text("new")
        Repository("me/m").push(folder, files[after])
        assert set(hub.files["models/me/m"]) == {*files[after], *others}


def test_whose_files_are_pushed(hub, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    mine = ["credentials.json", "notes.txt", "train.py", "requirements.txt", "vocab.json"]
    for name in [*mine, "README.md"]:
        (folder / name).write_text("mine")
    (folder / "link.json").symlink_to(tmp_path)
    assert train([*SHORT, *PUSH, "--output_dir", str(folder)]) == 0
    files = hub.files["models/me/my-model"]
    assert {"config.json", "model.safetensors", "metrics.jsonl", "training.png"} <= set(files)
    assert not {*mine, "README.md", "link.json"} & set(files)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_public_is_not_taken_for_private(kind, hub, saved):
    hub.create(f"{kind}s/me/my-model")
    with pytest.raises(ValueError, match="^hub_private_repo: me/my-model is on the hub, and publ"):
        Repository("my-model", True, kind).check()
    with pytest.raises(HubFailed, match="hub_private_repo"):  # made public during the run
        Repository("me/my-model", True, kind).push(*saved)
    assert hub.files[f"{kind}s/me/my-model"] == {}
    hub.private[f"{kind}s/me/my-model"] = True
    Repository("my-model", True, kind).check()


def test_a_default_name_is_nobody_elses(hub, saved, capsys):
    folder, names = saved
    default = Repository("out", is_named=False)
    for files in ({"README.md": b"# My 70B"}, {"model.safetensors": b"theirs"}):
        hub.create("models/me/out", **files)
        with pytest.raises(ValueError, match="^hub_model_id: missing .me/out is on the hub alr"):
            default.check()
        assert hub.files["models/me/out"] == files
        assert Repository("out").check().name == "me/out"
    for files in ({".gitattributes": b""}, {"README.md": (folder / "README.md").read_bytes()}):
        hub.create("models/me/out", **files)
        capsys.readouterr()
        default.check().push(folder, names)
        assert capsys.readouterr().out.startswith("will push to me/out (public)\n")


MISTAKES = {
    "offline": ("HF_HUB_OFFLINE is set", None),
    "no token": ("no token (set HF_TOKEN, or log in by: hf auth login)", None),
    "a wrong token": ("the hub refuses the token", "hf_wrongwrongwrong"),
    "a token to read": ("the token may not write to me/my-model", READ_ONLY),
    "a token to read what exists": ("the token may not write to me/my-model", READ_ONLY),
    "400": ("the hub answers 400 for me/my-model", TOKEN),
    "404": ("the hub answers 404 for me/my-model", TOKEN),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_found_before_the_run(case, hub, monkeypatch, tmp_path, capsys):
    problem, token = MISTAKES[case]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", case == "offline")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    if case.endswith("exists"):
        hub.create("models/me/my-model")
    if case.isdigit():
        hub.broken["create"] = int(case)
    folder = tmp_path / "out"
    assert train([*SHORT, *PUSH, "--output_dir", str(folder)]) == 2
    error = one_line(capsys.readouterr().err)
    assert error.startswith(f"rrhf_fast.train: error: push_to_hub: {problem}")
    assert (token or TOKEN) not in error
    assert not folder.exists() or not any(path.is_file() and path.stat().st_size
                                          for path in folder.glob("[!.]*"))  # fmt: skip


@pytest.mark.parametrize("problem", [200, 500, 429, "hang up", "down"])
def test_a_hub_that_is_down_is_found_before_the_run(problem, hub, tmp_path, capsys):
    if problem == "down":
        hub.close()
    else:
        hub.broken["whoami"] = problem
    assert train([*SHORT, *PUSH, "--output_dir", str(tmp_path / "out")]) == 1
    error = one_line(capsys.readouterr().err)
    assert error.startswith("rrhf_fast.train: error: push_to_hub: the hub ")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("part", ["whoami", "create", "auth-check", "resolve", "validate-yaml",
                                  "preupload", "batch", "/lfs/", "commit"])  # fmt: skip
@pytest.mark.parametrize("problem", [401, 403, 409, 500, "hang up"])
def test_a_failed_push_names_the_folder_and_the_command(part, problem, hub, saved):
    folder, names = saved
    if part == "create" and problem in (401, 403, 409):
        pytest.skip("a repository that is there need not be created")
    hub.create("models/me/my-model")
    hub.broken[part] = problem
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if part == "whoami":  # not asked again
        return Repository("me/my-model").push(folder, names)
    with pytest.raises(HubFailed, match="^push_to_hub: ") as error:
        Repository("me/my-model").push(folder, names)
    text = str(error.value)
    assert f"the model is saved; push it by: hf upload me/my-model {folder} ." in text
    assert TOKEN not in text and "\x1b" not in text and "\n" not in text
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.broken.clear()
    Repository("me/my-model").push(folder, names)
    assert names <= set(hub.files["models/me/my-model"])


def test_train_and_export_push(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "out"
    words = [*SHORT, "--save_steps", "1", "--output_dir", str(folder)]
    assert train([*words, *PUSH]) == 0
    files = hub.files["models/me/my-model"]
    assert {"config.json", "model.safetensors", "README.md", "training.png"} <= set(files)
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed to {hub.url}/me/my-model"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert 'from_pretrained("me/my-model")' in card.text
    local = (str(tmp_path).encode(), TOKEN.encode(), str(demo.MODEL_DIR).encode())
    assert not any(text in data for text in local for data in files.values())

    words = ["--checkpoint", str(folder / "checkpoint-1"), "--output_dir", str(tmp_path / "e")]
    assert export([*words, "--push_to_hub", "--hub_private_repo"]) == 0
    files = hub.files["models/me/e"]  # the name of output_dir
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)
    assert hub.private["models/me/e"] and "checkpoint-1/config.json" not in files
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_a_push_that_fails_after_the_run_keeps_the_model(hub, tmp_path, capsys):
    hub.broken["/commit/"] = 500
    folder = tmp_path / "out"
    assert train([*SHORT, *PUSH, "--output_dir", str(folder)]) == 1
    out, error = capsys.readouterr()
    assert "done after 1 steps; model and metrics are in" in out
    last = error.splitlines()[-1]
    assert "push_to_hub: the hub answers 500 for me/my-model" in last and TOKEN not in error
    assert f"hf upload me/my-model {folder} ." in last
    assert (folder / "model.safetensors").exists() and (folder / "README.md").exists()


def test_a_run_killed_while_it_pushes_has_its_model(hub, tmp_path):
    script = (
        "import sys\n"
        "from huggingface_hub import constants\n"
        "from rrhf_fast.train.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    started = []
    hub.broken["/lfs/"] = lambda: started[0].kill()
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    folder = tmp_path / "out"
    command = [sys.executable, "-c", script, *SHORT, *PUSH, "--output_dir", str(folder)]
    started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    assert started[0].wait() == -9
    hub.broken.clear()
    Repository("me/my-model").push(folder, ["config.json", "model.safetensors"])
    assert {"model.safetensors", "README.md"} <= set(hub.files["models/me/my-model"])


@pytest.mark.parametrize("what", ["rows", "model", "rewards"])
def test_a_mistake_in_rows_or_model_makes_no_repository(what, hub, tmp_path, capsys):
    words = {"rows": "none.jsonl", "model": "model_name_or_path", "rewards": "eval_reward_fn"}
    option = words[what] if what != "rows" else "train_data"
    wrong = [f"--{option}", str(tmp_path / "none.jsonl")]
    assert train([*SHORT, *PUSH, *wrong, "--output_dir", str(tmp_path / "out")]) == 2
    assert words[what] in one_line(capsys.readouterr().err) and not hub.files


def test_adapters_of_a_local_base_are_refused(hub, tmp_path, capsys):
    pytest.importorskip("peft")
    words = [*SHORT, "--use_peft", "--save_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert train([*words, *PUSH]) == 2
    error = one_line(capsys.readouterr().err)
    assert "push_to_hub: adapters of a local model" in error and "--merge true" in error
    assert train(words) == 0
    words = ["--checkpoint", str(tmp_path / "out" / "checkpoint-1"), "--push_to_hub"]
    assert export([*words, "--output_dir", str(tmp_path / "adapters")]) == 2
    assert "push_to_hub: adapters of a local model" in capsys.readouterr().err and not hub.files
    assert export([*words, "--merge", "true", "--output_dir", str(tmp_path / "merged")]) == 0
    assert "model.safetensors" in hub.files["models/me/merged"]
    for name in ("org/base", "gpt2"):
        refuse_local_base(name)
    for name in (str(tmp_path), "./base", "~/base", "a/b/c", "/no/such/folder", ""):
        with pytest.raises(ValueError, match="^push_to_hub: adapters of a local model"):
            refuse_local_base(name)


@pytest.mark.parametrize("part", ["whoami", "create", "preupload", "/commit/"])
def test_a_hub_that_never_answers_is_given_up(part, hub, saved, monkeypatch):
    monkeypatch.setattr("rrhf_fast.stages.hub._PATIENCE", 0.2)
    over = threading.Event()
    hub.broken[part] = lambda: over.wait(120)
    before = _http._GLOBAL_CLIENT_FACTORY
    try:
        with pytest.raises(HubFailed, match="^push_to_hub: the hub cannot be used .*[Tt]imeout"):
            Repository("my-model").check().create()
            Repository("me/my-model").push(*saved)
    finally:
        over.set()
    assert _http._GLOBAL_CLIENT_FACTORY is before
    assert huggingface_hub.get_session().timeout.read is None


def test_a_stopped_push_says_how_to_repeat_it(hub, tmp_path, capsys):
    hub.broken["/commit/"] = lambda: (
        os.kill(os.getpid(), signal.SIGTERM),
        threading.Event().wait(1),
    )
    folder = tmp_path / "out"
    assert train([*SHORT, *PUSH, "--output_dir", str(folder)]) == 75
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith("the push to me/my-model was stopped; the model is saved; push it by: hf")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_that_nothing_was_pushed(number, hub, tmp_path, capsys):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            os.kill(os.getpid(), number)

    options = {"max_steps": 3, "train_batch_size": 2, "train_data": str(demo.TRAIN_FILE)}
    options |= {"model_name_or_path": str(demo.MODEL_DIR), "output_dir": str(tmp_path / "out")}
    config = TrainConfig(**options, push_to_hub=True, hub_model_id="my-model")
    with RRHFTrainer(args=config, callbacks=[Stop()]) as trainer:
        trainer.train()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("nothing was pushed to me/my-model; ")
    assert set(hub.files["models/me/my-model"]) == {".gitattributes"}
    if number == signal.SIGTERM:
        assert "resumes" in line
        changed = changed_options(
            next((tmp_path / "out").glob("checkpoint-*")), TrainConfig(**options)
        )
        assert "hub" not in changed
    else:
        assert f"hf upload me/my-model {tmp_path / 'out'} . --include=" in line


def test_names(tmp_path, monkeypatch, capsys):
    class Config(HubConfig):
        output_dir = "runs/my-model"

    assert Config().repository() is None
    assert Config(push_to_hub=True).repository() == Repository("my-model", is_named=False)
    for name in ["a/b/c", "", "a b", "-a", "a..b", "x" * 97, "a/"]:
        with pytest.raises(ValueError, match="^hub_model_id: expected letters, digits"):
            Config(push_to_hub=True, hub_model_id=name).repository()
    Config.output_dir = "runs/my model"
    with pytest.raises(ValueError, match="^hub_model_id: missing .output_dir's 'my model' cannot"):
        Config(push_to_hub=True).repository()
    Config.output_dir = None
    with pytest.raises(ValueError, match="^hub_model_id: missing"):
        Config(push_to_hub=True).repository()
    assert train(["--hub_token", TOKEN]) == 2
    error = one_line(capsys.readouterr().err)
    assert "hub_token: no such option (set HF_TOKEN" in error

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--name").mkdir()
    assert hub_name("org/name") == "org/name" and hub_name("org/other") is None
    monkeypatch.chdir(tmp_path)
    assert hub_name("x" * 300) is None and hub_name("a/" * 200, "dataset") is None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_name("org/name") is None
