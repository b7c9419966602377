"""Prompts are encoded once for all of their responses, with the results of plain `generate`."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rrhf_fast.model.generate import Decoding, generate_batch
from tests.model.test_families import REFUSED, SIZES, SUPPORTED, VOCAB, tiny_model

COUNT, NEW = 3, 6
# Of unequal lengths, one longer than the families' windows, one without anything to encode early.
LENGTHS = (11, 1, 7)
FAMILIES = SUPPORTED | {kind: sizes for kind, (sizes, _) in REFUSED.items()}
# They count padding as text.
BLIND_TO_MASKS = {
    "rwkv": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
    "recurrent_gemma": SIZES | {"lru_width": 32, "head_dim": 8},
    "xlnet": {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}
FAMILIES["qwen3_next"] = FAMILIES["qwen3_next"] | {"num_hidden_layers": 4}  # the last attends


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB, length) for length in LENGTHS]


def generate(lm, method: str, prompts) -> list:
    torch.manual_seed(5)
    policy = Decoding(NEW, method, COUNT, num_beams=COUNT if method == "beam" else None)
    return generate_batch(lm, prompts, policy, end_token_ids=[2], pad_token_id=0)


def plain(lm, method: str, prompts) -> list:
    """By transformers alone, which encodes a prompt once per response."""
    torch.manual_seed(5)
    width = max(LENGTHS)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
    kind = {"num_beams": COUNT} if method == "beam" else {"do_sample": True, "top_k": 0}
    settings = GenerationConfig(
        **kind, num_return_sequences=COUNT, max_new_tokens=NEW, eos_token_id=[2], pad_token_id=0
    )
    out = lm.generate(ids, attention_mask=(ids != 0).long(), generation_config=settings)
    rows = out[:, width:].reshape(len(prompts), COUNT, -1).tolist()
    return [[row[: row.index(2) + 1] if 2 in row else row for row in many] for many in rows]


class Counter:
    """Counts the tokens that a model embeds."""

    def __init__(self, lm):
        self.tokens = 0
        lm.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module, inputs, output):
        self.tokens += inputs[0].numel()


@pytest.mark.parametrize("method", ["sample", "beam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_responses_equal_those_of_generate(family, method):
    if family == "mamba" and method == "beam":
        pytest.skip("transformers refuses it")
    lm = tiny_model(family, FAMILIES[family])
    responses = [[ids.tolist() for ids in many] for many in generate(lm, method, prompts())]
    assert responses == plain(lm, method, prompts())


# Two rotations, of which the longest row of a batch chooses one.
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
LONG = {"rope_parameters": LONG_ROPE | {"rope_theta": 1e4}, "original_max_position_embeddings": 14}
ALONE = BLIND_TO_MASKS | {"phi3-long": SIZES | LONG}


@pytest.mark.parametrize("family", FAMILIES | ALONE)
def test_a_response_does_not_depend_on_the_batch(family):
    """Greedily, by transformers alone, one prompt after another, without any padding."""
    lm = tiny_model(family, (FAMILIES | ALONE)[family])
    policy, settings = Decoding(NEW, "greedy"), GenerationConfig(max_new_tokens=NEW)
    batch = generate_batch(lm, prompts(), policy, end_token_ids=[2], pad_token_id=0)
    for prompt, (response,) in zip(prompts(), batch, strict=True):
        ids = torch.from_numpy(prompt)[None]
        alone = lm.generate(ids, generation_config=settings, eos_token_id=2, pad_token_id=0)
        assert response.tolist() == alone[0, len(prompt) :].tolist()


def test_prompts_of_unequal_lengths_share_a_batch():
    """Where padding changes nothing, in a window without room for more."""
    lm = tiny_model("gpt2", SUPPORTED["gpt2"] | {"n_positions": max(LENGTHS) + NEW})
    batches = []
    lm.register_forward_pre_hook(
        lambda _, args, kw: batches.append(len(kw["input_ids"])), with_kwargs=True
    )
    limit = {"max_length": max(LENGTHS) + NEW}
    policy = Decoding(NEW, "greedy")
    generate_batch(lm, prompts(), policy, end_token_ids=[2], pad_token_id=0, **limit)
    assert batches[-1] == len(LENGTHS)


def test_a_small_window_is_no_reason_to_trust_a_model():
    lm = tiny_model("rwkv", BLIND_TO_MASKS["rwkv"])
    policy, ends = Decoding(2, "greedy"), {"end_token_ids": [2], "pad_token_id": 0}
    few = [ids[-3:] for ids in prompts()]
    alone = [generate_batch(lm, [ids], policy, **ends) for ids in few]
    for window in (6, 64):
        batch = generate_batch(lm, few, policy, max_length=window, **ends)
        assert [[many[0].tolist()] for many in batch] == [[a[0][0].tolist()] for a in alone]
    gpt2 = tiny_model("gpt2", SUPPORTED["gpt2"] | {"n_positions": 4})
    assert len(generate_batch(gpt2, few, Decoding(1, "greedy"), max_length=4, **ends)) == len(few)


def test_beams_of_a_cache_that_cannot_follow_them_are_refused():
    lm = tiny_model("recurrent_gemma", BLIND_TO_MASKS["recurrent_gemma"])
    with pytest.raises(ValueError, match="beam: the cache of recurrent_gemma cannot follow"):
        generate(lm, "beam", prompts())


@pytest.mark.parametrize("method", ["sample", "beam"])
def test_a_model_without_a_cache_gives_several_responses(method):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **sizes)).eval()
    assert [len(many) for many in generate(lm, method, prompts())] == [COUNT] * len(LENGTHS)


@pytest.mark.parametrize("method", ["sample", "beam", "diverse_beam"])
def test_a_prompt_is_encoded_once(method):
    lm = tiny_model("llama", SUPPORTED["llama"])
    generate(lm, method, prompts())  # the first batch tries what padding does
    counter = Counter(lm)
    generate(lm, method, prompts())
    padded, decoded = len(LENGTHS) * max(LENGTHS), len(LENGTHS) * COUNT * NEW
    assert counter.tokens <= padded + decoded
