"""Load what a model folder, or a model of the hub, holds: the one place where a name reaches
transformers.

Anybody can write such a folder. Without `trust_remote_code` nothing in it is run, and nobody is
asked about it; its files are checked before memory is taken for what they describe.
"""

import contextlib
import json
import math
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import cached_files

from rrhf_fast.data.checks import one_line, show
from rrhf_fast.stages.run_folder import complete_checkpoints

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# More than any model has. A config with a billion of them would fill the memory with modules.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_labels")
_MOST = dict.fromkeys(_LAYERS, 10_000) | dict.fromkeys(_EXPERTS, 1_000_000)
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# Types that weights of models are stored in, as safetensors names them.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored, and as what."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str


@contextlib.contextmanager
def loading(name_or_path: str, option: str) -> Iterator[None]:
    """Turn whatever fails in the block into a ValueError of one line, which begins with the option
    and the name, and keep transformers from printing reports of its own."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings(), bars_on_terminals():
            warnings.simplefilter("ignore")
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # the CPU's lack of memory, which has no type
            raise
        raise ValueError(f"{option}: {name_or_path}: {_why(name_or_path, error)}") from error
    except Exception as error:  # damaged and foreign folders raise any type
        if str(error).startswith(f"{option}: "):
            raise
        problem = _why(name_or_path, error)
        raise ValueError(f"{option}: {name_or_path}: {problem}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tokenizers, which is written in Rust
            raise
        raise ValueError(f"{option}: {name_or_path}: {one_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Inside, the progress bars of transformers appear on terminals only, while they progress."""

    def bar(make, args: tuple, options: dict):
        return make(*args, **(options | {"disable": None, "leave": False}))

    before = transformers.logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        transformers.logging.set_tqdm_hook(before)


def read_config(name_or_path: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model, to be called within `loading`. How the model computes is ours to
    choose: a config that names kernels of the hub would download them.

    Raises:
        ValueError: it is damaged, describes no model, or needs code that is not trusted.
    """
    if (described := _read_described(name_or_path)) is not None:
        _refuse_code(described, trust_remote_code)
    # A bool always: given None, transformers asks on stdin.
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=bool(trust_remote_code))
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(config, name):
            setattr(config, name, None)
    text = config.get_text_config()
    for name in _SIZES:
        try:
            size = getattr(text, name, 1)
        except ValueError:  # it differs among layers
            continue
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{CONFIG_NAME}: {name}: expected a positive integer, found {size!r}")
    if not isinstance(config.dtype, torch.dtype | None) or (
        config.dtype is not None and not config.dtype.is_floating_point
    ):
        problem = f"expected a type of floating-point numbers, found {show(config.dtype)}"
        raise ValueError(f"{CONFIG_NAME}: dtype: {problem}")
    return config


def _read_described(name_or_path: str) -> dict | None:
    """config.json; None if there is none. Raises ValueError if it is damaged, or would take all
    memory to read on."""
    described = read_json(name_or_path, CONFIG_NAME)
    parts = [described or {}]
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            if isinstance(value, int) and value > (most := _MOST.get(name, math.inf)):
                problem = f"expected at most {most}, found {show(value)}"
                raise ValueError(f"{CONFIG_NAME}: {name}: {problem}")
    return described


def _refuse_code(described: dict, trust_remote_code: bool) -> None:
    """Refuse a config that only code of the folder could read."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    kind = described.get("model_type")
    if isinstance(kind, str) and kind in known:
        return
    if described.get("auto_map") and not trust_remote_code:
        problem = "this model needs Python code that comes with it"
        how = "set --trust_remote_code true if you trust its author"
        raise ValueError(f"{CONFIG_NAME}: {problem} ({how})")
    if not described.get("auto_map"):
        raise ValueError(f"{CONFIG_NAME}: model_type: {show(kind)} is not known to transformers")


def load_pretrained(
    auto_class: type, name_or_path: str, *, dtype: torch.dtype, trust_remote_code: bool, **more
) -> PreTrainedModel:
    """Load a model with all its weights from safetensors, to be called within `loading`; `more` is
    for transformers.

    Raises:
        ValueError: weights are missing, have other shapes or types than the config describes, or
            are not finite.
    """
    config = read_config(name_or_path, trust_remote_code=trust_remote_code)
    stored = stored_tensors(name_or_path, config)
    empty = make_empty(auto_class, config, trust_remote_code=trust_remote_code)
    _check_stored(empty, stored, is_quantized=hasattr(config, "quantization_config"))
    check_generation_config(name_or_path)
    # transformers quantises weights of any shape.
    if more and (problem := _first_difference(empty, stored)):
        raise ValueError(problem)
    try:
        model, info = auto_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=bool(trust_remote_code),
            output_loading_info=True,
            **more,
        )
    except RuntimeError as error:  # transformers says of other shapes only that there are some
        raise ValueError(_first_difference(empty, stored) or one_line(error)) from error
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:3])
        raise ValueError(f"{len(missing)} weights are missing and would start at random ({names})")
    if unused := sorted(info["unexpected_keys"]):
        names = ", ".join(one_line(name, 60) for name in unused[:3])
        problem = f"{len(unused)} stored tensors are no part of the model ({names})"
        print(f"warning: {name_or_path}: {problem}", file=sys.stderr)
    check_weights(model)
    # Log-probs and scores must depend on the weights alone: eval mode turns dropout off.
    return model.eval()


def make_empty(
    auto_class: type, config: PretrainedConfig, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The model on the meta device: shapes, no weights."""
    with torch.device("meta"):
        return auto_class.from_config(
            config, dtype=torch.float32, trust_remote_code=bool(trust_remote_code)
        )


def of_checkpoints(folder: Path) -> str | None:
    """What to do with a folder that is a checkpoint of a run, or holds nothing else; None if it is
    another one."""
    has_config = (folder / CONFIG_NAME).exists()
    inner = [] if has_config else [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    last = max(complete_checkpoints(folder)[-1:] or inner, key=_by_number, default=folder)
    if next(last.glob("*.distcp"), None) is not None:
        name = shlex.quote(str(last))
        export = f"python -m rrhf_fast.export --checkpoint {name} --output_dir FOLDER"
        return f"no model, but a checkpoint of a run ({export} makes a model of it)"
    return f"no model, but checkpoints (name one of them, as {last})" if inner else None


def _by_number(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


def stored_tensors(name_or_path: str, config: PretrainedConfig) -> dict[str, Stored]:
    """The tensors in the safetensors files of a model, by their names there; empty if only the hub
    knows where they are. Raises ValueError if a folder has none, a file is damaged, or an index
    names a file outside the folder."""
    explicit = getattr(config, "transformers_weights", None)
    files = [explicit] if explicit else [SAFE_WEIGHTS_NAME]
    if not explicit and _locate(name_or_path, SAFE_WEIGHTS_NAME) is None:
        index = read_json(name_or_path, SAFE_WEIGHTS_INDEX_NAME)
        if index is None and not Path(name_or_path).exists():
            return {}  # transformers may find weights that the hub converted
        if index is None:
            problem = f"it holds no {SAFE_WEIGHTS_NAME} (and pickled weights are not read)"
            raise ValueError(of_checkpoints(Path(name_or_path)) or problem)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME}: weight_map: expected files by tensor")
        files = list(shards.values())
    for file in files:
        if not isinstance(file, str) or not is_inside(file) or not file.endswith(".safetensors"):
            where = CONFIG_NAME if explicit else SAFE_WEIGHTS_INDEX_NAME
            problem = f"expected a safetensors file inside the folder, found {show(file)}"
            raise ValueError(f"{where}: {problem}")
    tensors: dict[str, Stored] = {}
    files = sorted(set(files))
    paths = cached_files(name_or_path, files, _raise_exceptions_for_missing_entries=False) or []
    if missing := [f for f in files if not any(Path(path).name == Path(f).name for path in paths)]:
        raise ValueError(f"{missing[0]} is missing")
    for path in paths:
        tensors |= stored_in(path)
    return tensors


def stored_in(path: str | Path) -> dict[str, Stored]:
    """The tensors in a safetensors file. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            found = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(key)
                found[key] = Stored(str(path), key, tuple(part.get_shape()), part.get_dtype())
            return found
    except Exception as error:  # safetensors has its own type
        raise ValueError(f"{Path(path).name} cannot be read ({one_line(error)})") from error


def is_inside(file: str) -> bool:
    """Whether a file named by a folder lies in it."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in file


def _check_stored(empty: PreTrainedModel, stored: dict[str, Stored], *, is_quantized: bool) -> None:
    """Refuse a config that describes far more weights than are stored, before memory is taken for
    them, and weights that are not floating-point numbers."""
    if is_quantized or not stored:  # quantized: several weights per stored number
        return
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    count = sum(parameter.numel() for parameter in empty.parameters())
    if count > 2 * held + 10**6:
        problem = _first_difference(empty, stored) or "weights are missing"
        counts = f"{CONFIG_NAME} describes {count:.3g} weights, its files hold {held:.3g}"
        raise ValueError(f"{counts} ({problem})")
    for name, tensor in _pairs(empty, stored):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} holds {tensor.dtype}, expected floating-point numbers")


def _pairs(empty: PreTrainedModel, stored: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
    """Parameters of a model that are stored under their own names."""
    for name, _ in empty.named_parameters():
        for key in (name, name.removeprefix(f"{empty.base_model_prefix}.")):
            if key in stored:
                yield name, stored[key]
                break


def _first_difference(empty: PreTrainedModel, stored: dict[str, Stored]) -> str | None:
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    for name, tensor in _pairs(empty, stored):
        if tensor.shape != shapes[name]:
            described, held = list(shapes[name]), list(tensor.shape)
            return f"{name}: {CONFIG_NAME} describes {described}, the file holds {held}"
    return None


@torch.no_grad()
def check_weights(model: nn.Module) -> None:
    """Raise ValueError with the name of the first weight that holds NaN or infinity. Each rank
    checks its own shard."""
    frequencies = ((n, x) for n, x in model.named_buffers() if n.endswith("inv_freq"))
    for name, tensor in (*model.named_parameters(), *frequencies):
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if part.numel() == 0 or not part.is_floating_point():
            continue
        low, high = (value.item() for value in part.aminmax())
        if not math.isfinite(low + high):
            what = "NaN" if math.isnan(low) else "infinite values"
            raise ValueError(f"its weights are damaged: {name} holds {what}")


@torch.no_grad()
def check_forward(model: PreTrainedModel) -> None:
    """Raise ValueError if the model cannot compute, or computes NaN: finite weights may overflow,
    and a config may describe what no code can do."""
    tokens = model.get_input_embeddings().num_embeddings
    ids = torch.arange(min(4, tokens), device=model.device)[None]
    try:
        logits = model(input_ids=ids).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any type, for a config that fits no code
        raise ValueError(f"it cannot compute ({one_line(error)})") from error
    if logits.isnan().any():
        raise ValueError("its logits are NaN, although its weights are finite")


def check_vocabulary(
    sequences: Iterable[Sequence[int]], model: PreTrainedModel, name_or_path: str, option: str
) -> None:
    """Raise ValueError if token ids reach beyond the model's embedding."""
    known = model.get_input_embeddings().num_embeddings
    largest = max((int(np.max(ids)) for ids in sequences if len(ids)), default=0)
    if largest >= known:
        problem = f"its tokenizer makes token {largest}, but the model knows only {known}"
        raise ValueError(f"{option}: {name_or_path}: {problem}")


def padding_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The tokenizer's padding token, if the model knows it; attention sees no padding, so any
    token serves."""
    pad, known = tokenizer.pad_token_id, model.get_input_embeddings().num_embeddings
    return pad if pad in range(known) else 0


def check_tokenizer_config(name_or_path: str) -> None:
    """Raise ValueError if the tokenizer's settings are damaged, or need code of the folder."""
    _read_described(name_or_path)
    described = read_json(name_or_path, TOKENIZER_CONFIG) or {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token"):
        token = described.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            problem = f"expected a string, found {show(text)}"
            raise ValueError(f"{TOKENIZER_CONFIG}: {name}: {problem}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer cannot serve any text."""
    template = tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in templates):
        raise ValueError(f"chat_template: expected a text, found {show(template)}")
    tokenizer("a")


def check_generation_config(name_or_path: str) -> GenerationConfig | None:
    """The stored generation settings, if any. Raises ValueError if they are damaged."""
    described = read_json(name_or_path, GENERATION_CONFIG_NAME)
    if described is None:
        return None
    for name, value in described.items():
        ids = value if isinstance(value, list) else [value]
        if name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            if value is not None and not all(type(i) is int and -1 <= i < 2**31 for i in ids):
                problem = f"expected token ids, found {show(value)}"
                raise ValueError(f"{GENERATION_CONFIG_NAME}: {name}: {problem}")
        elif isinstance(value, float) and not math.isfinite(value):
            problem = f"expected a finite number, found {value}"
            raise ValueError(f"{GENERATION_CONFIG_NAME}: {name}: {problem}")
    try:
        return GenerationConfig.from_dict(described)
    except Exception as error:  # any type, for entries of other types
        raise ValueError(f"{GENERATION_CONFIG_NAME}: {one_line(error)}") from error


def read_json(name_or_path: str, file: str) -> dict[str, Any] | None:
    """A JSON object of a folder or a model of the hub; None if there is no such file."""
    path = _locate(name_or_path, file)
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{file}: holds half of a surrogate pair, not Unicode") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {show(content)}")
    return content


def _locate(name_or_path: str, file: str) -> str | None:
    return cached_file(
        name_or_path,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )


def refuse_adapters(name_or_path: str, option: str) -> None:
    """Raise ValueError for a folder of adapters: transformers would load the model that they name,
    and put them into it."""
    if _locate(name_or_path, ADAPTER_CONFIG) is None:
        return
    if _locate(name_or_path, CONFIG_NAME) is not None:
        problem = f"holds LoRA adapters beside a model, expected one of them (see {ADAPTER_CONFIG})"
        raise ValueError(f"{option}: {name_or_path} {problem}")
    how = f"python -m rrhf_fast.export --checkpoint {name_or_path} --merge true --output_dir MERGED"
    problem = f"holds LoRA adapters, not a model; merge them: {how}"
    raise ValueError(f"{option}: {name_or_path} {problem}")


def _why(name_or_path: str, error: Exception) -> str:
    """Why loading failed, on one line."""
    if Path(name_or_path).exists() or type(error) is ValueError:
        return one_line(error)
    # Given a path that is not a hub name, the hub's client complains about "repo ids".
    is_path = isinstance(error.__cause__ or error, HFValidationError)
    problem = "no such folder, and no such model on the hub could be loaded"
    return problem if is_path else f"{problem} ({one_line(error)})"
