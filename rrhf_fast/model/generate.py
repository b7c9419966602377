"""Generate responses in batches: greedy, beam, diverse beam and random sampling."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from rrhf_fast.model.decoder import rope_of_longest
from rrhf_fast.model.diverse_beam import cache_name, diverse_beam_search

# How far rounding may move logits, as a share of their size. In small models it moved them by 1e-6
# in float32 and 3e-3 in bfloat16, padding that counts as text by .1 to 1, and rows that change each
# other by .6.
_BY_PADDING, _BY_ROWS = {torch.float32: 0.01}, 0.3
_LEFT = 8  # tokens of padding to try
_batchings: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Decoding:
    """How to decode; `rrhf_fast.sample.Policy` has these fields too, and explains them."""

    max_new_tokens: int
    method: str = "sample"
    count: int = 1  # responses per prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float = 1.0


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the items in batches of similar length, shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def generate_batch(
    lm: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    policy: Decoding,
    *,
    max_length: int | None = None,
    end_token_ids: list[int],
    pad_token_id: int,
    stop_strings: list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[np.ndarray]]:
    """Generate `policy.count` responses per prompt, best first for beams; sampling draws from
    torch's global generator.

    Args:
        lm: a causal LM in eval mode, with an attention that generates (not the forest's).
        prompts: int arrays [P_i] of token ids.
        max_length: tokens of the model's window, which prompt and response share; the longest
            prompt sets the limit for all.
        end_token_ids: tokens that end a response.
        stop_strings, tokenizer: decoding stops after these strings (ignored by beam searches).

    Returns:
        Per prompt, int64 arrays [R], up to and including the end token, if any.
    """
    width = max(len(ids) for ids in prompts)
    batching = "padding"
    if policy.count * len(prompts) > 1 or policy.num_beams:
        batching = _batching(lm, max_length)
    options = {"max_length": max_length, "end_token_ids": end_token_ids}
    options |= {"pad_token_id": pad_token_id, "stop_strings": stop_strings, "tokenizer": tokenizer}
    if batching == "nothing" and policy.method in ("sample", "greedy"):
        names = ("max_new_tokens", "method", "temperature", "top_p", "top_k")
        one = Decoding(**{name: getattr(policy, name) for name in names})
        return [
            [generate_batch(lm, [ids], one, **options)[0][0] for _ in range(policy.count)]
            for ids in prompts
        ]
    if batching == "nothing":
        kind = lm.config.model_type
        raise ValueError(
            f"{policy.method}: the rows of a batch of {kind} change each other (use sample)"
        )
    if any(len(ids) < width for ids in prompts) and (
        batching == "equal" or rope_of_longest(lm, width + policy.max_new_tokens)
    ):
        responses = [[] for _ in prompts]
        for length in sorted({len(ids) for ids in prompts}):
            places = [place for place, ids in enumerate(prompts) if len(ids) == length]
            equal = generate_batch(lm, [prompts[place] for place in places], policy, **options)
            for place, some in zip(places, equal, strict=True):
                responses[place] = some
        return responses
    tokens = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):  # padded on the left: generation continues on the right
        tokens[row, width - len(ids) :] = torch.from_numpy(ids)
        mask[row, width - len(ids) :] = 1
    inputs = {"input_ids": tokens.to(lm.device), "attention_mask": mask.to(lm.device)}
    room = policy.max_new_tokens if max_length is None else max_length - width
    max_new_tokens = min(policy.max_new_tokens, room)
    num_beams = policy.num_beams or policy.count

    if policy.method == "diverse_beam":
        out, _ = diverse_beam_search(
            lm,
            **inputs,
            num_beams=num_beams,
            num_beam_groups=policy.num_beam_groups or num_beams,
            diversity_penalty=policy.diversity_penalty,
            temperature=policy.temperature,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_token_ids,
            pad_token_id=pad_token_id,
            num_return_sequences=policy.count,
        )
    else:
        options = {}
        if policy.method == "sample":
            options = {"do_sample": True, "temperature": policy.temperature}
            options |= {"top_p": policy.top_p, "top_k": policy.top_k}
        elif policy.method == "beam":
            if hasattr(lm, "_setup_cache"):  # in its layers, where no beam search reorders it
                kind = lm.config.model_type
                raise ValueError(f"beam: the cache of {kind} cannot follow beams (use sample)")
            options = {"num_beams": num_beams}
        settings = GenerationConfig(
            **options,
            max_new_tokens=max_new_tokens,
            num_return_sequences=policy.count,
            eos_token_id=end_token_ids,
            pad_token_id=pad_token_id,
            use_cache=True,
        )
        copies = num_beams if policy.method == "beam" else policy.count
        cache = _encode_once(lm, **inputs, copies=copies) if copies > 1 and width > 1 else None
        options = {"generation_config": settings}
        if stop_strings and policy.method != "beam":
            stop = _StopStrings(StopStringCriteria(tokenizer, stop_strings), width)
            options["stopping_criteria"] = StoppingCriteriaList([stop])
        if cache is not None:
            options[cache_name(lm)] = cache
        out = _generate(lm, **inputs, **options)[:, width:]
    responses = out.reshape(len(prompts), policy.count, -1).cpu().numpy()
    return [[_until_end(ids, end_token_ids) for ids in row] for row in responses]


def _generate(lm: PreTrainedModel, **options) -> torch.Tensor | ModelOutput:
    """`lm.generate` as these options say, not the checkpoint (temperature, penalties)."""
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        # Each rank holds whole weights here (`gathered`), and may have more batches than others, or
        # none: transformers would make it wait for them.
        return lm.generate(**options, synced_gpus=False)
    finally:
        lm.generation_config = own


def _batching(lm: PreTrainedModel, max_length: int | None) -> str:
    """What rows of a batch may have without changing each other: any "padding" on the left, "equal"
    lengths, or "nothing". RecurrentGemma and XLNet count padding as text, whatever the attention
    mask says; the rows of RWKV change each other."""
    if max_length is not None and max_length < 6:
        return "equal"  # no room to try
    if lm not in _batchings:
        vocab = lm.get_input_embeddings().num_embeddings
        rows = torch.arange(8, device=lm.device).reshape(2, 4) % vocab
        alone = [_trial(lm, row[None], 0)[0] for row in rows]
        moved = [_distance(*pair) for pair in zip(alone, _trial(lm, rows, 0), strict=True)]
        if max(moved) > _BY_ROWS:
            _batchings[lm] = "nothing"
        elif max_length is not None and max_length < 6 + _LEFT:
            return "equal"
        else:
            kind = torch.bfloat16 if torch.is_autocast_enabled(lm.device.type) else lm.dtype
            moved = _distance(alone[0], _trial(lm, rows[:1], _LEFT)[0])
            _batchings[lm] = "equal" if moved > _BY_PADDING.get(kind, 0.05) else "padding"
    return _batchings[lm]


def _trial(lm: PreTrainedModel, tokens: torch.Tensor, left: int) -> torch.Tensor:
    """[B, 2, V]: the logits of two greedy tokens after these [B, T], with padding on the left."""
    settings = GenerationConfig(
        max_new_tokens=2, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    found = _generate(
        lm,
        input_ids=F.pad(tokens, (left, 0)),
        attention_mask=F.pad(torch.ones_like(tokens), (left, 0)),
        generation_config=settings,
    )
    return torch.stack(found.logits, 1)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Between two rows of logits, as a share of their size."""
    return float((one - other).norm() / (one - one.mean()).norm())


class _StopStrings(StoppingCriteria):
    """Stops a response that contains a stop string; one that its prompt begins does not count."""

    def __init__(self, criteria: StopStringCriteria, prompt_length: int):
        self.criteria, self.prompt_length = criteria, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.criteria(input_ids[:, self.prompt_length :], scores, **kwargs)


def _encode_once(
    lm: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, copies: int
) -> Cache | None:
    """The cache of each prompt without its last token, repeated for its responses: `generate`
    alone would encode the prompt once per response. None for models without a cache, or whose cache
    is not one of keys and values only, such as those with a recurrent state."""
    if cache_name(lm) not in inspect.signature(lm.forward).parameters:
        return None
    mask = attention_mask[:, :-1]
    cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    lm(
        input_ids=input_ids[:, :-1],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        **{cache_name(lm): cache},
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(copies)
    return cache


def _until_end(ids: np.ndarray, end_token_ids: list[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(ids, end_token_ids))
    return ids[: ends[0] + 1] if len(ends) else ids


def own_end_token_ids(generation_config: GenerationConfig | None) -> list[int]:
    """The tokens at which a checkpoint's generation_config.json ends a response; its tokenizer
    knows one of them. A single one that only repeats the model's config does not count, where it
    may be a default that nobody chose."""
    ends = getattr(generation_config, "eos_token_id", None)
    if isinstance(ends, int):
        ends = [] if generation_config._from_model_config else [ends]
    return [token for token in ends or [] if token >= 0]  # -1: none


def sample_responses(
    lm: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    max_length: int | None = None,
    end_token_ids: list[int],
    pad_token_id: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Sample one response per prompt, in their order; other arguments as for `generate_batch`.

    Args:
        seed: seeds this call alone; the caller's random state is preserved.
        batch_size: prompts decoded at once; batches hold prompts of similar length.
    """
    policy = Decoding(max_new_tokens, temperature=temperature, top_p=top_p)
    responses: list[np.ndarray | None] = [None] * len(prompts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches_by_length([len(ids) for ids in prompts], batch_size):
            generated = generate_batch(
                lm,
                [prompts[i] for i in batch],
                policy,
                max_length=max_length,
                end_token_ids=end_token_ids,
                pad_token_id=pad_token_id,
            )
            for i, (response,) in zip(batch, generated, strict=True):
                responses[i] = response
    return responses
