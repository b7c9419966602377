"""Diverse beam search against transformers' beam search and an independent slow search."""

import random
from collections import Counter

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rrhf_fast.model.diverse_beam import diverse_beam_search

VOCAB, PAD = 23, 1


def tiny_model(kind, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCAB, "initializer_range": 0.6}
    shared |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": PAD}
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **shared,
        )
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **shared)
        )
    return model.to(dtype).eval()


def left_padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def random_prompts(rng, count=3):
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(count)]


def until_end(tokens, eos):
    """A padded row as a list up to and including its first end token."""
    out = []
    for token in tokens.tolist():
        out.append(token)
        if token in eos:
            break
    return out


def slow_search(
    model, prompt, *, width, groups, penalty, max_new, eos, temperature, length_penalty
):
    """The search as its docstring defines it, for one prompt and without a cache."""

    def log_probs(tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double()
        return (logits / temperature).log_softmax(-1).tolist()

    running = [[([], 0.0)] for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    is_done = [False] * groups
    for n in range(1, max_new + 1):
        chosen = Counter()
        for g in range(groups):
            if is_done[g]:
                continue
            grown = []
            for tokens, score in running[g]:
                for token, logp in enumerate(log_probs(tokens)):
                    grown.append(([*tokens, token], score + logp - penalty * chosen[token]))
            grown.sort(key=lambda item: -item[1])
            for tokens, score in grown[:width]:
                if tokens[-1] in eos or n == max_new:
                    finished[g].append((tokens, score / n**length_penalty))
            finished[g] = sorted(finished[g], key=lambda item: -item[1])[:width]
            running[g] = [item for item in grown if item[0][-1] not in eos][:width]
            chosen.update(tokens[-1] for tokens, _ in running[g])
            best_running = running[g][0][1] / n**length_penalty
            is_done[g] = len(finished[g]) == width and best_running <= finished[g][-1][1]
    return sorted((item for group in finished for item in group), key=lambda item: -item[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_one_group_is_transformers_beam_search(kind, dtype, seed):
    rng = random.Random(seed)
    model = tiny_model(kind, seed, dtype)
    ids, mask = left_padded(random_prompts(rng))
    beams, max_new = rng.randint(1, 5), rng.randint(1, 12)
    # With one beam, `generate` switches to greedy search, which returns no scores.
    beams = max(beams, 2)
    length_penalty = rng.choice([0.0, 0.5, 1.0, 2.0])
    eos = rng.choice([[2], [2, 5], [2, 5, 9]])
    want = model.generate(
        ids,
        attention_mask=mask,
        num_beams=beams,
        do_sample=False,
        early_stopping=False,
        max_new_tokens=max_new,
        length_penalty=length_penalty,
        eos_token_id=eos,
        pad_token_id=PAD,
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens, scores = diverse_beam_search(
        model,
        ids,
        mask,
        num_beams=beams,
        num_beam_groups=1,
        diversity_penalty=0.0,
        max_new_tokens=max_new,
        eos_token_id=eos,
        pad_token_id=PAD,
        length_penalty=length_penalty,
    )
    want_tokens = want.sequences[:, ids.shape[1] :]
    assert tokens.flatten(0, 1).tolist() == want_tokens.tolist()
    torch.testing.assert_close(
        scores.flatten().float(), want.sequences_scores, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(20))
def test_equals_slow_search(kind, seed):
    rng = random.Random(100 + seed)
    model = tiny_model(kind, seed)
    prompts = random_prompts(rng)
    groups, width = rng.randint(1, 4), rng.randint(1, 3)
    setting = dict(
        temperature=rng.choice([0.8, 1.0, 1.5]),
        length_penalty=rng.choice([0.0, 0.5, 1.0, 2.0]),
    )
    penalty, max_new, eos = (
        rng.choice([0.0, 0.3, 1.0, 4.0]),
        rng.randint(1, 9),
        rng.choice([[2], [2, 5]]),
    )
    count = rng.randint(1, groups * width)
    tokens, scores = diverse_beam_search(
        model,
        *left_padded(prompts),
        num_beams=groups * width,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        max_new_tokens=max_new,
        eos_token_id=eos,
        pad_token_id=PAD,
        num_return_sequences=count,
        **setting,
    )
    assert scores.dtype == torch.float64 and tokens.shape[:2] == scores.shape == (
        len(prompts),
        count,
    )
    longest = 0
    for b, prompt in enumerate(prompts):
        want = slow_search(
            model,
            prompt,
            width=width,
            groups=groups,
            penalty=penalty,
            max_new=max_new,
            eos=eos,
            **setting,
        )[:count]
        torch.testing.assert_close(
            scores[b], torch.tensor([s for _, s in want], dtype=torch.float64)
        )
        got = [until_end(row, eos) for row in tokens[b]]
        if penalty or groups == 1:
            assert got == [t for t, _ in want]
        else:  # all groups find the same beams, so the order of equal scores may differ
            assert sorted(got) == sorted(t for t, _ in want)
        longest = max(longest, *map(len, got))
        for row, kept in zip(tokens[b], got, strict=True):
            assert (row[len(kept) :] == PAD).all()
    assert tokens.shape[2] == longest


def test_scores_of_the_first_group_are_log_probs_and_later_ones_pay():
    model = tiny_model("llama", 0)
    ids, mask = left_padded([[4, 5, 6]])
    tokens, scores = diverse_beam_search(
        model,
        ids,
        mask,
        num_beams=2,
        num_beam_groups=2,
        diversity_penalty=1.0,
        max_new_tokens=1,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    logp = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    later = logp.clone()
    later[logp.argmax()] -= 1.0
    want = sorted([logp.max().item(), later.max().item()], reverse=True)
    assert logp.argmax() != 2  # end tokens are never penalised
    torch.testing.assert_close(scores[0], torch.tensor(want, dtype=torch.float64))
    assert tokens[0, :, 0].tolist() == [logp.argmax(), later.argmax()]


def test_penalty_makes_groups_differ():
    model = tiny_model("llama", 3)
    ids, mask = left_padded([[4, 5, 6], [7]])
    setting = dict(
        num_beams=4, num_beam_groups=4, max_new_tokens=6, eos_token_id=2, pad_token_id=PAD
    )
    same, _ = diverse_beam_search(model, ids, mask, diversity_penalty=0.0, **setting)
    apart, _ = diverse_beam_search(model, ids, mask, diversity_penalty=100.0, **setting)
    for b in range(2):
        assert len({tuple(row.tolist()) for row in same[b]}) == 1
        assert len(set(apart[b, :, 0].tolist())) == 4  # all different


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_beam_groups=3), "multiple"),
        (dict(num_beam_groups=0), "multiple"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(diversity_penalty=-1.0), "diversity_penalty"),
        (dict(temperature=0.0), "temperature"),
        (dict(eos_token_id=[]), "eos_token_id"),
        (dict(num_return_sequences=5), "num_return_sequences"),
        (dict(num_beams=12, num_beam_groups=1), "vocabulary"),
        (dict(attention_mask=torch.tensor([[1, 1, 0]])), "left"),
        (dict(attention_mask=torch.ones(1, 2, dtype=torch.long)), "attention_mask"),
        (dict(input_ids=torch.ones(3, dtype=torch.long)), "input_ids"),
    ],
)
def test_bad_arguments_raise(change, message):
    ids, mask = left_padded([[4, 5, 6]])
    arguments = dict(
        input_ids=ids,
        attention_mask=mask,
        num_beams=4,
        num_beam_groups=2,
        diversity_penalty=1.0,
        max_new_tokens=3,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    with pytest.raises(ValueError, match=message):
        diverse_beam_search(tiny_model("llama", 0), **(arguments | change))
