"""Save a trained model as a Hugging Face folder, which `from_pretrained` and vLLM read."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME

from rrhf_fast.data.checks import one_line
from rrhf_fast.model.four_bit import IN_4BIT, SETTINGS
from rrhf_fast.model.pretrained import bars_on_terminals
from rrhf_fast.stages.files import sync_folder
from rrhf_fast.stages.lock import when_released

# Leftovers that would change what a folder loads as: an earlier run's weights, split into other
# files, and adapters, settings and templates that this model does not have.
STALE_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_model*.safetensors",
    "adapter_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
)


# Without either, a folder is no model: adapters have the second alone.
MARKERS = ("config.json", "adapter_config.json")
STAGING = ".saving"


class SaveFailed(RuntimeError):
    """A checkpoint or the model could not be written; earlier saves are intact."""


def write_model(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    dtype: torch.dtype,
    weights: dict[str, torch.Tensor],
    in_4bit: bool = False,
) -> list[str]:
    """Write model and tokenizer to a staging folder, then move each file into place: no file is
    ever half-written, and no half-moved model can be loaded. Of a model with adapters, only the
    adapters are written; `in_4bit`: with the fact that they were trained on weights in 4 bits.
    Returns the names of these files within `output_dir`.

    Raises:
        SaveFailed: the folder cannot be written. Its contents are unchanged, unless moving a file
            failed: then the files not yet moved are in `output_dir/.saving`.
    """
    staging, was_unfinished = output_dir / STAGING, is_unfinished(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _empty(staging)
        generation, lm.generation_config = lm.generation_config, GenerationConfig()
        try:
            with bars_on_terminals():
                lm.save_pretrained(staging, state_dict=weights)
        finally:
            lm.generation_config = generation
        if in_4bit:
            (staging / IN_4BIT).write_text(json.dumps(SETTINGS) + "\n")
        if (staging / "config.json").exists():  # not for adapters
            write_config(lm, staging, dtype)
        write_generation_config(lm, staging)
        tokenizer.save_pretrained(staging)
        for path in _files(staging):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    except Exception as error:  # safetensors raises its own type for a full disk
        if not was_unfinished:
            shutil.rmtree(staging, ignore_errors=True)
        raise SaveFailed(
            f"output_dir: {output_dir} could not be written ({one_line(error)})"
        ) from error
    try:
        return _move_into_place(staging, output_dir)
    except OSError as error:
        problem = f"{output_dir} could not be written ({one_line(error)})"
        raise SaveFailed(f"output_dir: {problem}; the new files are in {staging}") from error


def is_unfinished(folder: Path) -> bool:
    """Whether a save to this folder was cut off, so that what it holds is no whole model."""
    return (folder / STAGING).is_dir() and not (folder / STAGING).is_symlink()


def _empty(staging: Path) -> None:
    """Make it an empty folder. One of an earlier save stays, as the sign that it was cut off; a
    link, which could lead to files of someone else, is removed."""
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    if not staging.exists():
        staging.mkdir()
    if hasattr(os, "getuid") and staging.stat().st_uid != os.getuid():
        raise PermissionError(f"{staging} is another user's, who could put links into it")
    with contextlib.suppress(OSError):  # some file systems have no modes
        staging.chmod(0o700)
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _move_into_place(staging: Path, output_dir: Path) -> list[str]:
    """Move every file of `staging`, keeping its folders, and remove stale files. The file by which
    the folder is loaded goes first and comes last. Returns the files' names."""
    probe = staging / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    files = sorted(_files(staging), key=lambda path: path.name in MARKERS)
    moved = {path.relative_to(staging) for path in files}
    for name in MARKERS:
        (output_dir / name).unlink(missing_ok=True)
    for path in files[:-1]:
        _move(path, output_dir / path.relative_to(staging), mode)
    for pattern in STALE_FILES:
        for path in output_dir.glob(pattern):
            if path.relative_to(output_dir) not in moved:
                path.unlink()
    with contextlib.suppress(OSError):  # absent or not empty
        (output_dir / "additional_chat_templates").rmdir()
    sync_folder(output_dir)
    _move(files[-1], output_dir / files[-1].name, mode)
    sync_folder(output_dir)
    _empty(staging)
    when_released(output_dir, staging.rmdir)
    return sorted(path.as_posix() for path in moved)


def _move(path: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)  # safetensors makes its files private to their owner
    os.replace(path, target)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def learn_end_tokens(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int]
) -> None:
    """Add these tokens to those that stop the model's generation: a base model trained on messages
    learns the chat template's end of turn, which its own settings lack."""
    config = lm.generation_config
    if config is None:  # the model does not generate
        return
    known = config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends = list(dict.fromkeys([*known, *end_tokens]))
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None or config.pad_token_id < 0:
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad


def write_generation_config(lm: PreTrainedModel, folder: Path) -> None:
    """Write generation_config.json. Once a setting has changed, `save_pretrained` rejects settings
    that many published models have, such as a temperature without sampling."""
    if lm.generation_config is not None:
        path = folder / GENERATION_CONFIG_NAME
        lm.generation_config.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])


def write_config(lm: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, with the dtype of the stored weights instead of the trained ones, and the
    model's own code, if it has any."""
    before, lm.config.dtype = lm.config.dtype, dtype
    try:
        if lm.is_remote_code():
            custom_object_save(lm, folder, config=lm.config)
        lm.config.save_pretrained(folder)
    finally:
        lm.config.dtype = before
