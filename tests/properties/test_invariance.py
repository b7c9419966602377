"""The layout of queries must not change loss or gradient: packs, accumulation, sharing."""

from functools import cache

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.packs import PackPlanner
from rrhf_fast.data.padded import build_padded
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.model.config import LossConfig
from rrhf_fast.model.rrhf import RRHFModel

VOCAB = 11
token = st.integers(0, VOCAB - 1)
# A small alphabet and few reward levels: shared prefixes, duplicates, ties and nesting are common.
response = st.lists(st.integers(0, 2), min_size=1, max_size=5)
query = st.builds(
    lambda prompt, responses: TokenisedQuery(
        np.array(prompt, np.int32),
        [np.array(ids, np.int32) for ids, _ in responses],
        np.array([reward for _, reward in responses], np.float32),
    ),
    st.lists(token, min_size=1, max_size=6),
    st.lists(st.tuples(response, st.integers(0, 2)), min_size=2, max_size=5),
)
queries = st.lists(query, min_size=1, max_size=5)


@cache
def model(packing: str = "forest") -> RRHFModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    lm = LlamaForCausalLM(config).eval()
    return RRHFModel(lm, LossConfig(margin=0.01), packing=packing, max_length=32)


def loss_and_gradient(packs, wrapped: RRHFModel):
    total = sum(pack.num_queries for pack in packs)
    loss = 0.0
    for pack in packs:  # as the trainer does: mean over the step's queries
        part = wrapped(pack).loss * (pack.num_queries / total)
        part.backward()
        loss += part.item()
    gradient = torch.cat([p.grad.flatten() for p in wrapped.parameters()])
    wrapped.zero_grad()
    return torch.tensor(loss), gradient


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(queries, st.integers(1, 60))
def test_packing_and_accumulation(cases, max_tokens):
    together = loss_and_gradient([build_forest(cases)], model())
    planner = PackPlanner(cases, packing="forest", max_tokens_per_pack=max_tokens)
    packs = planner.packs(range(len(cases)))
    assert_same(loss_and_gradient(packs, model()), together)
    one_by_one = [build_forest([case]) for case in reversed(cases)]
    assert_same(loss_and_gradient(one_by_one, model()), together)


@settings(max_examples=40)
@given(queries)
def test_sharing_prefixes(cases):
    shared = loss_and_gradient([build_forest(cases)], model())
    unshared = loss_and_gradient([build_forest(cases, share_prefixes=False)], model())
    assert_same(shared, unshared)


@settings(max_examples=20)
@given(queries)
def test_forest_equals_padding(cases):
    forest = loss_and_gradient([build_forest(cases)], model())
    padded = loss_and_gradient([build_padded(cases)], model("none"))
    assert_same(forest, padded)


@settings(max_examples=20)
@given(query, st.integers(0, 4))
def test_duplicates_score_alike_and_cost_no_token(case, which):
    which %= len(case.response_ids)
    doubled = TokenisedQuery(
        case.prompt_ids,
        [*case.response_ids, case.response_ids[which]],
        np.append(case.rewards, case.rewards[which]),
    )
    pack = build_forest([doubled])
    assert pack.num_tokens == build_forest([case]).num_tokens
    scores = model()(pack).logp_scores
    assert scores[-1] == scores[which]
