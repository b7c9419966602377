"""Checkpoints are read without running what they hold."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rrhf_fast import ExportConfig, TrainConfig, export, train
from rrhf_fast.stages.checkpoint_files import write_checksums

OPTIONS = {"max_steps": 2, "save_steps": 1, "train_batch_size": 4, "save_total_limit": None}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Exec(Payload):
    def __reduce__(self):
        return exec, (f"import os; os.mkdir({str(self.path)!r})",)


def pickled(module, name, argument):
    """A pickle, of protocol 4, that calls a name of a module, which may hold dots."""

    def text(value):
        value = value.encode()
        return b"\x8c" + bytes([len(value)]) + value

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


# Modules from which the reader takes other names.
KNOWN_MODULES = {
    "torch.serialization": "os.mkdir",
    "torch.distributed.checkpoint.metadata": "os.mkdir",
    "torch.distributed.checkpoint.filesystem": "os.mkdir",
    "torch": "os.mkdir",
    "pathlib": "os.mkdir",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(TrainConfig(output_dir=str(folder / "out"), **OPTIONS))
    return folder / "out"


@pytest.fixture
def checkpoint(run, tmp_path):
    return Path(shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1"))


def uses(checkpoint, tmp_path):
    """What a user does with a checkpoint, by the option that names it."""
    config = TrainConfig(output_dir=str(tmp_path / "new"), **OPTIONS)
    return {
        "checkpoint": lambda: export(ExportConfig(str(checkpoint), str(tmp_path / "exported"))),
        "resume_from_checkpoint": lambda: train(
            config.__class__(**vars(config) | {"resume_from_checkpoint": str(checkpoint)})
        ),
        "init_optimizer_from": lambda: train(
            config.__class__(**vars(config) | {"init_optimizer_from": str(checkpoint)})
        ),
    }


@pytest.mark.parametrize("payload", [Payload, Exec])
@pytest.mark.parametrize("option", ["checkpoint", "resume_from_checkpoint", "init_optimizer_from"])
def test_code_in_the_metadata_is_refused(payload, option, checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match=f"^{option}: .*metadata cannot be read") as error:
        uses(checkpoint, tmp_path)[option]()
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("module", KNOWN_MODULES)
def test_no_other_name_of_a_known_module_is_taken(module, checkpoint, tmp_path):
    payload = pickled(module, KNOWN_MODULES[module], os.path.relpath(tmp_path / "ran"))
    (checkpoint / ".metadata").write_bytes(payload)
    with pytest.raises(ValueError, match="^checkpoint: .*which no checkpoint needs"):
        uses(checkpoint, tmp_path)["checkpoint"]()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("payload", [Payload, Exec])
def test_code_in_a_value_is_refused(payload, checkpoint, tmp_path):
    """In the place of the random states, which every resume reads."""
    reader = dcp.FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    (index,) = [i for i in metadata.storage_data if i.fqn.startswith("random_states")]
    info = metadata.storage_data[index]
    value = io.BytesIO()
    torch.save(payload(tmp_path / "ran"), value)
    file = checkpoint / info.relative_path
    info.offset = file.stat().st_size
    info.length = len(value.getvalue())
    with file.open("ab") as out:
        out.write(value.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    write_checksums(checkpoint, {})  # whoever writes the value can write the sums too
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*random_states/0 holds some"):
        uses(checkpoint, tmp_path)["resume_from_checkpoint"]()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps({"a": 1})])
@pytest.mark.parametrize("option", ["checkpoint", "resume_from_checkpoint"])
def test_damaged_metadata_is_one_line(content, option, checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{option}: .*metadata cannot be read") as error:
        uses(checkpoint, tmp_path)[option]()
    assert "\n" not in str(error.value)


def test_the_same_checkpoint_resumes_and_exports_unharmed(run, checkpoint, tmp_path):
    for use in uses(checkpoint, tmp_path).values():
        use()
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert (tmp_path / "exported" / "model.safetensors").exists()
