"""Add LoRA adapters to the weights of the model they were trained for.

peft loads what fits and leaves out what does not, with a warning. A model merged from half of its
adapters looks like any other, so here names, shapes and values are checked first.
"""

import copy
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from rrhf_fast.data.checks import listed, one_line, show
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.model.decoder import load_model
from rrhf_fast.model.four_bit import IN_4BIT, round_to_four_bits
from rrhf_fast.model.pretrained import (
    ADAPTER_CONFIG,
    FLOATS,
    Stored,
    check_weights,
    loading,
    read_config,
    read_json,
    stored_in,
)
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.stages.bounded import Limits
from rrhf_fast.stages.outlet import say

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HIGHEST_RANK = 2**16
# For finding the layers to adapt, by regular expressions of the adapters.
FINDING_LAYERS = Limits(seconds=20)


def merge(adapters: Path, config: ExportConfig, base: str) -> tuple[PreTrainedModel, torch.dtype]:
    """The model named `base` with the adapters added to its weights, and the dtype to save it in.

    Raises:
        ValueError: begins with "checkpoint:"; the adapters are damaged, are not those of this
            model, or there is no such model.
    """
    from peft import PeftModel

    where = f"checkpoint: {config.checkpoint}"
    option = base_option(config)
    code = {"trust_remote_code": config.trust_remote_code}
    try:
        settings, stored = _read_settings(adapters), _read_weights(adapters)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    empty = empty_model(base, option=option, **code)
    with loading(base, option):
        dtype = read_config(base, **code).dtype or torch.float32
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    _resize(empty, stored, where)
    _check_fit(_expected(empty, settings, base, where), stored, f"{where} do not fit {base}")
    lm = load_model(base, option=option, **code)
    _resize(lm, stored, where)
    in_4bit = config.load_in_4bit
    if (adapters / IN_4BIT).is_file() if in_4bit is None else in_4bit:
        round_to_four_bits(lm)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm = PeftModel.from_pretrained(lm, adapters, config=settings).merge_and_unload()
    except Exception as error:  # peft may raise anything
        raise ValueError(f"{where} do not fit {base} ({one_line(error)})") from error
    with loading(config.checkpoint, "checkpoint"):
        check_weights(lm)
    return lm, dtype


def find_base(named: str, folder: Path, config: ExportConfig) -> str:
    """The base model of the adapters in `folder`, which name `named`: that of the options if there
    is one. Whoever trained them may have typed a path from the folders above."""
    if config.base_model_name_or_path is not None:
        return config.base_model_name_or_path
    here = folder.resolve()
    places = [Path(), *([] if Path(named).is_absolute() else [here, *here.parents])]
    found = [place / named for place in places if (place / named / CONFIG_NAME).is_file()]
    if not found or found[0] == Path(named):
        return named
    say(f"note: the base model {one_line(named)} is taken to be {found[0]}")
    return str(found[0])


def base_option(config: ExportConfig) -> str:
    """What messages call the name of the base model."""
    own = config.base_model_name_or_path is not None
    return f"{'' if own else f'checkpoint: {config.checkpoint}: '}base_model_name_or_path"


def base_of(adapters: Path) -> str:
    """The name of the model that adapters were trained for. Raises ValueError if there is none."""
    with loading(str(adapters), "checkpoint"):
        base = (read_json(str(adapters), ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    where = f"checkpoint: {adapters}: {ADAPTER_CONFIG}: base_model_name_or_path"
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise ValueError(f"{where}: expected the name of a model, found {show(base)}")
    if Path(base).resolve() == adapters.resolve():
        raise ValueError(f"{where}: names the folder of the adapters, expected their base model")
    return base


def _read_settings(adapters: Path) -> "LoraConfig":
    """peft's settings of the adapters, of which everything that is computed with is checked."""
    from peft import LoraConfig

    described = read_json(str(adapters), ADAPTER_CONFIG) or {}
    try:
        _check_settings(described)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = LoraConfig.from_peft_type(**described)
    except Exception as error:  # peft raises any type
        raise ValueError(f"{ADAPTER_CONFIG}: {one_line(error)}") from error
    settings.inference_mode = True
    return settings


def _check_settings(described: dict[str, Any]) -> None:
    if described.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected LORA, found {show(described.get('peft_type'))}")
    for name in ("megatron_config", "corda_config"):  # import modules, read other files
        if described.get(name):
            raise ValueError(f"{name}: adapters with such settings cannot be merged")
    ranks = {"r": described.get("r"), **_pattern(described, "rank_pattern")}
    for name, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= _HIGHEST_RANK:
            expected = f"expected an integer from 1 to {_HIGHEST_RANK}"
            raise ValueError(f"{one_line(name, 60)}: {expected}, found {show(rank)}")
    alphas = {"lora_alpha": described.get("lora_alpha"), **_pattern(described, "alpha_pattern")}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not -1e9 < alpha < 1e9:
            problem = f"expected a finite number, found {show(alpha)}"
            raise ValueError(f"{one_line(name, 60)}: {problem}")
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = described.get(name)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, str) for item in names):
            raise ValueError(f"{name}: expected names of modules, found {show(value)}")
        if isinstance(value, str):
            _check_expression(name, value)
    copies = described.get("layer_replication") or []
    if sum(end - start for start, end in copies) > 10_000:
        raise ValueError("layer_replication: describes too many layers")


def _pattern(described: dict[str, Any], name: str) -> dict[str, Any]:
    values = described.get(name) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected an object, found {show(values)}")
    for expression in values:
        _check_expression(name, expression)
    return {f"{name}[{expression}]": value for expression, value in values.items()}


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        problem = f"{show(expression)} is no regular expression ({error})"
        raise ValueError(f"{name}: {problem}") from error


def _read_weights(adapters: Path) -> dict[str, Stored]:
    """Where the tensors of adapters are. Raises ValueError unless all are finite numbers."""
    path = adapters / ADAPTER_WEIGHTS
    stored = stored_in(path)
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            problem = f"holds {tensor.dtype}, expected floating-point numbers"
            raise ValueError(f"{one_line(name, 100)} {problem}")
    with safe_open(path, "pt") as file:
        for name in stored:
            values = file.get_tensor(name)
            if values.numel() and not math.isfinite(sum(x.item() for x in values.aminmax())):
                raise ValueError(f"{one_line(name, 100)} holds NaN or infinite values")
    return stored


def _expected(
    empty: PreTrainedModel, settings: "LoraConfig", base: str, where: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that adapters with these settings have on this model, and of
    the embeddings that may be stored with them."""
    from peft import get_peft_model, get_peft_model_state_dict

    settings = copy.deepcopy(settings)
    settings.init_lora_weights = False
    try:
        with warnings.catch_warnings(), FINDING_LAYERS:
            warnings.simplefilter("ignore")
            model = get_peft_model(empty, settings, low_cpu_mem_usage=True)
            needed, every = (
                {
                    name: tuple(tensor.shape)
                    for name, tensor in get_peft_model_state_dict(
                        model, save_embedding_layers=also
                    ).items()
                }
                for also in (False, True)
            )
    except Exception as error:  # peft may raise anything
        raise ValueError(f"{where} do not fit {base} ({one_line(error)})") from error
    return needed, every


def _check_fit(
    expected: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]],
    stored: dict[str, Stored],
    problem: str,
) -> None:
    needed, every = expected
    if missing := sorted(needed.keys() - stored.keys()):
        raise ValueError(f"{problem}: {_are(missing)} missing")
    if foreign := sorted(stored.keys() - every.keys()):
        raise ValueError(f"{problem}: {_are(foreign)} not among their tensors")
    for name, tensor in stored.items():
        if tensor.shape != every[name]:
            shapes = f"expected {list(every[name])}, found {list(tensor.shape)}"
            raise ValueError(f"{problem}: {name}: {shapes}")


def _are(names: list[str]) -> str:
    return f"{listed(names, most=1, length=100)} {'are' if len(names) > 1 else 'is'}"


def _resize(lm: PreTrainedModel, stored: dict[str, Stored], where: str) -> None:
    """Give the model the vocabulary size that the adapters were trained with. Raises ValueError if
    they lack tensors that merging needs."""
    embeddings = (lm.get_input_embeddings(), lm.get_output_embeddings())
    vocab, tied = embeddings[0].num_embeddings, embeddings[0].weight is embeddings[1].weight
    names = [name for name, module in lm.named_modules() if module in embeddings]
    sizes = {}  # rows of the embeddings in the adapters, by module
    for key, tensor in stored.items():
        name = next((name for name in names if f".{name}." in key), None)
        if name and tied and key.endswith("lora_embedding_A"):
            problem = "they adapt embeddings that the head shares; merging would change both"
            raise ValueError(f"{where} cannot be merged: {problem}")
        if name and key.endswith(".weight") and ".lora_" not in key and len(tensor.shape) == 2:
            sizes[name] = tensor.shape[0]
    size = max(sizes.values(), default=vocab)
    if size > vocab and not tied and len(sizes) < len(names):
        (missing,) = names - sizes.keys()
        problem = f"their model has {size - vocab} tokens more than its base, and "
        problem += f"they do not hold {missing}"
        raise ValueError(f"{where} cannot be merged: {problem}")
    if size != vocab and size > 0:
        lm.resize_token_embeddings(size, mean_resizing=False)
