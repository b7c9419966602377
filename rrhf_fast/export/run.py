"""The stage `export`: write a checkpoint, or LoRA adapters, as a Hugging Face model."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors import safe_open

from rrhf_fast.data.checks import one_line
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.model.decoder import load_model, load_tokenizer
from rrhf_fast.model.lora import add_lora
from rrhf_fast.model.save import take_generation_config, write_model
from rrhf_fast.model.sharded import empty_model, named_tensors
from rrhf_fast.stages.checkpoint_reader import load_checkpoint
from rrhf_fast.stages.options import check
from rrhf_fast.stages.run_folder import is_complete, read_state


def run(config: ExportConfig) -> Path:
    """See `rrhf_fast.export`."""
    check(config)
    folder, output_dir = Path(config.checkpoint), Path(config.output_dir)
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not is_complete(folder):
        expected = "a complete checkpoint (output_dir/checkpoint-<step>) or a folder of adapters"
        raise ValueError(f"checkpoint: expected {expected}, found {folder}")
    if is_adapter and not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"checkpoint: {folder} holds no adapter_model.safetensors")
    if list(output_dir.glob("*.safetensors")):
        raise ValueError(f"output_dir: {output_dir} already holds a model")
    has_adapters = is_adapter or read_state(folder)["config"]["use_peft"]
    if config.merge != has_adapters and (config.merge or is_adapter):
        adapters = "holds adapters in their final form (set --merge true to merge them)"
        problem = "holds no LoRA adapters" if config.merge else adapters
        raise ValueError(f"merge: {folder} {problem}")
    code = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(str(folder), option="checkpoint", of_adapters=True, **code)
    if is_adapter:
        _merge(folder, tokenizer, config)
    elif config.merge:
        with tempfile.TemporaryDirectory() as adapters:
            _unpack(folder, tokenizer, Path(adapters), config)
            _merge(Path(adapters), tokenizer, config)
    else:
        _unpack(folder, tokenizer, output_dir, config)
    return output_dir


def _unpack(folder: Path, tokenizer, output_dir: Path, config: ExportConfig) -> None:
    """Write the model of a checkpoint, or only its adapters."""
    run = SimpleNamespace(**read_state(folder)["config"])
    options = {"trust_remote_code": config.trust_remote_code}
    dtype = torch.float32
    if not run.use_peft:
        dtype = transformers.AutoConfig.from_pretrained(folder, **options).dtype
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    source = run.model_name_or_path if run.use_peft else str(folder)
    lm = empty_model(source, **options)
    if run.use_peft:
        add_lora(lm, run)
    take_generation_config(lm, folder)
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    weights = {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in named_tensors(lm).items()
        if name in trained or not run.use_peft
    }
    # Checkpoints store the decoder as `lm` of the module around it.
    state = {"model": {f"lm.{name}": tensor for name, tensor in weights.items()}}
    load_checkpoint(state, folder, "checkpoint", no_dist=True)
    write_model(lm, tokenizer, output_dir, dtype=dtype, weights=weights)


def _merge(adapters: Path, tokenizer, config: ExportConfig) -> None:
    """Write the base model with the adapters added to its weights."""
    from peft import PeftModel

    base = json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]
    options = {"trust_remote_code": config.trust_remote_code}
    dtype = transformers.AutoConfig.from_pretrained(base, **options).dtype or torch.float32
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    lm = load_model(base, **options)
    _resize(lm, adapters)
    try:
        lm = PeftModel.from_pretrained(lm, adapters).merge_and_unload()
    except Exception as error:  # peft and safetensors may raise anything
        problem = f"{adapters} do not fit {base} ({one_line(error)})"
        raise ValueError(f"checkpoint: {problem}") from error
    take_generation_config(lm, adapters)
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in named_tensors(lm).items()
    }
    write_model(lm, tokenizer, Path(config.output_dir), dtype=dtype, weights=weights)


def _resize(lm: transformers.PreTrainedModel, adapters: Path) -> None:
    """Give the model the vocabulary size that the adapters were trained with. Raises ValueError if
    they lack tensors that merging needs."""
    embeddings = (lm.get_input_embeddings(), lm.get_output_embeddings())
    vocab, tied = embeddings[0].num_embeddings, embeddings[0].weight is embeddings[1].weight
    names = [name for name, module in lm.named_modules() if module in embeddings]
    sizes = {}  # rows of the embeddings in the adapters, by module
    with safe_open(adapters / "adapter_model.safetensors", "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            name = next((name for name in names if f".{name}." in key), None)
            if name and tied and key.endswith("lora_embedding_A"):
                problem = "they adapt embeddings that the head shares; merging would change both"
                raise ValueError(f"checkpoint: {adapters} cannot be merged: {problem}")
            if name and key.endswith(".weight"):
                sizes[name] = tensors.get_slice(key).get_shape()[0]
    size = max(sizes.values(), default=vocab)
    if size > vocab and not tied and len(sizes) < len(names):
        (missing,) = names - sizes.keys()
        problem = f"their model has {size - vocab} tokens more than its base, and "
        problem += f"they do not hold {missing}"
        raise ValueError(f"checkpoint: {adapters} cannot be merged: {problem}")
    if size != vocab:
        lm.resize_token_embeddings(size, mean_resizing=False)
