"""Hugging Face decoders: load one, read its head, run it over a packed forest.

The forest is correct only for decoders that take their attention function from transformers'
AttentionInterface, pass our keyword arguments through to it, and mix tokens in no other way.
`check_forest_support` rejects the others, with the reason, and `self_check` compares a small
forest with unpacked runs before the first step, because a model that ignores the function would
silently train on wrong log-probs.
"""

import contextlib
import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from rrhf_fast import reference
from rrhf_fast.data.checks import one_line
from rrhf_fast.data.forest import PackedForest, build_forest
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model import forest_sdpa
from rrhf_fast.model.attention import FOREST, Forest, NoForest
from rrhf_fast.model.backend import AttentionSpec
from rrhf_fast.model.pretrained import (
    check_tokenizer,
    check_tokenizer_config,
    check_weights,
    load_pretrained,
    loading,
    of_checkpoints,
    refuse_adapters,
)

# Largest difference in a log-prob between forest and unpacked runs, float32. Rounding causes about
# 1e-5; attention to one wrong token, 0.01 or more.
SELF_CHECK_TOLERANCE = 1e-3


class UnsupportedModel(ValueError):
    """The forest would be silently wrong for this model; `--packing none` works."""

    def __init__(self, model: PreTrainedModel, reason: str):
        super().__init__(
            f"{model.config.model_type}: the packed forest cannot serve this model: {reason}. "
            "Use --packing none, which pads instead"
        )

    def __reduce__(self):
        # Pickled as text: other ranks receive it, and already have the model.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__


@dataclass(frozen=True)
class Head:
    """Turns hidden states into logits; see `rrhf_fast.losses.linear_logprob`."""

    linear: nn.Linear
    softcap: float | None
    logit_scale: float


def load_model(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    option: str = "model_name_or_path",
    **more,
) -> PreTrainedModel:
    """Load a causal LM with float32 (master) weights, without dropout. Errors name `option`; `more`
    is for transformers.

    Raises:
        ValueError: no causal language model of that name can be loaded from safetensors, or a
            weight is missing or not finite.
    """
    # dtype: transformers 5 keeps the checkpoint's, but the optimizer needs float32 weights.
    with loading(name_or_path, option):
        refuse_adapters(name_or_path, option)
        return load_pretrained(
            AutoModelForCausalLM,
            name_or_path,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            **more,
        )


def check_finite(
    model: PreTrainedModel, name_or_path: str, option: str = "model_name_or_path"
) -> None:
    """Raise ValueError with the name of the first weight that holds NaN or infinity. Each rank
    checks its own shard."""
    with loading(name_or_path, option):
        check_weights(model)


def load_tokenizer(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    option: str = "model_name_or_path",
    of_adapters: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or with `of_adapters` that of LoRA adapters. Raises ValueError
    with the option's name if there is none."""
    with loading(name_or_path, option):
        if not of_adapters:
            refuse_adapters(name_or_path, option)
        try:
            check_tokenizer_config(name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(
                name_or_path, trust_remote_code=bool(trust_remote_code)
            )
            check_tokenizer(tokenizer)
        except Exception as error:  # as damaged and foreign folders raise any type
            if not (folder := Path(name_or_path)).exists():
                raise
            problem = f"no tokenizer ({one_line(error)})"
            if not (folder / CONFIG_NAME).exists():
                problem = of_checkpoints(folder) or problem
            raise ValueError(problem) from error
        return tokenizer


def read_head(model: PreTrainedModel) -> Head:
    """The head of a causal LM. Raises `UnsupportedModel` if it is not a linear layer."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UnsupportedModel(model, f"its head is a {type(linear).__name__}, not a linear layer")
    config = model.config.get_text_config()
    return Head(
        linear=linear,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
        logit_scale=getattr(config, "logit_scale", None)  # Cohere multiplies ...
        or 1 / getattr(config, "logits_scaling", 1.0),  # ... Granite divides
    )


def max_positions(model: PreTrainedModel | PretrainedConfig) -> int | None:
    """The longest sequence the model supports, in tokens; None if its config does not say."""
    config = getattr(model, "config", model).get_text_config()
    names = ("max_position_embeddings", "n_positions")
    sizes = (getattr(config, name, None) for name in names)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)  # XLNet: -1


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Switch to this attention implementation inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_forest_support(model: PreTrainedModel, max_length: int) -> None:
    """Raise `UnsupportedModel` with the reason if the forest would be silently wrong."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if other := kinds - {"full_attention", "sliding_attention"}:
        reason = f"its layers of type {', '.join(sorted(other))} mix neighbouring tokens in a pack"
        raise UnsupportedModel(model, reason)
    if not model.base_model._supports_attention_backend:
        raise UnsupportedModel(
            model, "its attention does not go through transformers' AttentionInterface"
        )
    if rope := rope_of_longest(model, max_length):
        kind, window = rope
        reason = f"its {kind} RoPE depends on the longest row beyond {window} tokens"
        raise UnsupportedModel(model, f"{reason} (or lower --max_length to {window})")
    read_head(model)


def rope_of_longest(model: PreTrainedModel, max_length: int) -> tuple[str, int] | None:
    """The kind of RoPE that rotates by the longest row of a batch, and the length in tokens beyond
    which it does, if rows may be longer: "longrope" has two rotations, "dynamic" stretches its one,
    and remembers the longest of earlier batches."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_layer_type = all(isinstance(value, dict) for value in rope.values())
    for parameters in rope.values() if by_layer_type else [rope]:
        window = parameters.get("original_max_position_embeddings") or max_positions(model)
        if parameters.get("rope_type") in ("dynamic", "longrope") and max_length > window:
            return parameters["rope_type"], window
    return None


def check_queries(model: PreTrainedModel) -> list[TokenisedQuery]:
    """Two small queries of random tokens, with shared prefixes and a duplicate, for self-checks."""
    vocab = model.get_input_embeddings().num_embeddings
    rng = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return rng.integers(0, vocab, length, dtype=np.int32)

    prefix = draw(3)
    first = [np.append(prefix, draw(n)) for n in (4, 2, 6)] + [draw(5)]
    return [
        TokenisedQuery(draw(9), [*first, first[1]], np.arange(5, dtype=np.float32)),
        TokenisedQuery(draw(4), [draw(3), draw(7)], np.arange(2, dtype=np.float32)),
    ]


@torch.no_grad()
def self_check(model: PreTrainedModel, max_length: int) -> list[AttentionSpec]:
    """Compare a small forest with unpacked runs of eager attention; return what each layer
    requested of its attention. `max_length`: tokens of the longest row to come.

    The model must be in eval mode and hold float32 or float64 weights.

    Raises:
        UnsupportedModel: the attention function was not called once per layer, or was not passed
            the window of a layer that has one, or the log-probs differ.
    """
    queries = check_queries(model)
    pack = build_forest(queries).to(model.device)
    forest = Forest(forest_sdpa, forest_sdpa.plan(pack))
    with attention(model, FOREST), contextlib.suppress(NoForest):
        hidden = decode_forest(model, pack, forest)
    layers = model.config.get_text_config().num_hidden_layers
    if len(forest.specs) != layers:
        raise UnsupportedModel(
            model, f"its {layers} layers called the forest attention {len(forest.specs)} times"
        )
    _check_windows(model, [spec.window for spec in forest.specs], max_length)
    head = read_head(model)
    logps = reference.linear_logprob(
        hidden,
        head.linear.weight,
        pack.edge_rows,
        pack.edge_targets,
        bias=head.linear.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )[pack.path_edges]
    with attention(model, "eager"):
        unpacked = torch.cat(
            [
                reference.response_logps(model, _ids(query.prompt_ids, model), _ids(ids, model))
                for query in queries
                for ids in query.response_ids
            ]
        )
    difference = (logps - unpacked).abs().max().item()
    if not difference <= SELF_CHECK_TOLERANCE:
        raise UnsupportedModel(
            model, f"a small forest gave log-probs {difference:.2g} away from unpacked runs"
        )
    return forest.specs


def _check_windows(model: PreTrainedModel, windows: list[int | None], max_length: int) -> None:
    """Check that layers pass their window on. Rows of the self-check are shorter than a real
    window, so its log-probs cannot reveal a decoder that builds the window into a mask instead."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if (
        window is None
        or window >= max_length
        or getattr(config, "use_sliding_window", True) is False
    ):
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(windows)
    expected = kinds.count("sliding_attention")
    passed = sum(width is not None for width in windows)
    if passed != expected:
        reason = f"{expected} of its layers see {window} tokens, but {passed} pass the window on"
        raise UnsupportedModel(model, f"{reason} (or lower --max_length to {window})")


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raise ValueError if a token's logits depend on the tokens to its right."""
    vocab = model.get_input_embeddings().num_embeddings
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (1, 8))).to(model.device)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocab
    one, other = (model(input_ids=row, use_cache=False).logits[:, :-1] for row in (ids, changed))
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{model.config.model_type}: a token sees the tokens to its right, so this is not a "
            "causal language model"
        )


def decode_forest(model: PreTrainedModel, pack: PackedForest, forest: Forest) -> torch.Tensor:
    """Hidden states [N, H] of a packed forest. The model must use `FOREST` attention."""
    output = model.base_model(
        input_ids=pack.input_ids[None],
        position_ids=pack.position_ids[None],
        use_cache=False,
        forest=forest,
    )
    return output.last_hidden_state[0]


def _ids(ids: np.ndarray, model: PreTrainedModel) -> torch.Tensor:
    return torch.from_numpy(ids).long().to(model.device)


def inference_dtype(name: str) -> torch.dtype:
    """The torch dtype for a name; "auto" is bfloat16 on a GPU that supports it, else float32."""
    if name == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)
