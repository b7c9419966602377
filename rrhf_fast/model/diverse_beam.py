"""Diverse (group) beam search: Vijayakumar et al. 2016, arXiv 1610.02424.

The `num_beams` beams are split into groups of equal width. At every step the groups choose their
tokens one after the other, and a group sees the log-prob of a token lowered by `diversity_penalty`
for every beam of an earlier group that has just chosen it (the paper's Hamming diversity).
transformers dropped this search in version 5.

What a score holds. As in the releases of transformers that had the search, the penalised log-probs
are accumulated: a beam keeps the penalties it has paid, and a hypothesis' score is

    (sum over its tokens, the end token included, of log-prob - penalty) / n_tokens**length_penalty

so it is a log-prob only for the first group, or with `diversity_penalty=0`. Score the tokens with
the model again to get log-probs.

When it stops. Each group of each prompt runs like `generate(num_beams=width, do_sample=False,
early_stopping=False)`: it is done once it holds `width` finished hypotheses and the best running
beam, divided by its present length**length_penalty, beats none of them. A finished hypothesis must
rank among the best `width` continuations of its step; a beam cut off at `max_new_tokens` counts as
finished. The tokens a group chooses are those of its running beams: a group that is done penalises
nothing, and as finished hypotheses leave the beam, end tokens are never penalised.
"""

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
    """Search the best continuations of each prompt, group by group.

    model           a Hugging Face causal LM, in eval mode, whose cache can be reordered
    input_ids       [B, P] int64, prompts padded on the left
    attention_mask  [B, P] 1 for prompt tokens, 0 for padding
    temperature     divides the logits before the softmax; beam search itself stays deterministic

    Returns tokens [B, R, T] int64 and scores [B, R] (fp32, fp64 for an fp64 model), best first over
    all groups, where R is `num_return_sequences` (default: all beams) and T the longest returned.
    Tokens hold no prompt, keep their end token and are padded on the right with `pad_token_id`.

    Raises ValueError for sizes that do not fit together, for prompts not padded on the left and for
    values out of range.
    """
    eos = sorted({eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id))
    num_return = num_beams if num_return_sequences is None else num_return_sequences
    _check(
        input_ids,
        attention_mask,
        num_beams,
        num_beam_groups,
        diversity_penalty,
        max_new_tokens,
        eos,
        temperature,
    )
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return_sequences must be in [1, {num_beams}], got {num_return}")

    device, batch = input_ids.device, input_ids.shape[0]
    groups, width = num_beam_groups, num_beams // num_beam_groups
    eos_ids = torch.tensor(eos, device=device)
    # `width` beams can end in len(eos) ways each: this many candidates leave `width` to go on with.
    keep = (1 + len(eos)) * width

    # The prompt is encoded once; only its cache is copied for the beams.
    mask = attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(num_beams)
    mask = mask.repeat_interleave(num_beams, 0)
    position = positions[:, -1:].repeat_interleave(num_beams, 0)
    logits = out.logits[:, -1].repeat_interleave(num_beams, 0)
    vocab = logits.shape[-1]
    if vocab < keep:
        raise ValueError(
            f"{width} beams a group with {len(eos)} end tokens need a vocabulary of {keep}, "
            f"got {vocab}"
        )

    dtype = torch.promote_types(logits.dtype, torch.float32)
    shape = (batch, groups, width)
    tokens = input_ids.new_full((*shape, max_new_tokens), pad_token_id)  # running beams
    scores = torch.full(shape, -torch.inf, dtype=dtype, device=device)
    scores[:, :, 0] = 0  # all beams of a group are equal at first: let one of them speak
    done_tokens = tokens.clone()  # finished hypotheses; a score of -inf marks an empty place
    done_scores = torch.full_like(scores, -torch.inf)
    active = torch.ones(batch, groups, dtype=torch.bool, device=device)
    first_beam = torch.arange(batch, device=device)[:, None] * num_beams
    # The flat index of the beam that each one grew from.
    parents = torch.zeros(shape, dtype=torch.int64, device=device)

    for step in range(max_new_tokens):
        logp = (logits.to(dtype) / temperature).log_softmax(-1).view(batch, groups, width, vocab)
        counts = logp.new_zeros(
            batch, vocab
        )  # how often earlier groups chose each token at this step
        length_norm = (step + 1) ** length_penalty
        for g in range(groups):
            total = scores[:, g, :, None] + logp[:, g] - diversity_penalty * counts[:, None]
            value, index = total.flatten(1).topk(keep)  # [B, keep], best first
            parent, token = index // vocab, index % vocab
            grown = _select(tokens[:, g], parent)
            grown[:, :, step] = token
            ends = torch.isin(token, eos_ids)

            # Finished hypotheses: the best `width` of the old ones and those that end now.
            counted = (ends | (step + 1 == max_new_tokens)) & active[:, g, None]
            counted[:, width:] = False
            pool = torch.cat(
                [done_scores[:, g], (value / length_norm).masked_fill(~counted, -torch.inf)], 1
            )
            done_scores[:, g], best = pool.topk(width)
            done_tokens[:, g] = _select(torch.cat([done_tokens[:, g], grown], 1), best)

            # Running beams: the best `width` continuations that do not end.
            scores[:, g], best = value.masked_fill(ends, -torch.inf).topk(width)
            tokens[:, g] = _select(grown, best)
            parents[:, g] = first_beam + g * width + parent.gather(1, best)
            chosen = token.gather(1, best)
            counts.scatter_add_(1, chosen, active[:, g, None].to(dtype).expand_as(chosen))

            active[:, g] &= scores[:, g, 0] / length_norm > done_scores[:, g].amin(1)
        if step + 1 == max_new_tokens or not active.any():
            break

        cache.reorder_cache(parents.flatten())
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        out = model(
            input_ids=tokens[..., step].reshape(-1, 1),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]

    done_scores, best = done_scores.flatten(1).sort(dim=1, descending=True, stable=True)
    found = _select(done_tokens.flatten(1, 2), best[:, :num_return])
    return _crop(found, eos_ids), done_scores[:, :num_return]


def _select(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows [B, M, T] of tokens [B, N, T] named by index [B, M]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def _crop(tokens: Tensor, eos_ids: Tensor) -> Tensor:
    """Cut tokens [B, R, T] after the longest row. A row without an end token fills all of T."""
    is_end = torch.isin(tokens, eos_ids)
    lengths = torch.where(is_end.any(-1), is_end.int().argmax(-1) + 1, tokens.shape[-1])
    return tokens[..., : int(lengths.max())]


def _check(
    input_ids,
    attention_mask,
    num_beams,
    num_beam_groups,
    diversity_penalty,
    max_new_tokens,
    eos,
    temperature,
):
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids must be [batch, length] and not empty, got shape {tuple(input_ids.shape)}"
        )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} does not match "
            f"input_ids {tuple(input_ids.shape)}"
        )
    if not attention_mask[:, -1].all() or (attention_mask.diff(dim=1) < 0).any():
        raise ValueError(
            "prompts must be padded on the left: attention_mask rows must look like 0..0 1..1"
        )
    if num_beams < 1 or num_beam_groups < 1 or num_beams % num_beam_groups:
        raise ValueError(
            f"num_beams ({num_beams}) must be a multiple of num_beam_groups ({num_beam_groups})"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if diversity_penalty < 0:
        raise ValueError(f"diversity_penalty must not be negative, got {diversity_penalty}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not eos:
        raise ValueError("eos_token_id must name at least one token")
