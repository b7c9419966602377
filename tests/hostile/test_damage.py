"""Damaged checkpoints are named and passed over, never used and never a traceback."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrhf_fast import ExportConfig, TrainConfig, demo, export, train
from rrhf_fast.stages.checkpoint_files import read_state, write_checksums
from rrhf_fast.stages.checkpoint_reader import damage
from rrhf_fast.stages.run_folder import complete_checkpoints
from rrhf_fast.train.__main__ import main
from rrhf_fast.train.distributed import World
from rrhf_fast.train.starting_point import starting_point
from tests.hostile.processes import head

WEIGHTS, STATE, SUMS = "__0_0.distcp", "trainer_state.json", "checksums.json"
LATEST = {"resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    rows = head(tmp_path_factory.mktemp("rows"), 4) / "train.jsonl"
    return {
        "model_name_or_path": str(demo.MODEL_DIR), "train_data": str(rows), "train_batch_size": 2,
        "max_steps": 3, "save_steps": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("unharmed") / "out"
    train(TrainConfig(output_dir=str(folder), **options))
    return folder


@pytest.fixture
def out(unharmed, tmp_path):
    return Path(shutil.copytree(unharmed, tmp_path / "out"))


def of_an_earlier_version(folder):
    """A checkpoint without checksums."""
    change(folder, lambda state: state.pop("checksums"))
    (folder / SUMS).unlink()


def change(folder, how):
    """Change the state and leave the checksums as they are."""
    state = json.loads((folder / STATE).read_text())
    how(state)
    (folder / STATE).write_text(json.dumps(state))


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def flip(name, share):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[int(share * len(data))] ^= 4
        (folder / name).write_bytes(data)

    return damage


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def remove(name):
    return lambda folder: (folder / name).unlink()


def entry(name, value):
    def how(state):
        *parents, last = name.split(".")
        for parent in parents:
            state = state[parent]
        if value is None:
            del state[last]
        else:
            state[last] = value

    return lambda folder: change(folder, how)


# Found by checksums alone: the damage, and what its message names.
SILENT = {
    "weights flipped at the start": (flip(WEIGHTS, 0.001), WEIGHTS),
    "weights flipped in the middle": (flip(WEIGHTS, 0.5), WEIGHTS),
    "weights flipped at the end": (flip(WEIGHTS, 0.9999), WEIGHTS),
    "more weights": (write("__1_0.distcp", b"x"), "__1_0.distcp is not its file"),
    "config changed": (write("config.json", b"{}"), "config.json has changed"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "another step": (entry("step", 2), STATE),
    "sums of nothing": (write(SUMS, b"{}"), WEIGHTS),
    "sums that are no JSON": (write(SUMS, b"\xff\x00{"), SUMS),
    "sums nested too deeply": (write(SUMS, b"[" * 10**6), SUMS),
    "sums of odd types": (
        write(SUMS, b'{"../../etc/passwd": 1, "a\\nb": [], ".": null}'),
        "missing",
    ),
}
# Found without them too.
LOUD = {
    "no weights": (remove(WEIGHTS), WEIGHTS),
    "weights cut": (cut(WEIGHTS), WEIGHTS),
    "no metadata": (remove(".metadata"), ".metadata"),
    "metadata empty": (write(".metadata", b""), ".metadata"),
    "metadata cut": (cut(".metadata"), ".metadata"),
    "state empty": (write(STATE, b""), STATE),
    "state binary": (write(STATE, bytes(range(256)) * 9), STATE),
    "state not JSON": (write(STATE, b'{"step": 3,'), STATE),
    "state a list": (write(STATE, b"[1]"), STATE),
    "state a number": (write(STATE, b"1"), STATE),
    "state nested too deeply": (write(STATE, b'{"a":' * 10**6), STATE),
    "state huge": (write(STATE, b" " * 2**25), STATE),
    "state with a long number": (write(STATE, b'{"step": ' + b"9" * 9999 + b"}"), STATE),
}
ENTRIES = {
    "step": [None, -1, 1.5, "3", True, [], 10**400, {}],
    "num_tokens": [None, "many", -5],
    "skipped": [None, [0]],
    "active_fraction": [None, "1", float("nan"), float("inf"), 10**400],
    "num_ranks": [None, 0, "2"],
    "data": [None, 7],
    "files": [None, [], {"metrics.jsonl": -1}, {"metrics.jsonl": "long"}],
    "schedule": [None, [], {}],
    "schedule.last_epoch": [None, "3", 1.5],
    "config": [None, "all", {}],
    "config.max_tokens_per_pack": [None, "auto", 0, 10**40],
    "config.use_peft": [None, "no", 1],
    "config.model_name_or_path": [3, ["a"]],
    "config.lora_target_modules": [3, {}],
}


def latest(folder, options):
    return starting_point(TrainConfig(output_dir=str(folder), **LATEST), World(torch.device("cpu")))


def refusals(checkpoint, tmp_path, options):
    """What a user who names the checkpoint is told, by option."""
    new = {"output_dir": str(tmp_path / "new"), **options}
    uses = {
        "resume_from_checkpoint": lambda name: train(
            TrainConfig(resume_from_checkpoint=name, **new)
        ),
        "init_optimizer_from": lambda name: train(TrainConfig(init_optimizer_from=name, **new)),
        "checkpoint": lambda name: export(ExportConfig(name, new["output_dir"])),
    }
    for option, use in uses.items():
        with pytest.raises(ValueError) as refused:
            use(str(checkpoint))
        assert not (tmp_path / "new").exists() and "\n" not in str(refused.value)
        yield option, str(refused.value)


@pytest.mark.parametrize("name", [*SILENT, *LOUD])
def test_latest_is_the_newest_whole_one(name, out, tmp_path, options, capsys):
    how, what = (SILENT | LOUD)[name]
    for number in (2, 3):
        how(out / f"checkpoint-{number}")
    assert latest(out, options) == out / "checkpoint-1"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and f"{out}/checkpoint-3 is damaged" in "".join(lines)
    assert all(what in line and len(line) < 600 for line in lines)
    for option, refused in refusals(out / "checkpoint-3", tmp_path, options):
        assert refused.startswith(f"{option}: {out}/checkpoint-3 is damaged (") and what in refused


@pytest.mark.parametrize("name", LOUD)
def test_damage_to_checkpoints_of_earlier_versions(name, out, options, capsys):
    of_an_earlier_version(out / "checkpoint-2")
    of_an_earlier_version(out / "checkpoint-3")
    assert latest(out, options) == out / "checkpoint-3"
    LOUD[name][0](out / "checkpoint-3")
    assert latest(out, options) == out / "checkpoint-2"
    lines = capsys.readouterr().out.splitlines()
    # Without .metadata it is one that was never finished.
    assert len(lines) == (name != "no metadata") and all(LOUD[name][1] in line for line in lines)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_the_state(name, out, options, capsys):
    folder = out / "checkpoint-3"
    of_an_earlier_version(folder)
    state = (folder / STATE).read_bytes()
    for value in ENTRIES[name]:
        entry(name, value)(folder)
        with pytest.raises(ValueError, match="^trainer_state.json: ") as error:
            read_state(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        (problem,) = damage(folder)
        assert name.partition(".")[0] in problem and name.split(".")[-1] in problem
        assert latest(out, options) == out / "checkpoint-2"
        (folder / STATE).write_bytes(state)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from(list(ENTRIES)), value=JSON)
def test_any_value_of_an_entry(name, value, unharmed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    shutil.copy(unharmed / "checkpoint-3" / STATE, folder)
    entry(name, value)(folder)
    try:
        state = read_state(folder)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert type(state["step"]) is int and type(state["schedule"]["last_epoch"]) is int


def test_a_run_goes_on_from_the_checkpoint_before(out, unharmed, options, capsys):
    SILENT["weights flipped in the middle"][0](out / "checkpoint-3")
    config = TrainConfig(output_dir=str(out), **LATEST, save_total_limit=2, **options)
    assert train(config).steps == 3
    assert f"resume     {out}/checkpoint-2" in capsys.readouterr().out
    for name in ("model.safetensors", f"checkpoint-3/{WEIGHTS}"):
        assert (out / name).read_bytes() == (unharmed / name).read_bytes()
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]


def test_a_damaged_later_one_does_not_displace_what_is_saved(out, options):
    """As the newest, by its step, it would be the one to keep."""
    SILENT["weights flipped in the middle"][0](out / "checkpoint-3")
    options = options | {"max_steps": 2}
    shutil.rmtree(out / "checkpoint-2")
    train(TrainConfig(output_dir=str(out), **LATEST, save_total_limit=1, **options))
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-2"]


def test_where_none_is_whole_nothing_is_deleted(out, options, capsys):
    (out / "checkpoint-1" / SUMS).write_text("{}")
    (out / "checkpoint-2" / STATE).write_text("{")
    (out / "checkpoint-3" / ".metadata").unlink()
    before = sorted(out.rglob("*"))
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main([*arguments, "--output_dir", str(out), "--resume_from_checkpoint", "latest"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("rrhf_fast.train: error: resume_from_checkpoint: no checkpoint in")
    assert all(f"checkpoint-{number}" in line for number in (1, 2, 3))
    assert sorted(out.rglob("*")) == before


def test_a_checkpoint_without_its_sums_is_used_and_gets_them(out, options, capsys):
    """Its save was cut off just before them, or somebody removed them."""
    sums = out / "checkpoint-3" / SUMS
    before = sums.read_bytes()
    for folder in out.glob("checkpoint-*"):
        (folder / SUMS).unlink()
    (sums.parent / ".checksums.json.0123abcd.saving").write_text("{")
    assert latest(out, options) == out / "checkpoint-3"
    train(TrainConfig(output_dir=str(out), **LATEST, **options))
    assert f"warning: {sums.parent} has no checksums.json" in capsys.readouterr().out
    assert sums.read_bytes() == before
    assert len(list(out.glob("checkpoint-*"))) == 3  # nothing was deleted


def test_ranks_share_the_files(out):
    folder = out / "checkpoint-3"
    for number in range(1, 6):
        (folder / f"__{number}_0.distcp").write_bytes(b"x" * number)
    write_checksums(folder, {})
    for number in (2, 3):
        flip(f"__{number}_0.distcp", 0)(folder)
    by_rank = [damage(folder, rank, 2) for rank in range(2)]
    assert all(len(problems) == 1 for problems in by_rank)
    assert sorted(by_rank[0] + by_rank[1]) == damage(folder)


def test_damaged_checkpoints_are_ours_and_those_of_others_are_not(out, options):
    write(STATE, b"\x00")(out / "checkpoint-3")
    of_an_earlier_version(out / "checkpoint-2")
    write(STATE, b"[")(out / "checkpoint-2")
    train(TrainConfig(output_dir=str(out), overwrite_output_dir=True, **options))
    foreign = out / "checkpoint-500"
    foreign.mkdir()
    for state in ('{"global_step": 500, "log_history": []}', "{", None):
        (foreign / "model.safetensors").write_text("precious")
        (foreign / STATE).write_text(state) if state else (foreign / STATE).unlink()
        for more in (LATEST, {"overwrite_output_dir": True}):
            with pytest.raises(ValueError, match="checkpoint-500 is not a checkpoint of rrhf_fast"):
                train(TrainConfig(output_dir=str(out), **more, **options))
    assert (foreign / "model.safetensors").read_text() == "precious"


LINES = {
    "not JSON": b'{"step": 1, "lo\n', "binary": bytes(range(256)).replace(b"\n", b"") + b"\n",
    "a list": b"[1]\n", "no step": b'{"loss": 1.0}\n', "odd types": b'{"step": "1", "loss": []}\n',
    "text for a number": b'{"step": 1, "loss": "low", "eval/loss": {}}\n', "empty": b"\n",
    "nested": b"[" * 10**5 + b"\n", "long number": b'{"step": 1, "loss": ' + b"9" * 9999 + b"}\n",
    "no end": b'{"step": 1',
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_damaged_records(name, out, options, capsys):
    metrics, samples = out / "metrics.jsonl", out / "samples.jsonl"
    first, second, _ = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + LINES[name] + second)
    samples.write_bytes(LINES[name] * 3)
    lengths = {"metrics.jsonl": len(first + LINES[name]), "samples.jsonl": 10**6}
    folder = out / "checkpoint-2"
    change(folder, lambda state: state.update(files=lengths))
    write_checksums(folder, {})
    shutil.rmtree(out / "checkpoint-3")
    result = train(TrainConfig(output_dir=str(out), **LATEST, **options))
    assert [record["step"] for record in result.metrics] == [1, 3]
    printed = capsys.readouterr().out
    assert (f"1 of 2 lines of {metrics} are damaged" in printed) == (name != "no end")
    last = metrics.read_bytes().splitlines()[-1]
    assert json.loads(last)["step"] == 3 and metrics.read_bytes().startswith(first)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_records_that_are_no_file(name, out, options):
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    with pytest.raises(ValueError, match=f"output_dir: .*{name} cannot be continued") as error:
        train(TrainConfig(output_dir=str(out), **LATEST, **options))
    assert "\n" not in str(error.value)
