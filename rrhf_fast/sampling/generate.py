"""Fresh responses of a model: temperature and top-p sampling with transformers' generate()."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
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
    """One sampled response for each prompt.

    Args:
        lm: a causal LM with an attention that generates (not the forest's), in eval mode.
        prompts: int arrays [P_i] of token ids.
        max_new_tokens: tokens a response may have, its end token included.
        max_length: tokens that the model's window holds; the longest prompt of a batch decides.
        end_token_ids: tokens that end a response.
        seed: of this call; the caller's random state is left as it was.
        batch_size: prompts decoded at once; batches hold prompts of like length.

    Returns:
        Int64 arrays [R_i] in the order of the prompts, up to and including the end token if there
        is one.
    """
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        eos_token_id=end_token_ids,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    responses: list[np.ndarray | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), width), pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(
                chosen
            ):  # padded on the left: generation goes on at the right end
                ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            room = max_new_tokens if max_length is None else max_length - width
            settings.max_new_tokens = min(max_new_tokens, room)
            out = lm.generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=settings,
            )
            for i, tokens in zip(chosen, out[:, width:].cpu().numpy(), strict=True):
                ends = np.flatnonzero(np.isin(tokens, end_token_ids))
                responses[i] = tokens[: ends[0] + 1] if len(ends) else tokens
    return responses
