"""Diverse (group) beam search: Vijayakumar et al. 2016, arXiv 1610.02424.

The `num_beams` beams are split into groups of equal width. At every step the groups choose their
tokens in turn: for each group, a token's log-prob is lowered by `diversity_penalty` per beam of an
earlier group that has just chosen it (the paper's Hamming diversity). transformers dropped this
search in version 5.

Scores. As in the releases of transformers that had the search, penalised log-probs accumulate: a
beam keeps its past penalties, and the score of a hypothesis is

    (sum over its tokens, the end token included, of log-prob - penalty) / n_tokens**length_penalty

so it is a log-prob only for the first group, or with `diversity_penalty=0`. For log-probs, score
the tokens with the model again.

Stopping. Each group of each prompt runs like `generate(num_beams=width, do_sample=False,
early_stopping=False)`: it is done once it holds `width` finished hypotheses and the best running
beam, divided by its current length**length_penalty, beats none of them. A finished hypothesis must
rank among the best `width` continuations of its step; a beam cut off at `max_new_tokens` counts as
finished. A group's choices are the tokens of its running beams: a group that is done penalises
nothing, and since finished hypotheses leave the beam, end tokens are never penalised.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor


@torch.no_grad()
def diverse_beam_search(
    model,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    max_new_tokens: int,
    eos_token_id: int | list[int],
    pad_token_id: int,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    num_return_sequences: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Search for the best continuations of each prompt, group by group.

    model           a Hugging Face causal LM, in eval mode, whose cache can be reordered
    input_ids       [B, P] int64, prompts padded on the left
    attention_mask  [B, P] 1 for prompt tokens, 0 for padding
    temperature     divides the logits before the softmax; the search stays deterministic

    Returns tokens [B, R, T] int64 and scores [B, R] (fp32, fp64 for an fp64 model), best first over
    all groups, where R is `num_return_sequences` (default: all beams) and T the longest returned.
    Tokens exclude the prompt, keep the end token and are padded on the right with `pad_token_id`.

    Raises ValueError for mismatched sizes, prompts not padded on the left and values out of range.
    """
    eos = sorted({eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id))
    num_return = num_beams if num_return_sequences is None else num_return_sequences
    _check_prompts(input_ids, attention_mask)
    _check_sizes(num_beams, num_beam_groups, num_return, max_new_tokens)
    _check_scoring(diversity_penalty, temperature, eos)

    device, batch = input_ids.device, input_ids.shape[0]
    groups, width = num_beam_groups, num_beams // num_beam_groups
    eos_ids = torch.tensor(eos, device=device)
    logits, cache, mask, position = _encode_prompts(model, input_ids, attention_mask, num_beams)
    vocab = logits.shape[-1]
    if vocab < (needed := (1 + len(eos)) * width):
        problem = f"{width} beams per group with {len(eos)} end tokens need a vocabulary of"
        raise ValueError(f"{problem} {needed}, got {vocab}")

    dtype = torch.promote_types(logits.dtype, torch.float32)
    beams = _empty_beams(input_ids, (batch, groups, width), max_new_tokens, pad_token_id, dtype)
    first_beam = torch.arange(batch, device=device)[:, None] * num_beams
    # The flat index of each beam's predecessor.
    parents = torch.zeros(batch, groups, width, dtype=torch.int64, device=device)

    for step in range(max_new_tokens):
        logp = (logits.to(dtype) / temperature).log_softmax(-1).view(batch, groups, width, vocab)
        counts = logp.new_zeros(batch, vocab)  # choices of each token by earlier groups
        length_norm = (step + 1) ** length_penalty
        for g in range(groups):
            total = beams.scores[:, g, :, None] + logp[:, g] - diversity_penalty * counts[:, None]
            parent, chosen = beams.extend(g, step, total, eos_ids, length_norm)
            parents[:, g] = first_beam + g * width + parent
            counts.scatter_add_(1, chosen, beams.active[:, g, None].to(dtype).expand_as(chosen))
            worst_done = beams.done_scores[:, g].amin(1)
            beams.active[:, g] &= beams.scores[:, g, 0] / length_norm > worst_done
        if step + 1 == max_new_tokens or not beams.active.any():
            break

        cache.reorder_cache(parents.flatten())
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        logits = model(
            input_ids=beams.tokens[..., step].reshape(-1, 1),
            attention_mask=mask,
            position_ids=position,
            use_cache=True,
            **{cache_name(model): cache},
        ).logits[:, -1]

    scores, best = beams.done_scores.flatten(1).sort(dim=1, descending=True, stable=True)
    tokens = _select(beams.done_tokens.flatten(1, 2), best[:, :num_return])
    return _crop(tokens, eos_ids), scores[:, :num_return]


def _encode_prompts(model, input_ids: Tensor, attention_mask: Tensor, num_beams: int):
    """Encode each prompt once and copy its cache for the beams. Returns the next token's logits
    [B * num_beams, V], the cache, the mask and the last position."""
    mask = attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    try:
        cache = getattr(out, cache_name(model))
        cache.batch_repeat_interleave(num_beams)
    except (AttributeError, IndexError) as error:  # of recurrent states
        kind = model.config.model_type
        problem = f"diverse_beam: the cache of {kind} cannot be copied for beams (use sample)"
        raise ValueError(problem) from error
    last = (out.logits[:, -1], mask, positions[:, -1:])
    logits, mask, position = (tensor.repeat_interleave(num_beams, 0) for tensor in last)
    return logits, cache, mask, position


def cache_name(model) -> str:
    """What the model calls its cache: `cache` from transformers 5.24 on, `past_key_values` before
    and in code that models bring along."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@dataclass
class _Beams:
    """Beams of B prompts in G groups of W, with up to T new tokens."""

    tokens: Tensor  # [B, G, W, T] running beams
    scores: Tensor  # [B, G, W] best first
    done_tokens: Tensor  # [B, G, W, T] finished hypotheses
    done_scores: Tensor  # [B, G, W] -inf marks an empty slot
    active: Tensor  # [B, G] whether the group is still searching

    def extend(
        self, g: int, step: int, total: Tensor, eos_ids: Tensor, length_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Give each beam of group g its token at `step`, by the scores `total` [B, W, V] of all
        continuations. Returns the beams' parents in the group and their tokens, [B, W] each."""
        width, vocab = total.shape[1:]
        # Each beam can end in len(eos_ids) ways: this many candidates leave `width` that do not.
        value, index = total.flatten(1).topk((1 + len(eos_ids)) * width)  # best first
        parent, token = index // vocab, index % vocab
        grown = _select(self.tokens[:, g], parent)
        grown[:, :, step] = token
        ends = torch.isin(token, eos_ids)

        # Finished hypotheses: the best `width` of the old ones and those that end now.
        counted = (ends | (step + 1 == grown.shape[-1])) & self.active[:, g, None]
        counted[:, width:] = False
        new_scores = (value / length_norm).masked_fill(~counted, -torch.inf)
        pool = torch.cat([self.done_scores[:, g], new_scores], 1)
        self.done_scores[:, g], best = pool.topk(width)
        self.done_tokens[:, g] = _select(torch.cat([self.done_tokens[:, g], grown], 1), best)

        # Running beams: the best `width` continuations that do not end.
        self.scores[:, g], best = value.masked_fill(ends, -torch.inf).topk(width)
        self.tokens[:, g] = _select(grown, best)
        return parent.gather(1, best), token.gather(1, best)


def _empty_beams(
    input_ids: Tensor, shape: tuple[int, int, int], length: int, pad: int, dtype: torch.dtype
) -> _Beams:
    tokens = input_ids.new_full((*shape, length), pad)
    scores = torch.full(shape, -torch.inf, dtype=dtype, device=input_ids.device)
    done_scores = scores.clone()
    scores[:, :, 0] = 0  # a group's beams start out equal: only the first may grow
    active = torch.ones(shape[:2], dtype=torch.bool, device=input_ids.device)
    return _Beams(tokens, scores, tokens.clone(), done_scores, active)


def _select(tokens: Tensor, index: Tensor) -> Tensor:
    """Select rows [B, M, T] of tokens [B, N, T] by index [B, M]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def _crop(tokens: Tensor, eos_ids: Tensor) -> Tensor:
    """Cut tokens [B, R, T] to the longest row. A row without an end token fills all of T."""
    is_end = torch.isin(tokens, eos_ids)
    lengths = torch.where(is_end.any(-1), is_end.int().argmax(-1) + 1, tokens.shape[-1])
    return tokens[..., : int(lengths.max())]


def _check_prompts(input_ids: Tensor, attention_mask: Tensor) -> None:
    shape, mask_shape = tuple(input_ids.shape), tuple(attention_mask.shape)
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [batch, length] and not empty, got shape {shape}")
    if mask_shape != shape:
        raise ValueError(f"attention_mask {mask_shape} does not match input_ids {shape}")
    if not attention_mask[:, -1].all() or (attention_mask.diff(dim=1) < 0).any():
        raise ValueError(
            "prompts must be padded on the left: attention_mask rows must look like 0..0 1..1"
        )


def _check_sizes(num_beams: int, num_groups: int, num_return: int, max_new_tokens: int) -> None:
    if num_beams < 1 or num_groups < 1 or num_beams % num_groups:
        raise ValueError(
            f"num_beams ({num_beams}) must be a multiple of num_beam_groups ({num_groups})"
        )
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return_sequences must be in [1, {num_beams}], got {num_return}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _check_scoring(diversity_penalty: float, temperature: float, eos: list[int]) -> None:
    if diversity_penalty < 0:
        raise ValueError(f"diversity_penalty must not be negative, got {diversity_penalty}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not eos:
        raise ValueError("eos_token_id must name at least one token")
