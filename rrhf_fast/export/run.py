"""The stage `export`: write a checkpoint, or LoRA adapters, as a Hugging Face model."""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel

from rrhf_fast.export.config import ExportConfig
from rrhf_fast.export.merge import (
    ADAPTER_WEIGHTS,
    FINDING_LAYERS,
    base_of,
    base_option,
    find_base,
    merge,
)
from rrhf_fast.model.decoder import load_tokenizer
from rrhf_fast.model.lora import add_lora
from rrhf_fast.model.pretrained import check_generation_config, loading, read_config
from rrhf_fast.model.save import is_unfinished, write_model
from rrhf_fast.model.sharded import empty_model, named_tensors
from rrhf_fast.stages.cards import ModelCard, counted, described, shown_options, write_card
from rrhf_fast.stages.checkpoint_files import STATE_FILE, read_state
from rrhf_fast.stages.checkpoint_reader import damage, load_checkpoint, summary
from rrhf_fast.stages.hub import public_names, refuse_local_base
from rrhf_fast.stages.lock import locked
from rrhf_fast.stages.options import check
from rrhf_fast.stages.run_folder import is_complete
from rrhf_fast.train.config import TrainConfig


def run(config: ExportConfig) -> Path:
    """See `rrhf_fast.export`."""
    check(config)
    with locked(config.output_dir):
        return _export(config)


def _export(config: ExportConfig) -> Path:
    folder, output_dir = Path(config.checkpoint), Path(config.output_dir)
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not is_complete(folder):
        expected = "a complete checkpoint (output_dir/checkpoint-<step>) or a folder of adapters"
        raise ValueError(f"checkpoint: expected {expected}, found {folder}")
    if not is_adapter and (problem := summary(damage(folder))):
        raise ValueError(f"checkpoint: {folder} is damaged ({problem})")
    if is_adapter and not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"checkpoint: {folder} holds no {ADAPTER_WEIGHTS}")
    if list(output_dir.glob("*.safetensors")) and not is_unfinished(output_dir):
        raise ValueError(f"output_dir: {output_dir} already holds a model")
    has_adapters = is_adapter or _options_of(folder).use_peft
    if config.merge != has_adapters and (config.merge or is_adapter):
        adapters = "holds adapters in their final form (set --merge true to merge them)"
        problem = "holds no LoRA adapters" if config.merge else adapters
        raise ValueError(f"merge: {folder} {problem}")
    if config.load_in_4bit and not config.merge:
        raise ValueError("load_in_4bit: needs merge")
    if config.base_model_name_or_path is not None and not has_adapters:
        raise ValueError(f"base_model_name_or_path: {folder} holds no LoRA adapters")
    base = str(folder)
    if has_adapters:
        named = base_of(folder) if is_adapter else _options_of(folder).model_name_or_path
        base = find_base(named, folder, config)
    if (repository := config.repository()) is not None:
        if has_adapters and not config.merge:
            refuse_local_base(base)
        repository = repository.check()
    code = {"trust_remote_code": config.trust_remote_code}
    # peft saves adapters without one.
    has_tokenizer = not is_adapter or any(folder.glob("tokenizer*"))
    place = str(folder) if has_tokenizer else base
    tokenizer = load_tokenizer(place, option="checkpoint", of_adapters=has_tokenizer, **code)
    if repository is not None:
        repository.create()
    if is_adapter:
        lm, files = _merge(folder, tokenizer, config, base)
    elif config.merge:
        with tempfile.TemporaryDirectory() as adapters:
            _unpack(folder, tokenizer, Path(adapters), config, base)
            lm, files = _merge(Path(adapters), tokenizer, config, base)
    else:
        lm, files = _unpack(folder, tokenizer, output_dir, config, base)
    if repository is not None:
        card = _card(folder, lm, config, base, is_adapter=is_adapter)
        write_card(output_dir, replace(card, name=repository.name))
        repository.push(output_dir, files)
    return output_dir


def _public(name: str | None) -> str | None:
    return next(iter(public_names([name])), None)


def _card(
    folder: Path, lm: PreTrainedModel, config: ExportConfig, base: str, *, is_adapter: bool
) -> ModelCard:
    """The card of the exported model: what its checkpoint knows of the run."""
    card = ModelCard(
        base=_public(base),
        kind=described(lm),
        has_adapters=not (is_adapter or config.merge) and _options_of(folder).use_peft,
    )
    if is_adapter:  # without the options of their run
        return card
    options, step = vars(_options_of(folder)), read_state(folder)["step"]
    return replace(
        card,
        base=_public(options["model_name_or_path"]),
        options=shown_options(options, asdict(TrainConfig())),
        state=f"Training had taken {counted(step, 'step')}.",
    )


def _unpack(
    folder: Path, tokenizer, output_dir: Path, config: ExportConfig, source: str
) -> tuple[PreTrainedModel, list[str]]:
    """Write the model of a checkpoint, or only its adapters, and return it, without weights, and
    the names of the files; `source`: a folder, or the name of a model, with the config of the
    weights."""
    run = _options_of(folder)
    code = {"trust_remote_code": config.trust_remote_code}
    dtype = torch.float32
    if not run.use_peft:
        with loading(str(folder), "checkpoint"):
            dtype = read_config(str(folder), **code).dtype or torch.float32
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    option = base_option(config) if run.use_peft else "checkpoint"
    lm = empty_model(source, option=option, **code)
    with loading(str(folder), "checkpoint"):
        if run.use_peft:
            with FINDING_LAYERS:
                add_lora(lm, run)
        _take_generation_config(lm, folder)
        trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
        weights = {
            name: torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype)
            for name, x in named_tensors(lm).items()
            if name in trained or not run.use_peft
        }
    # Checkpoints store the decoder as `lm` of the module around it.
    state = {"model": {f"lm.{name}": tensor for name, tensor in weights.items()}}
    load_checkpoint(state, folder, "checkpoint", no_dist=True)
    options = {"dtype": dtype, "weights": weights, "in_4bit": run.load_in_4bit}
    return lm, write_model(lm, tokenizer, output_dir, **options)


def _options_of(folder: Path) -> SimpleNamespace:
    """The options of the run that wrote a checkpoint; those of its adapters, if any, are there."""
    options = read_state(folder)["config"]
    needed = ("model_name_or_path", "lora_r", "lora_alpha", "lora_target_modules")
    lacking = [name for name in needed if options["use_peft"] and options.get(name) is None]
    if lacking:
        problem = f"{STATE_FILE}: config lacks {', '.join(lacking)}"
        raise ValueError(f"checkpoint: {folder}: {problem}")
    # Those that its version did not have had their defaults.
    return SimpleNamespace(
        **{"use_rslora": False, "use_dora": False, "load_in_4bit": False} | options
    )


def _merge(
    adapters: Path, tokenizer, config: ExportConfig, base: str
) -> tuple[PreTrainedModel, list[str]]:
    """Write the base model with the adapters added to its weights, and return it and the names of
    the files."""
    lm, dtype = merge(adapters, config, base)
    with loading(config.checkpoint, "checkpoint"):
        _take_generation_config(lm, adapters)
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in named_tensors(lm).items()
    }
    return lm, write_model(lm, tokenizer, Path(config.output_dir), dtype=dtype, weights=weights)


def _take_generation_config(lm: PreTrainedModel, folder: Path) -> None:
    """Load the generation settings stored in `folder`, if any."""
    settings = check_generation_config(str(folder))
    if settings is not None and lm.generation_config is not None:
        lm.generation_config = settings
